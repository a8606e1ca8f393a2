"""Documents out of files and standard input: JSONL, or texts one a line.

Knows lines; what a document must have, documents.py says. To read another format: a branch in
`_parsed`, and its name in FORMATS.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from conch_dna.errors import ConchError

AUTO, JSONL, LINES = "auto", "jsonl", "lines"
FORMATS = (AUTO, JSONL, LINES)
STANDARD_INPUT = "-"
_CHUNK = 2**20


def read_document_files(paths: Sequence[str], *, form: str = AUTO) -> Iterator[Any]:
    """What `read_documents` takes, one line after the other; empty lines are passed over.

    In JSONL, BEIR's `metadata` counts as the payload of a line that has none.

    Args:
        paths: Files in UTF-8; "-" is standard input.
        form: "jsonl"; "lines", where each line is a text; or "auto": JSONL where the first line
            begins with a brace.

    Raises:
        ConchError: A file cannot be read, or a line is not UTF-8 or no JSON object; it is named.
    """
    if form not in FORMATS:
        raise ConchError(f"format {form!r} is not known: use one of {', '.join(FORMATS)}")
    return _documents(paths, form)


def _documents(paths: Sequence[str], form: str) -> Iterator[Any]:
    for path in paths:
        found = form
        for number, line in _lines(path):
            if found == AUTO:
                found = JSONL if line.startswith("{") else LINES
            yield line if found == LINES else _parsed(line, f"{_shown(path)}, line {number}")


def count_lines(paths: Sequence[str]) -> int:
    """How many lines the files have in all; 0, which is unknown, where one is standard input.

    Raises:
        ConchError: A file cannot be read.
    """
    if STANDARD_INPUT in paths:
        return 0
    total = 0
    for path in paths:
        last = b"\n"
        try:
            with _opened(path) as file:
                while chunk := file.read(_CHUNK):
                    total += chunk.count(b"\n")
                    last = chunk[-1:]
        except OSError as error:
            raise _unreadable(path, error) from error
        total += last != b"\n"
    return total


def texts_of(documents: Iterator[Any]) -> Iterator[str]:
    """Title and text of what `read_document_files` gives, for whom only the words matter."""
    for each in documents:
        if isinstance(each, str):
            yield each
        else:
            yield f"{each.get('title') or ''} {each.get('text') or ''}".strip()


def _lines(path: str) -> Iterator[tuple[int, str]]:
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    raise ConchError(
                        f"{_shown(path)}, line {number} is not UTF-8: convert the file"
                    ) from error
                if text:
                    yield number, text
    except OSError as error:
        raise _unreadable(path, error) from error


def _opened(path: str) -> AbstractContextManager[BinaryIO]:
    if path == STANDARD_INPUT:
        return nullcontext(sys.stdin.buffer)
    return open(Path(path).expanduser(), "rb")


def _shown(path: str) -> str:
    return "standard input" if path == STANDARD_INPUT else path


def _unreadable(path: str, error: OSError) -> ConchError:
    return ConchError(f"cannot read {_shown(path)}: {error.strerror or error}")


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConchError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ConchError(f"{where} is no JSON object: give one with text, and id, title, payload")
    if "metadata" in row and "payload" not in row:
        row["payload"] = row.pop("metadata")
    return row
