"""Errors that a user can act on, and what others say, in one line.

Knows nothing of what raises them. The command line prints them as one line and exits with 2.
To add one: subclass `ConchError` only where a caller must tell it from the others.
"""

# Longer messages are cut in their middle: what they quote may be a whole file.
MOST_CHARACTERS = 4_000


class ConchError(Exception):
    r"""A mistake or circumstance the user can remedy; the message says how, in one line.

    What a message quotes of a file may hold ends of lines, a terminal's own codes or half
    characters: they are shown as Python writes them.

    >>> str(ConchError("no setting named 'a\nb'"))
    "no setting named 'a\\nb'"
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > MOST_CHARACTERS:
            half = MOST_CHARACTERS // 2 - 2
            text = f"{text[:half]} … {text[-half:]}"
        if text.isprintable():
            return text
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class NonFiniteLossError(ConchError):
    """The loss became NaN or infinite; names the step, the examples and the last checkpoint."""


class NotWholeError(ConchError):
    """A checkpoint or cache shard on disk is truncated or altered."""


class FolderInUseError(ConchError):
    """Another process is writing to the folder."""


class Interrupted(ConchError):
    """The run was stopped by Ctrl-C after its state was saved."""


def counted(number: int, noun: str) -> str:
    """A number of things in words.

    >>> counted(1, "example"), counted(2000, "example")
    ('1 example', '2,000 examples')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def one_line(message: object, *, trust_option: str | None = None) -> str:
    """A library's message on one line of at most 300 characters.

    Args:
        message: An error or a text; an error without a text is named by its type.
        trust_option: How the user would let a model's own code run, for libraries that ask for it.

    >>> one_line(ValueError("of   three words"))
    'of three words'
    """
    text = " ".join(str(message).split())
    if trust_option and "trust_remote_code" in text:
        return f"{text[:200]} … {trust_option} lets that code run: only if you trust it"
    return text[:300] or (type(message).__name__ if isinstance(message, Exception) else "")


class EgoUnavailableError(ConchError):
    """EGO, the big teacher, cannot be loaded or reached; nothing was wrong with the request."""
