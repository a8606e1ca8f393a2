"""Errors that a user can act on, and what others say, in one line.

Knows nothing of what raises them, only how bytes and numbers are said. The command line prints them
as one line and exits with 2.
To add one: subclass `ConchError` only where a caller must tell it from the others.
"""

import codecs
from collections.abc import Iterator
from contextlib import contextmanager

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


def decoded(content: bytes, source: object) -> str:
    r"""The text of a file that a user gave: UTF-8, or UTF-16 or UTF-32 that says so in front.

    Args:
        content: Of the file.
        source: What it is called in the message, such as its path.

    Raises:
        ConchError: It is neither; names the line, the byte and the remedy.

    >>> decoded("\ufeffö".encode("utf-16"), "a.txt")
    'ö'
    >>> decoded("one\ngröße".encode("latin-1"), "a.txt")
    Traceback (most recent call last):
    conch_dna.errors.ConchError: a.txt, line 2: byte 0xf6 is not UTF-8; it is ö if the file is ...
    """
    marks = {codecs.BOM_UTF32_LE: 32, codecs.BOM_UTF32_BE: 32, codecs.BOM_UTF16_LE: 16}
    marks |= {codecs.BOM_UTF16_BE: 16}
    width = next((width for mark, width in marks.items() if content.startswith(mark)), 8)
    if width == 8 and b"\0\0" in (content[:4:2], content[1:4:2]):
        order = "BE" if content[:1] == b"\0" else "LE"
        raise ConchError(
            f"{source}, line 1: zero bytes, as in UTF-16 without a byte-order mark: "
            f"iconv -f UTF-16{order} -t UTF-8 OLD > NEW"
        )
    coding = "utf-8-sig" if width == 8 else f"utf-{width}"
    try:
        text = content.decode(coding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        if width > 8:
            raise ConchError(
                f"{source}, line {line}: not the UTF-{width} that it says it is ({error.reason}): "
                "save the file as UTF-8"
            ) from error
        raise ConchError(
            f"{source}, line {line}: byte {byte:#04x} is not UTF-8; it is {chr(byte)} if the file "
            "is Latin-1: iconv -f LATIN1 -t UTF-8 OLD > NEW"
        ) from error
    return text


def number_of(count: int, noun: str) -> str:
    """A count and its noun: "1 example", "2 examples"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


@contextmanager
def told(words: str) -> Iterator[None]:
    """Whatever a library raises within becomes one line that begins with these words.

    Raises:
        ConchError: The library raised something.
    """
    try:
        yield
    except ConchError:
        raise
    except Exception as error:
        # Libraries raise all kinds, their own and Python's.
        raise ConchError(f"{words}: {one_line(error)}") from error


class EgoUnavailableError(ConchError):
    """EGO, the big teacher, cannot be loaded or reached; nothing was wrong with the request."""
