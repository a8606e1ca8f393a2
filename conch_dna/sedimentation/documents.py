"""Documents as users give them: plain texts, or mappings with an id, a title, a text and a payload.

Knows texts and ids; nothing of vectors or stores. To accept another form: a branch in `_document`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from conch_dna.digests import content_digest
from conch_dna.errors import ConchError

FIELDS = ("id", "_id", "title", "text", "payload")
TITLE, TEXT = "title", "text"
DocumentId = str | int


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
    return f"{payload.get(TITLE, '')} {payload.get(TEXT, '')}".strip()


def read_documents(given: Iterable[Any]) -> Iterator[Document]:
    """Documents of whatever a user gives, one after the other, never all in memory.

    Args:
        given: Texts; or mappings with `text` and, each optional, `id` (or `_id`, as BEIR has it),
            `title` and `payload`.

    Raises:
        ConchError: One is neither, has no text, an id that is none, or a field that is not known;
            it is named by its number.
    """
    if isinstance(given, (str, Mapping)):
        raise ConchError("documents are given as a list or another iterable, not as a single one")
    for number, each in enumerate(given, 1):
        yield _document(each, number)


def _document(given: Any, number: int) -> Document:
    if isinstance(given, str):
        given = {"text": given}
    if not isinstance(given, Mapping):
        raise ConchError(
            f"document {number} is a {type(given).__name__}: give a text, or a mapping with id, "
            "title, text and payload"
        )
    unknown = sorted(str(name) for name in set(given) - set(FIELDS))
    if unknown:
        raise ConchError(
            f"document {number} has unknown fields {', '.join(unknown)}: put them into its payload"
        )
    title, text = (given.get(name) or "" for name in (TITLE, TEXT))
    if not (isinstance(title, str) and isinstance(text, str) and (title + text).strip()):
        raise ConchError(f"document {number} has no text: leave it out, or give it one")
    payload = given.get("payload") or {}
    if not isinstance(payload, Mapping) or {TITLE, TEXT} & set(payload):
        raise ConchError(
            f"document {number}: its payload must be a mapping without the fields title and text, "
            "which are the document's own"
        )
    name = given.get("id", given.get("_id"))
    if name is None:
        name = content_digest(title, text)[:32]
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        raise ConchError(f"document {number} has the id {name!r}: use a text or a whole number")
    return Document(name, text, title, dict(payload))
