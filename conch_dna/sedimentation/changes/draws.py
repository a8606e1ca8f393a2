"""Draws: which held-out queries judge a change, none of which judged one before if there are more.

Knows the gate's history and who makes queries; decides nothing about a change. To remember more of
a draw: a key of what `account_of` gives, which stands in the history under `questions`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from conch_dna.checkpoints import content_digest, json_text
from conch_dna.errors import NotWholeError
from conch_dna.sedimentation.changes.heldout_queries import Evidence, Place
from conch_dna.sedimentation.stores.contract import VectorStore

History = Sequence[Mapping[str, Any]]
_OF_DOCUMENTS, _OF_JUDGEMENTS = "documents", "judgements"
_PLACE = [int, int, str]


def next_draw(
    store: VectorStore, history: History, *, sample: int, judged: Evidence | None = None
) -> Evidence:
    """Pseudo-queries that judged no change of a history, as far as the store has them.

    Where there are judged queries, those of them that the store has documents for.

    Raises:
        ConchError: There are judged queries, and none of them.
    """
    if judged is not None:
        return judged.within(store)
    drawn = _draws(history, _OF_DOCUMENTS)
    start = Place(*drawn[-1]["last"]) if drawn else Place()
    return Evidence.of_corpus(store, sample=sample, start=start)


def draw_about(
    store: VectorStore,
    history: History,
    version: str,
    *,
    sample: int,
    judged: Evidence | None = None,
) -> Evidence:
    """The queries that last judged a version; else those that will judge the next change."""
    about = [each for each in history if version in (each["candidate"], each["against"])]
    drawn = _draws(about, _OF_DOCUMENTS)
    if judged is not None or not drawn:
        return next_draw(store, history, sample=sample, judged=judged)
    return Evidence.of_corpus(store, sample=sample, start=Place(*drawn[-1]["start"]))


def account_of(evidence: Evidence, history: History) -> dict[str, Any]:
    """What the history keeps of a draw.

    Returns:
        `source`; the places or the digest by which the queries are known again; `used_before`,
        how many changes they judged before; and a `note` of one line where they are not new, or
        a version learned from their documents.
    """
    if evidence.start is not None and evidence.last is not None:
        about: dict[str, Any] = {
            "source": _OF_DOCUMENTS,
            "start": [*evidence.start],
            "last": [*evidence.last],
            "used_before": evidence.last.lap,
        }
        why = "the documents have too few unused queries left"
    else:
        digest = content_digest(json_text([evidence.names, evidence.texts]))
        judged = _draws(history, _OF_JUDGEMENTS)
        used = sum(each["digest"] == digest for each in judged)
        about = {"source": _OF_JUDGEMENTS, "digest": digest, "used_before": used}
        why = "judged queries are the same for every change"
    notes = []
    if used := about["used_before"]:
        times = "once" if used == 1 else f"{used} times"
        notes.append(
            f"{why}: these {len(evidence.names)} were asked {times} before, so that the gate's "
            "confidence is less than it says"
        )
    taught = [
        each["candidate"] for each in history if each["passed"] and _draws([each], _OF_JUDGEMENTS)
    ]
    if evidence.pseudo and taught:
        notes.append(
            f"version {taught[-1]}, which judgements let pass, may have learned from the documents "
            "of these queries"
        )
    return {**about, "note": "; ".join(notes)}


def _draws(history: History, source: str) -> list[Mapping[str, Any]]:
    """What the decisions keep of their draws from one source, oldest first.

    Raises:
        NotWholeError: A draw is not as `account_of` gives it.
    """
    draws = [each["questions"] for each in history]
    draws = [each for each in draws if each.get("source") == source]
    places = [each.get(name) for each in draws for name in ("start", "last")]
    if source == _OF_JUDGEMENTS:
        sound = all(isinstance(each.get("digest"), str) for each in draws)
    else:
        sound = all(isinstance(each, list) and [*map(type, each)] == _PLACE for each in places)
    if not sound:
        raise NotWholeError(
            "the gate's history does not say which queries were asked: restore its file, or move "
            "it and ledger.json away to begin a new history"
        )
    return draws
