"""Which judged queries are asked in a benchmark's cycles, and which are evaluated.

Knows queries by name and text; nothing of engines. To divide them otherwise: another function that
gives a `QuerySplit`.
"""

from dataclasses import dataclass

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.sedimentation.benchmark.collections import Collection


@dataclass(frozen=True, kw_only=True)
class QuerySplit:
    """Which queries are asked in cycles, and which are evaluated; no text is in both.

    Attributes:
        cycles: Names of each cycle's queries.
        texts: Name to text of these.
        evaluated: Name to text.
        repeated: Queries left out because one on the other side has the same text.
    """

    cycles: list[list[str]]
    texts: dict[str, str]
    evaluated: dict[str, str]
    repeated: int


def split_queries(
    collection: Collection, *, cycles: int, queries_per_cycle: int, seed: int
) -> QuerySplit:
    """Divide judged queries; where the collection has `others`, all cycle queries are of those.

    Args:
        collection: Its queries, and others.
        cycles: How many parts.
        queries_per_cycle: Of each part.
        seed: Of the choice.

    Raises:
        ConchError: More than half of the judged queries would be asked, or there are not so many
            others, or fewer than 2 are left to evaluate.
    """
    wanted = cycles * queries_per_cycle
    source = collection.others or collection.queries
    names = list(source)
    if collection.others:
        judged = {_plain(text) for text in collection.queries.values()}
        names = [name for name in names if _plain(source[name]) not in judged]
        repeated = len(source) - len(names)
        most, what = len(names), "those of the other split"
    else:
        most, what = len(names) // 2, f"half of the {len(names)} judged ones"
    if wanted > most:
        each = most // cycles
        remedy = f"give --queries-per-cycle {each} or less" if each else f"give --cycles {most}"
        raise ConchError(
            f"{cycles} cycles of {queries_per_cycle} queries ask {wanted}, but at most {most} may "
            f"be asked, {what}: {remedy}"
        )
    order = np.random.default_rng(seed).permutation(len(names))
    chosen = [names[number] for number in order[:wanted]]
    asked = {_plain(source[name]) for name in chosen}
    evaluated = {
        name: text for name, text in collection.queries.items() if _plain(text) not in asked
    }
    if len(evaluated) < 2:
        raise ConchError(
            f"{len(evaluated)} of {len(collection.queries)} judged queries are left to evaluate, "
            "and an interval needs 2: ask fewer queries in cycles"
        )
    if not collection.others:
        repeated = len(names) - wanted - len(evaluated)
    return QuerySplit(
        cycles=[
            chosen[start : start + queries_per_cycle]
            for start in range(0, wanted, queries_per_cycle)
        ],
        texts={name: source[name] for name in chosen},
        evaluated=evaluated,
        repeated=repeated,
    )


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
