"""What a store is beside its documents: who made it, and which versions it has.

Knows neither files nor servers. What more a store must remember of a version: `VersionState.kept`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from conch_dna.checkpoints import content_digest
from conch_dna.errors import ConchError, NotWholeError

# Of what a store says of itself. The oldest that is read knows neither contents nor digest.
OLDEST_FORMAT, FORMAT = 1, 2
# Among the contents; no version can be named so.
DOCUMENTS = "_documents"
# As many as Qdrant's vectors may have.
MOST_DIMENSIONS = 65_536
VERSION_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class VersionState:
    """Which versions there are; what a store commits in one step.

    Attributes:
        active: The version queries use.
        previous: What was active before it.
        kept: Versions that were active once, with `dimension`, and `count` and `digest` at that
            time.
        building: Versions that were not, or that are being deleted, with their dimension.
        revision: Raised by every write of documents or vectors.
        contents: `count` and `digest` (see `ContentSum`) of what is stored now: of the documents
            under DOCUMENTS, and of the vectors of RAW and each kept version. None where a store
            was made before there were any.
        writing: A write or deletion that was begun and not ended: `ids` of its documents, whether
            it `deletes` them, and `rest`, the contents without them. None where there is none.
    """

    active: str
    previous: str | None = None
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)
    building: dict[str, int] = field(default_factory=dict)
    revision: int = 0
    contents: dict[str, dict[str, Any]] | None = None
    writing: dict[str, Any] | None = None


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document with the digest of all that it holds."""
    return {**document, "digest": _digest(document)}


def unsealed(document: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What `sealed` was given; what an earlier format holds has no digest.

    Raises:
        NotWholeError: It was altered since.
    """
    inside = {name: value for name, value in document.items() if name != "digest"}
    if document["format"] > OLDEST_FORMAT and document.get("digest") != _digest(inside):
        raise NotWholeError(
            f"{source} is not whole: its digest is {document.get('digest')}, not "
            f"{_digest(inside)}. Restore it, or make the store anew from its documents"
        )
    return inside


def _digest(document: Mapping[str, Any]) -> str:
    return content_digest(json.dumps(document, sort_keys=True))


def checked_identity(
    wanted: Mapping[str, Any] | None, stored: Mapping[str, Any] | None, place: str
) -> dict[str, Any]:
    """The identity of a store, compared with what is asked for.

    Raises:
        ConchError: They differ, there is none, or one is incomplete.
    """
    if wanted is not None:
        for name, kind in (("student", str), ("dimension", int)):
            if not isinstance(wanted.get(name), kind) or not wanted[name]:
                raise ConchError(
                    f"identity has {name} {wanted.get(name)!r}: a store needs student, digest and "
                    "dimension of what makes its vectors"
                )
    if stored is None:
        if wanted is None:
            raise ConchError(f"{place} holds no store yet: ingest documents first")
        return dict(wanted)
    if wanted is not None and wanted.get("digest"):
        # The same student may have another name, such as that of a folder that was moved.
        stored = {**stored, "student": wanted["student"]} if _same(wanted, stored) else stored
    if wanted is not None and dict(wanted) != dict(stored):
        reasons = []
        if wanted["student"] != stored["student"]:
            reasons.append(f"with student {stored['student']}, not {wanted['student']}")
        elif wanted.get("digest") != stored.get("digest"):
            reasons.append(
                f"with other weights or settings of {stored['student']} (digest "
                f"{stored.get('digest')}, now {wanted.get('digest')})"
            )
        if wanted["dimension"] != stored["dimension"]:
            reasons.append(f"in {stored['dimension']} dimensions, not {wanted['dimension']}")
        if not reasons:
            reasons.append(f"with {dict(stored)}, not {dict(wanted)}")
        raise ConchError(
            f"the store in {place} was made {' and '.join(reasons)}: open it with that student, "
            "or ingest into a new store"
        )
    return dict(stored)


def _same(wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    first, second = (
        {name: value for name, value in identity.items() if name != "student"}
        for identity in (wanted, stored)
    )
    return first == second


def require_sound(identity: Mapping[str, Any], state: VersionState) -> None:
    """Refuse what another program may have written in the place of a store's own account.

    Raises:
        TypeError: A name is none, or a number is no whole one above 0.
    """
    names = [state.active, *([] if state.previous is None else [state.previous])]
    if not (isinstance(state.kept, dict) and isinstance(state.building, dict)):
        raise TypeError("versions are objects")
    names += [*state.kept, *state.building]
    dimensions = [identity.get("dimension"), *state.building.values()]
    for about in state.kept.values():
        sound = isinstance(about, dict) and {"dimension", "count", "digest"} <= set(about)
        if not (sound and type(about["count"]) is int and isinstance(about["digest"], str)):
            raise TypeError("a version lacks dimension, count or digest")
        dimensions.append(about["dimension"])
    if not all(isinstance(name, str) and VERSION_NAME.fullmatch(name) for name in names):
        raise TypeError("a version's name is none")
    if not all(type(size) is int and 0 < size <= MOST_DIMENSIONS for size in dimensions):
        raise TypeError("a dimension is none")
    if not all(isinstance(identity.get(name), str) for name in ("student", "digest")):
        raise TypeError("student and digest are texts")
