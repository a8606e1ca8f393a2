"""Log-probabilities as servers of others give them, as the outcomes that targets are made of.

Knows the two forms that there are for a given text, and no HTTP: `prompt_logprobs` of vLLM, by
token id, and `echo` with `logprobs`, by token text. Another form: a function like `from_echo`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.training.batches import Example

# The smallest rest that float32 tells from nothing, where the others nearly sum to 1.
SMALLEST_REST = 2.0**-24
# To which rounded probabilities of different tokens may add up.
_MOST = 1.02
_BY_ID = "token_id:"


class TokenNames:
    """Token ids by what servers call them.

    A name that several tokens have names none: what it has belongs to the rest.

    Args:
        tokenizer: As mlx_lm wraps it.
    """

    def __init__(self, tokenizer: Any) -> None:
        size = max(tokenizer.get_vocab().values()) + 1
        self._ids: dict[str, int | None] = {}
        for token in range(size):
            piece = tokenizer.convert_ids_to_tokens([token])[0]
            for name in {tokenizer.decode([token]), piece}:
                if isinstance(name, str):
                    self._ids[name] = None if name in self._ids else token

    def id_of(self, name: str) -> int | None:
        """The only token that is called so; None where there is none or several."""
        if name.startswith(_BY_ID) and name[len(_BY_ID) :].isdecimal():
            return int(name[len(_BY_ID) :])
        return self._ids.get(name)


def from_prompt_logprobs(rows: Any, example: Example) -> list[tuple[dict[int, float], float]]:
    """Of each counted token: log-probabilities by id, and its own.

    Args:
        rows: `prompt_logprobs` of a choice: for each token of the text what could have stood
            there, by id; nothing for the first.
        example: The text.

    Raises:
        ConchError: They are not of this text.
    """
    _require_length(rows, example)
    found = []
    for place in np.flatnonzero(example.counted):
        row = rows[place]
        if not isinstance(row, Mapping):
            raise ConchError(f"{example.name}: there are no log-probabilities of token {place}")
        by_id = {int(token): float(each["logprob"]) for token, each in row.items()}
        own = int(example.ids[place])
        if own not in by_id:
            raise ConchError(f"{example.name}: token {place} is not among its log-probabilities")
        found.append((by_id, by_id[own]))
    return found


def from_echo(
    fields: Any, example: Example, names: TokenNames
) -> list[tuple[dict[int, float], float]]:
    """The same of a choice's `logprobs`, as a server gives them that repeats the text (`echo`).

    Raises:
        ConchError: They are not of this text.
    """
    rows, own = fields.get("top_logprobs"), fields.get("token_logprobs")
    _require_length(rows, example)
    _require_length(own, example)
    found = []
    for place in np.flatnonzero(example.counted):
        by_id = {}
        for name, value in (rows[place] or {}).items():
            if (token := names.id_of(str(name))) is not None:
                by_id[token] = float(value)
        by_id.setdefault(int(example.ids[place]), float(own[place]))
        found.append((by_id, float(own[place])))
    return found


def from_answer(
    fields: Any, encoded: Sequence[int], names: TokenNames
) -> tuple[list[int], list[tuple[dict[int, float], float]]]:
    """The token ids of an answer that a server gave, and of each what `from_echo` gives.

    Args:
        fields: A choice's `logprobs`.
        encoded: The answer's text in the tokenizer's ids, for names that several tokens have.
        names: Ids by names.

    Raises:
        ConchError: Which tokens they are cannot be told.
    """
    told, rows, own = (fields[name] for name in ("tokens", "top_logprobs", "token_logprobs"))
    if not told or not len(told) == len(rows) == len(own):
        raise ConchError("an answer came without log-probabilities of its tokens")
    ids = [names.id_of(str(name)) for name in told]
    if None in ids:
        # An end may stand behind the text.
        if not len(encoded) <= len(ids) <= len(encoded) + 1 or None in ids[len(encoded) :]:
            raise ConchError(
                f"an answer has {len(ids)} tokens, and {len(encoded)} by the tokenizer: give the "
                "server's own by --teacher-tokenizer"
            )
        ids = [*encoded, *ids[len(encoded) :]]
    found = []
    for token, row, value in zip(ids, rows, own, strict=True):
        by_id = {
            each: float(log_prob)
            for name, log_prob in (row or {}).items()
            if (each := names.id_of(str(name))) is not None
        }
        found.append(({**by_id, int(token): float(value)}, float(value)))  # type: ignore[arg-type]
    return [int(token) for token in ids], found  # type: ignore[arg-type]


def _require_length(rows: Any, example: Example) -> None:
    if not isinstance(rows, Sequence) or len(rows) < len(example.ids):
        count = len(rows) if isinstance(rows, Sequence) else "no"
        raise ConchError(
            f"{example.name} has {len(example.ids)} tokens, and there came {count} "
            "log-probabilities: the server reads it in other tokens, so give its own tokenizer"
        )


def outcomes_of(
    rows: Sequence[tuple[Mapping[int, float], float]],
    *,
    top_k: int,
    kept_below: int,
    name: str,
) -> dict[str, np.ndarray]:
    """The arrays of `outcomes.compress` at temperature 1.

    The rest is 1 − Σ of what is kept, in the precision that came, and no smaller than float32 tells
    from nothing.

    Args:
        rows: Of each counted token, see `from_prompt_logprobs`.
        top_k: Kept tokens; with 0 only the text's own log-probability is given.
        kept_below: Only ids below it are kept.
        name: Of the text, for the message.

    Raises:
        ConchError: A position has too few, or such as are none.
    """
    gold = np.array([own for _, own in rows], np.float32)
    if not (np.isfinite(gold) & (gold <= np.log(_MOST))).all():
        raise _impossible(name)
    if top_k == 0:
        return {"gold_log_prob": gold}
    ids = np.zeros((len(rows), top_k), np.uint32)
    kept = np.zeros((len(rows), top_k), np.float32)
    for number, (by_id, _) in enumerate(rows):
        usable = [item for item in by_id.items() if 0 <= item[0] < kept_below]
        best = sorted(usable, key=lambda item: (-item[1], item[0]))[:top_k]
        if len(best) < top_k:
            raise ConchError(
                f"{name}: {len(best)} of {top_k} log-probabilities of a position are of one token "
                f"of the teacher each: lower --top-k to {len(best)} or less"
            )
        ids[number], kept[number] = zip(*best, strict=True)
    with np.errstate(over="ignore"):
        sums = np.exp(kept.astype(np.float64)).sum(axis=1)
    if not (np.isfinite(kept).all() and (sums <= _MOST).all()):
        raise _impossible(name)
    rest = np.log(np.maximum(1 - sums, SMALLEST_REST))[:, None]
    # Where the kept ones sum to a little more than 1, all are scaled.
    whole = np.log(sums[:, None] + np.exp(rest))
    return {
        "kept_ids": ids,
        "kept_log_probs": (kept - whole).astype(np.float32),
        "log_normalizer": np.zeros((len(rows), 1), np.float32),
        "log_rest": (rest - whole).astype(np.float32),
        "gold_log_prob": np.minimum(gold, 0),
    }


def _impossible(name: str) -> ConchError:
    return ConchError(
        f"{name}: the server's log-probabilities are no distribution, such as one above 0, or "
        "several that add up to more than 1: take another server, or `conch-dna teach serve` there"
    )
