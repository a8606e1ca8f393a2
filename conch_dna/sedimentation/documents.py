"""Documents as users have them: texts or mappings with a text, in Python or in files.

Knows texts, ids and lines; nothing of vectors or stores. To accept another form of a document: a
branch in `_document`. To read another format of files: a branch in `read_document_files`, and its
name in FORMATS.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from conch_dna.checkpoints import content_digest
from conch_dna.errors import ConchError

FIELDS = ("id", "_id", "title", "text", "payload")
TITLE, TEXT = "title", "text"
DocumentId = str | int
# Of an integer that a store keeps, with its sign.
MOST_DIGITS = 20

AUTO, JSONL, LINES = "auto", "jsonl", "lines"
FORMATS = (AUTO, JSONL, LINES)
STANDARD_INPUT = "-"
# How an array of objects, texts or nothing begins; a text may well begin with "[1]".
_ARRAY = re.compile(r"\[\s*([\[{\"\]]|$)")


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        id: As the user gave it; of a plain text the beginning of its digest.
        text: Never only white space, unless there is a title.
        title: Or empty.
        payload: What else a user keeps with it, and can filter by.
    """

    id: DocumentId
    text: str
    title: str = ""
    payload: Mapping[str, Any] = field(default_factory=dict)

    @property
    def embedded(self) -> str:
        """What is embedded: title, a space, text (formulas.md 6)."""
        return f"{self.title} {self.text}".strip()

    @property
    def digest(self) -> str:
        """Content address of all of it but the id."""
        payload = json.dumps(self.payload, sort_keys=True, ensure_ascii=False)
        return content_digest(self.title, self.text, payload)

    @property
    def stored(self) -> dict[str, Any]:
        """What the store keeps with its vectors."""
        return {**self.payload, TITLE: self.title, TEXT: self.text}


def embedded_text(payload: Mapping[str, Any]) -> str:
    """What was embedded of a document, from what the store keeps of it."""
    return f"{payload.get(TITLE) or ''} {payload.get(TEXT) or ''}".strip()


def embedded_texts(payloads: Iterable[Mapping[str, Any]]) -> list[str]:
    """`embedded_text` of each."""
    return [embedded_text(payload) for payload in payloads]


def read_documents(source: Iterable[Any]) -> Iterator[Document]:
    """Documents out of whatever a user has, one after the other, never all in memory.

    Args:
        source: Texts; or mappings with `text` and, each optional, `id` (or `_id`, as BEIR has it),
            `title` and `payload`.

    Raises:
        ConchError: One is neither, has no text, an id that is none, or a field that is not known;
            it is named by its number.
    """
    if isinstance(source, (str, Mapping)):
        raise ConchError("documents are given as a list or another iterable, not as a single one")
    for number, each in enumerate(source, 1):
        yield _document(each, number)


def _document(row: Any, number: int) -> Document:
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, Mapping):
        raise ConchError(
            f"document {number} is a {type(row).__name__}: give a text, or a mapping with id, "
            "title, text and payload"
        )
    unknown = sorted(str(name) for name in set(row) - set(FIELDS))
    if unknown:
        raise ConchError(
            f"document {number} has unknown fields {', '.join(unknown)}: put them into its payload"
        )
    title, text = (row.get(name) or "" for name in (TITLE, TEXT))
    if not (isinstance(title, str) and isinstance(text, str) and (title + text).strip()):
        raise ConchError(f"document {number} has no text: leave it out, or give it one")
    payload = row.get("payload") or {}
    if not isinstance(payload, Mapping) or {TITLE, TEXT} & set(payload):
        raise ConchError(
            f"document {number}: its payload must be a mapping without the fields title and text, "
            "which are the document's own"
        )
    name = row.get("id", row.get("_id"))
    if name is None:
        try:
            name = content_digest(title, text)[:32]
        except UnicodeEncodeError:
            # Half a character has no digest; the text will be an error under this name.
            name = f"document {number}"
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        raise ConchError(f"document {number} has the id {name!r}: use a text or a whole number")
    return Document(name, text, title, dict(payload))


def read_document_files(paths: Sequence[str], *, form: str = AUTO) -> Iterator[Any]:
    """What `read_documents` takes, one line after the other; empty lines are passed over.

    In JSON, BEIR's `metadata` counts as the payload of a document that has none.

    Args:
        paths: Files in UTF-8; "-" is standard input.
        form: "jsonl"; "lines", where each line is a text; or "auto": JSONL where the first line
            begins with a brace or the name ends in .jsonl, and an array of objects or texts where
            it ends in .json.

    Raises:
        ConchError: A file cannot be read, or a line is not UTF-8 or no JSON object; it is named.
            Or an array stands in a file of another name.
    """
    if form not in FORMATS:
        raise ConchError(f"format {form!r} is not known: use one of {', '.join(FORMATS)}")
    return _documents(paths, form)


def _documents(paths: Sequence[str], form: str) -> Iterator[Any]:
    for path in paths:
        lines = _lines(path)
        number, line = next(lines, (0, ""))
        if not line:
            continue
        lines = chain([(number, line)], lines)
        if form != LINES and _is_json(path) and line.startswith("["):
            yield from _items(path, "\n".join(text for _, text in lines))
            continue
        own_form = form
        if form == AUTO:
            if _ARRAY.match(line):
                raise ConchError(
                    f"{_shown(path)} begins like a JSON array: name it .json, give JSONL with one "
                    "object a line, or say --format lines where each line is a text"
                )
            is_jsonl = line.startswith("{") or Path(path).suffix == ".jsonl"
            own_form = JSONL if is_jsonl else LINES
        for number, line in lines:
            if own_form == LINES:
                yield line
            else:
                where = f"{_shown(path)}, line {number}"
                yield _row(_parsed(line, where), where)


def _is_json(path: str) -> bool:
    return Path(path).suffix == ".json"


def _items(path: str, content: str) -> Iterator[Any]:
    """The documents of a JSON array."""
    for place, item in enumerate(_parsed(content, path), 1):
        yield item if isinstance(item, str) else _row(item, f"{path}, item {place}")


def count_lines(paths: Sequence[str]) -> int:
    """How many lines the files have in all; 0, unknown, with standard input or a .json file.

    Raises:
        ConchError: A file cannot be read.
    """
    if STANDARD_INPUT in paths:
        return 0
    total = 0
    for path in paths:
        try:
            with _opened(path) as file:
                total += sum(1 for _ in file)
        except OSError as error:
            raise _unreadable(path, error) from error
    return 0 if any(map(_is_json, paths)) else total


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


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConchError(f"{where} is not JSON: {error}") from error


def _row(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ConchError(f"{where} is no JSON object: give one with text, and id, title, payload")
    if "metadata" in row and "payload" not in row:
        row["payload"] = row.pop("metadata")
    return row
