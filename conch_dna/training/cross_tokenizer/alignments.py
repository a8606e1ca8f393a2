"""What each way to teach across tokenizers compares, by its name on the command line.

Knows names only. To add an alignment: an entry in ALIGNMENTS and, where its distributions are
compared otherwise, a branch in `aligned_targets.AlignedTargets` and in `aligned_loss.soft_sum`.
"""

from dataclasses import dataclass

AUTO = "auto"
INDEX = "index"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What an alignment compares.

    Attributes:
        soft: Where the distributions are compared: at "one-to-one" chunks, at the beginning of
            "every" chunk, or "nowhere".
        chunks: Which chunks' likelihoods are compared: those of "several" tokens, "every" one,
            or "none".
    """

    soft: str
    chunks: str


ALIGNMENTS = {
    "bytes": Parts(soft="one-to-one", chunks="several"),
    "alm": Parts(soft="nowhere", chunks="every"),
    "project": Parts(soft="every", chunks="none"),
    "roots": Parts(soft="every", chunks="none"),
    "uld": Parts(soft="every", chunks="none"),
    "truncate": Parts(soft="one-to-one", chunks="none"),
}
