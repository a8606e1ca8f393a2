"""A teacher's kept outcomes as rows of arrays: looked up, merged, trimmed and laid side by side.

Knows arrays and the cache's names for them; nothing of texts, tokenizers or models.
"""

from collections.abc import Sequence

import numpy as np

from conch_dna.training.batches import Example, round_up
from conch_dna.training.soft_targets import TargetIdentity

INNER_MULTIPLE = 64
KEPT_MULTIPLE = 32
PLACES_MULTIPLE = 4

Stored = Sequence[dict[str, np.ndarray]]


def kept_and_rest(
    stored: Stored, rows: np.ndarray, identity: TargetIdentity, temperature: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of some of the teacher's rows the kept ids `[n, K]`, their log-probabilities and the rest's.

    Args:
        stored: What the cache holds of each example.
        rows: Counted over the counted tokens of all of them.
        identity: Of the cache.
        temperature: One of its temperatures.
    """
    column = identity.temperatures.index(float(temperature))
    names = ("kept_ids", "kept_log_probs", "log_normalizer", "log_rest")
    joined = {n: np.concatenate([part[n] for part in stored])[rows] for n in names}
    kept = joined["kept_log_probs"] / np.float32(temperature)
    kept = kept - joined["log_normalizer"][:, column, None]
    return joined["kept_ids"].astype(np.int64), kept, joined["log_rest"][:, column]


def by_row(
    rows: int,
    own_rows: np.ndarray,
    entries: tuple[np.ndarray, np.ndarray, np.ndarray],
    outcomes: tuple[np.ndarray, np.ndarray],
    settled: np.ndarray,
    *,
    nothing: int,
) -> dict[str, np.ndarray]:
    """Lay out what belongs to each row beside each other; see `ClassTargets.within`.

    Args:
        rows: N.
        own_rows: Row of each place, ascending.
        entries: Token, place and outcome of each entry, by place; token -1 is left out.
        outcomes: Log-probability and place of each outcome, by place.
        settled: Whether a place is told, or has nothing to tell.
        nothing: The id that stands for no token.
    """
    tokens, entry_place, entry_outcome = entries
    log_probs, outcome_place = outcomes
    place_number = np.arange(len(own_rows)) - np.searchsorted(own_rows, own_rows)
    outcome_row, entry_row = own_rows[outcome_place], own_rows[entry_place]
    outcome_number = np.arange(len(outcome_row)) - np.searchsorted(outcome_row, outcome_row)
    entry_number = np.arange(len(entry_row)) - np.searchsorted(entry_row, entry_row)
    sizes = [
        round_up(int(number.max(initial=0)) + 1, multiple)
        for number, multiple in (
            (entry_number, INNER_MULTIPLE),
            (outcome_number, INNER_MULTIPLE),
            (place_number, PLACES_MULTIPLE),
        )
    ]
    arrays = {
        "inner_tokens": np.full((rows, sizes[0]), nothing, np.int32),
        "inner_outcomes": np.full((rows, sizes[0]), sizes[1], np.int32),
        "inner_places": np.full((rows, sizes[0]), sizes[2], np.int32),
        "inner_log_probs": np.full((rows, sizes[1]), -np.inf, np.float32),
        "outcome_places": np.full((rows, sizes[1]), sizes[2], np.int32),
        "inner_told": np.ones(rows, np.float32),
        "inner_blank": np.zeros((rows, sizes[2]), np.float32),
    }
    here = tokens >= 0
    at = (entry_row[here], entry_number[here])
    arrays["inner_tokens"][at] = tokens[here]
    arrays["inner_outcomes"][at] = outcome_number[entry_outcome[here]]
    arrays["inner_places"][at] = place_number[entry_place[here]]
    arrays["inner_log_probs"][outcome_row, outcome_number] = log_probs
    arrays["outcome_places"][outcome_row, outcome_number] = place_number[outcome_place]
    arrays["inner_told"][own_rows[~settled]] = 0
    without = np.ones(rows, bool)
    without[own_rows] = False
    arrays["inner_told"][without] = 0
    return arrays


def merged(
    ids: np.ndarray, log_probs: np.ndarray, rest: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Add up what goes to the same id of a row, and what goes to none to the rest.

    Returns:
        Ids `[n, K]`, each once in its row and -1 elsewhere; log-probabilities `[n, K]`, -inf
        where there is no id; and the rest `[n]`.
    """
    order = np.argsort(ids, axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, axis=1)
    log_probs = np.take_along_axis(log_probs, order, axis=1)
    first = np.ones(ids.shape, bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = np.flatnonzero(first.ravel())
    if len(starts):
        sums = np.logaddexp.reduceat(log_probs.ravel(), starts)
        log_probs = np.full(log_probs.size, -np.inf, log_probs.dtype)
        log_probs[starts] = sums
        log_probs = log_probs.reshape(ids.shape)
    nowhere = np.where(ids < 0, log_probs, -np.inf).max(axis=1, initial=-np.inf)
    keep = first & (ids >= 0)
    kept = np.where(keep, log_probs, -np.inf)
    return np.where(keep, ids, -1), kept, np.logaddexp(rest, nowhere)


def trimmed(ids: np.ndarray, log_probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop the columns that no row needs, up to a multiple of 32.

    Args:
        ids: `[n, K]`, -1 for none.
        log_probs: `[n, K + 1]`, the rest last.

    Returns:
        Both with the ids of each row in front, likeliest first.
    """
    keys = np.where(ids < 0, np.inf, -log_probs[:, :-1])
    order = np.argsort(keys, axis=1, kind="stable")
    width = min(ids.shape[1], round_up(int((ids >= 0).sum(1).max(initial=1)), KEPT_MULTIPLE))
    order = order[:, :width]
    kept = np.take_along_axis(log_probs, order, axis=1)
    return np.take_along_axis(ids, order, axis=1), np.concatenate([kept, log_probs[:, -1:]], axis=1)


def stacked(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows below each other, ids `[n, K]` filled up with -1 and log-probabilities with -inf."""
    width = max(ids.shape[1] for ids, _ in (first, second))
    parts = []
    for ids, log_probs in (first, second):
        missing = width - ids.shape[1]
        empty = np.full((len(ids), missing), -np.inf, log_probs.dtype)
        parts.append(
            (
                np.pad(ids, ((0, 0), (0, missing)), constant_values=-1),
                np.concatenate([log_probs[:, :-1], empty, log_probs[:, -1:]], axis=1),
            )
        )
    (ids, log_probs), (more_ids, more) = parts
    return np.concatenate([ids, more_ids]), np.concatenate([log_probs, more])


def token_before(examples: Sequence[Example]) -> np.ndarray:
    """Of every counted token of all examples the token before it, -1 where that is not counted."""
    parts = [np.zeros(0, np.int64)]
    for example in examples:
        at = np.flatnonzero(example.counted)
        parts.append(np.where(example.counted[at - 1], example.ids[at - 1], -1).astype(np.int64))
    return np.concatenate(parts)


def columns_of(kept_ids: np.ndarray, rows: np.ndarray, ids: np.ndarray, nothing: int) -> np.ndarray:
    """The column of `kept_ids` `[N, K]` in which each row has an id; K for `nothing` or none."""
    width = nothing + 1
    keys = (np.arange(len(kept_ids))[:, None] * width + kept_ids).ravel()
    order = np.argsort(keys, kind="stable")
    wanted = rows * width + ids
    at = order[np.searchsorted(keys[order], wanted).clip(max=len(keys) - 1)]
    found = (keys[at] == wanted) & (ids != nothing)
    return np.where(found, at % kept_ids.shape[1], kept_ids.shape[1])
