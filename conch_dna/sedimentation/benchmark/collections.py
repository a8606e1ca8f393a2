"""Collections for retrieval: a corpus, queries, and which documents answer them.

Knows folders in BEIR layout and the tasks of mteb; nothing of vectors or stores. To read another
layout: a function that gives a `Collection`, and its branch in `read_collection`.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conch_dna.errors import ConchError, decoded
from conch_dna.sedimentation.retrieval import Judgements, with_relevant

LAYOUT = "a folder in BEIR layout (corpus.jsonl, queries.jsonl, qrels/test.tsv)"


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Documents, and judged queries.

    Attributes:
        name: Of the folder or task.
        documents: With `id`, `title` and `text`, as an engine takes them in.
        queries: Name to text, of those that have a relevant document.
        judgements: Grades of documents by name, all of them, for the same queries.
        others: Name to text of judged queries of another split, where one was asked for.
        empty: Documents of the corpus with neither title nor text; they are left out.
        outside: Judgements of documents that are not among `documents`; the ideal ranking counts
            them, as pytrec_eval has it.
    """

    name: str
    documents: list[dict[str, str]]
    queries: dict[str, str]
    judgements: Judgements
    others: dict[str, str] = field(default_factory=dict)
    empty: int = 0
    outside: int = 0


def read_collection(
    task: str, *, split: str = "test", cycle_split: str | None = None
) -> Collection:
    """Read a folder in BEIR layout, or fetch a retrieval task of mteb.

    Args:
        task: The folder, or the task's name.
        split: Whose judgements.
        cycle_split: Another split of the folder, whose queries are `others`.

    Raises:
        ConchError: There is no such folder or task, mteb is missing, a file is not as it should
            be, or no query has a relevant document.
    """
    folder = Path(task).expanduser()
    if folder.is_dir():
        return read_beir(folder, split=split, cycle_split=cycle_split)
    if folder.exists() or os.sep in task or task.startswith((".", "~")):
        raise ConchError(f"{task} is no folder: give {LAYOUT}, or the name of a task of mteb")
    if cycle_split is not None:
        raise ConchError(
            f"{task} is a task of mteb, of which only one split is read: leave --cycle-split out, "
            f"or give {LAYOUT}"
        )
    return _from_mteb(task, split=split)


def read_beir(folder: Path, *, split: str = "test", cycle_split: str | None = None) -> Collection:
    """Read a folder in BEIR layout.

    Args:
        folder: With corpus.jsonl (`_id`, `title`, `text`), queries.jsonl (`_id`, `text`) and
            qrels/<split>.tsv (query, document, grade; a header line).
        split: Whose judgements.
        cycle_split: Another split, whose queries are `others`.

    Raises:
        ConchError: A file is not as it should be, or no query has a relevant document.
    """
    corpus = {name: _document(name, row) for name, row in _rows(folder / "corpus.jsonl")}
    queries, judgements = read_judgements(folder, split=split)
    source = str(folder / "qrels" / f"{split}.tsv")
    name = folder.resolve().name
    collection = _collection(name, corpus, queries, judgements, source=source)
    if cycle_split is None:
        return collection
    queries, _ = read_judgements(folder, split=cycle_split)
    others = {name: text for name, text in queries.items() if name not in collection.queries}
    if not others:
        raise ConchError(
            f"{folder / 'qrels' / cycle_split}.tsv judges no query that {split}.tsv does not: give "
            "--cycle-split another split"
        )
    return replace(collection, others=others)


def read_judgements(folder: Path, *, split: str = "test") -> tuple[dict[str, str], Judgements]:
    """Judged queries of a folder in BEIR layout, whose corpus need not be there.

    Args:
        folder: With queries.jsonl and qrels/<split>.tsv.
        split: Whose judgements.

    Returns:
        Names and texts of the queries that have a relevant document, and their grades.

    Raises:
        ConchError: A file is not as it should be, or no query has a relevant document.
    """
    texts = {name: str(row.get("text") or "") for name, row in _rows(folder / "queries.jsonl")}
    path = folder / "qrels" / f"{split}.tsv"
    return _judged(_judgements(path), texts, source=str(path))


def _document(name: str, row: Mapping[str, Any]) -> dict[str, str]:
    return {"id": name, **{part: str(row.get(part) or "") for part in ("title", "text")}}


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Ids and rows of a JSON Lines file, each id once."""
    seen = set()
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConchError(f"line {number} of {path} is not JSON: {error}") from error
        if not isinstance(row, dict) or row.get("_id") in (None, ""):
            raise ConchError(
                f"line {number} of {path} has no _id: give an object with _id and text"
            )
        name = str(row["_id"])
        if name in seen:
            raise ConchError(f"line {number} of {path}: _id {name!r} stands there twice")
        seen.add(name)
        yield name, row


def _lines(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConchError(f"cannot read {path}: {error}. Give {LAYOUT}") from error
    return decoded(content, f"cannot read {path}").split("\n")


def _judgements(path: Path) -> Judgements:
    judgements: dict[str, dict[str | int, int]] = {}
    for number, line in enumerate(_lines(path), 1):
        cells = line.rstrip("\r").split("\t")
        if not line.strip() or (number == 1 and cells[0] in ("query-id", "query_id", "qid")):
            continue
        try:
            query, document, grade = cells
            judgements.setdefault(query, {})[document] = int(grade)
        except ValueError as error:
            raise ConchError(
                f"line {number} of {path} is {line!r}: it must be query, document and a whole "
                "number as grade, with tabs between"
            ) from error
    return judgements


def _judged(
    judgements: Judgements, texts: Mapping[str, str], *, source: str
) -> tuple[dict[str, str], Judgements]:
    """The queries that have a relevant document, in the judgements' order, and their grades."""
    relevant = with_relevant(judgements)
    if not relevant:
        raise ConchError(
            f"{source} names no query with a relevant document (a grade above 0): there are no "
            "judged queries, so nothing can be evaluated"
        )
    if bare := [name for name in relevant if not texts.get(name, "").strip()]:
        raise ConchError(
            f"{source} judges query {bare[0]!r}, which has no text among the queries ({len(bare)} "
            f"of {len(relevant)}): give queries and judgements of the same names"
        )
    return {name: texts[name] for name in relevant}, relevant


def _collection(
    name: str,
    corpus: Mapping[str, dict[str, str]],
    queries: dict[str, str],
    judgements: Judgements,
    *,
    source: str,
) -> Collection:
    documents = [each for each in corpus.values() if (each["title"] + each["text"]).strip()]
    known = {each["id"] for each in documents}
    outside = sum(each not in known for grades in judgements.values() for each in grades)
    if outside == sum(map(len, judgements.values())):
        raise ConchError(
            f"{source} judges none of the corpus's {len(documents)} documents with a text: give "
            "corpus and judgements of the same collection"
        )
    return Collection(
        name=name,
        documents=documents,
        queries=queries,
        judgements=judgements,
        empty=len(corpus) - len(documents),
        outside=outside,
    )


def _from_mteb(name: str, *, split: str) -> Collection:
    try:
        import mteb
    except ImportError as error:
        raise ConchError(
            f"{name} is no folder here, and mteb, which would fetch a task of that name, is not "
            f"installed: pip install mteb, or give {LAYOUT}"
        ) from error
    try:
        task = mteb.get_task(name)
        task.load_data()
        # Tasks that load themselves have the form of mteb 1; of others this leaves all as it is.
        task.convert_v1_dataset_format_to_v2(1)
        subsets = {each: parts for each, parts in task.dataset.items() if split in parts}
    except KeyError as error:
        raise ConchError(f"mteb has no task {name!r}: {error}. Or give {LAYOUT}") from error
    # What is raised without a network depends on the libraries below mteb; these are their bases.
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ConchError(
            f"mteb cannot give the retrieval task {name}: {reason}. Without a network give {LAYOUT}"
        ) from error
    if len(subsets) != 1:
        raise ConchError(
            f"the task {name} has {len(subsets)} parts with a split {split!r} "
            f"({', '.join(sorted(subsets)) or 'none'}), and one is needed: choose another task, or "
            f"give {LAYOUT}"
        )
    (data,) = (parts[split] for parts in subsets.values())
    corpus = {str(row["id"]): _document(str(row["id"]), row) for row in data["corpus"]}
    grades: Judgements = {
        str(query): {str(each): int(grade) for each, grade in row.items()}
        for query, row in data["relevant_docs"].items()
    }
    texts = {str(row["id"]): str(row["text"]) for row in data["queries"]}
    source = f"the split {split} of {name}"
    return _collection(name, corpus, *_judged(grades, texts, source=source), source=source)
