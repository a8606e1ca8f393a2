"""A teacher's targets as classes of tokens, which mean the same in two vocabularies.

Knows aligned examples, both vocabularies and the teacher's cache; nothing of weights.
Another way to find out what is inside a class would be a method of `ClassBatch`.

Why classes. A teacher of characters says `t` and means every word in t; a student of words says
`t` and means the letter. Compared token by token, the student would be taught that words in t are
never written. So tokens that are the same event, "the text goes on with t", form a class on either
side, whose probability is the sum over its tokens. Its name is its root, the longest token that
both have and with which the tokens of the class begin (`vocabulary.common_roots`).

Why temperature 1. The probability of a class adds up those of its tokens, which holds for
probabilities alone: at another temperature a class of a thousand tokens would change otherwise
than one of a single token, though they are the same event.

Why tokens that reach over a boundary. Behind `th` a student with a token `the` says little of an
e: it would have said so one token earlier. Of all ways to cover a text the next boundary is
reached by the text's own tokens, or by a longer token that begins with the one before it. Both
are counted, on both sides, else a longer token would look like a mistake.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from conch_dna.training.batches import Example, round_up
from conch_dna.training.cross_tokenizer.alignments import rank_within
from conch_dna.training.cross_tokenizer.loss import (
    CLASS_TEMPERATURE,
    SoftLoss,
    class_sum,
)
from conch_dna.training.cross_tokenizer.targets import (
    AlignedRows,
    AlignedTargets,
    Arrays,
    counted_up,
    merged,
)
from conch_dna.training.cross_tokenizer.vocabulary import (
    MOST_BEGINNERS,
    Members,
    TokenClasses,
)
from conch_dna.training.settings import KDConfig

LEAST_POSSIBLE = 0.5
MOST_UNKNOWN = 0.1
KEPT_MULTIPLE = 32
INNER_MULTIPLE = 64
PLACES_MULTIPLE = 4


@dataclass(frozen=True, eq=False)
class ClassRows:
    """What the teacher says in classes of tokens at some of the student's rows.

    Attributes:
        rows: `[n]`: the student's.
        ids: `[n, K]`: roots, each once in its row, -1 where there is none.
        log_probs: `[n, K + 1]`, the rest last.
        known: `[n]`, bool: whether the teacher says enough there.
    """

    rows: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray
    known: np.ndarray

    def above(self, other: "ClassRows") -> "ClassRows":
        """Both below each other, with as many columns as the wider one."""
        width = max(self.ids.shape[1], other.ids.shape[1])
        ids, log_probs = [], []
        for part in (self, other):
            missing = width - part.ids.shape[1]
            empty = np.full((len(part.ids), missing), -np.inf, part.log_probs.dtype)
            ids.append(np.pad(part.ids, ((0, 0), (0, missing)), constant_values=-1))
            columns = part.log_probs[:, :-1], empty, part.log_probs[:, -1:]
            log_probs.append(np.concatenate(columns, axis=1))
        return ClassRows(
            np.concatenate([self.rows, other.rows]),
            np.concatenate(ids),
            np.concatenate(log_probs),
            np.concatenate([self.known, other.known]),
        )


@dataclass(frozen=True, eq=False)
class InnerPlaces:
    """Boundaries of one side inside single tokens of the other.

    Attributes:
        student_rows: `[P]`: the student's row at each place, ascending.
        teacher_rows: `[P]`: the teacher's row at each place.
        tokens: `[P]`: the single token.
        read: `[P]`: how many of its bytes lie before the boundary.
    """

    student_rows: np.ndarray
    teacher_rows: np.ndarray
    tokens: np.ndarray
    read: np.ndarray


@dataclass(frozen=True, eq=False)
class InnerOutcomes:
    """What the teacher says inside the student's tokens.

    Each place there has several outcomes, and several of the student's tokens count for each.

    Attributes:
        place_rows: `[P]`: the student's row of each place, ascending.
        settled: `[P]`, bool: the teacher says it, or there is only one thing to say.
        outcome_places: `[O]`: the place of each outcome, ascending.
        log_probs: `[O]`: of each outcome among those of its place; -inf where the teacher does
            not say it.
        tokens: `[E]`: the student's, which count for an outcome; -1 where the teacher does not
            say it.
        token_places: `[E]`: the place of each token, ascending.
        token_outcomes: `[E]`: the outcome for which each token counts.
    """

    place_rows: np.ndarray
    settled: np.ndarray
    outcome_places: np.ndarray
    log_probs: np.ndarray
    tokens: np.ndarray
    token_places: np.ndarray
    token_outcomes: np.ndarray

    def laid(self, count: int, *, nothing: int) -> Arrays:
        """What belongs to each row beside each other; see `RootTargets.arrays`.

        Args:
            count: Rows.
            nothing: The id that stands for no token.
        """
        outcome_rows = self.place_rows[self.outcome_places]
        token_rows = self.place_rows[self.token_places]
        place_number, outcome_number, token_number = map(
            rank_within, (self.place_rows, outcome_rows, token_rows)
        )
        tokens, outcomes, places = (
            round_up(int(number.max(initial=0)) + 1, multiple)
            for number, multiple in (
                (token_number, INNER_MULTIPLE),
                (outcome_number, INNER_MULTIPLE),
                (place_number, PLACES_MULTIPLE),
            )
        )
        arrays = {
            "inner_tokens": np.full((count, tokens), nothing, np.int32),
            "inner_outcomes": np.full((count, tokens), outcomes, np.int32),
            "inner_places": np.full((count, tokens), places, np.int32),
            "inner_log_probs": np.full((count, outcomes), -np.inf, np.float32),
            "outcome_places": np.full((count, outcomes), places, np.int32),
            "inner_known": np.zeros(count, np.float32),
            "inner_blank": np.zeros((count, places), np.float32),
        }
        here = self.tokens >= 0
        at = token_rows[here], token_number[here]
        arrays["inner_tokens"][at] = self.tokens[here]
        arrays["inner_outcomes"][at] = outcome_number[self.token_outcomes[here]]
        arrays["inner_places"][at] = place_number[self.token_places[here]]
        arrays["inner_log_probs"][outcome_rows, outcome_number] = self.log_probs
        arrays["outcome_places"][outcome_rows, outcome_number] = place_number[self.outcome_places]
        arrays["inner_known"][self.place_rows] = 1
        arrays["inner_known"][self.place_rows[~self.settled]] = 0
        return arrays


class ClassBatch:
    """What a teacher says in classes about the texts of a batch.

    Args:
        part: The batch.
        classes: Of both vocabularies.
        nothing: The id that stands for no token of the student.
    """

    def __init__(self, part: AlignedRows, classes: TokenClasses, *, nothing: int) -> None:
        self.part = part
        self.classes = classes
        self.nothing = nothing
        self.teacher_before = token_before([example.teacher for example in part.examples])
        self.student_before = token_before(part.examples)

    def shared_before(self) -> np.ndarray:
        """`[C]`, bool: whether both read the same token before a chunk.

        What a longer token that both have would say there, both said a token earlier.
        """
        teacher = self.teacher_before[self.part.chunks.teacher]
        student = self.student_before[self.part.chunks.student]
        return (teacher >= 0) & (student >= 0) & (self.classes.shared[teacher] == student)

    def at_boundaries(
        self, rows: np.ndarray, shared_before: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the teacher says comes next, at boundaries of its own.

        A teacher that reads `th` says little of an e, if it has a token `the`: it would have said
        so a token earlier. So what it says at the boundary counts as far as it had ended its
        token there, and beside it the longer tokens that begin with that one, each for the class
        of what follows in it. Where the token before was not cached, none reaches over.

        Args:
            rows: The teacher's `[n]`.
            shared_before: `[n]`, bool: where tokens that both have do not count as longer ones.

        Returns:
            Ids of classes `[n, K]`, each once in its row and -1 elsewhere, and log-probabilities
            `[n, K + 1]`, the rest last.
        """
        classes, insides = self.classes, self.classes.teacher_insides
        kept_ids, kept, rest = self.part.outcomes(rows, CLASS_TEMPERATURE)
        own = self.teacher_before[rows]
        before = np.maximum(rows - 1, 0)
        over_ids, over, _ = self.part.outcomes(before, CLASS_TEMPERATURE)
        following, goes_on, _ = insides.behind(insides.lengths[own], own, over_ids)
        counts = goes_on & (own >= 0)[:, None]
        if shared_before is not None:
            counts &= ~(shared_before[:, None] & (classes.shared[over_ids] >= 0))
        over = np.where(counts, over, -np.inf)
        gold = self.part.stored["gold_log_prob"].astype(np.float32)
        ended = np.where(own >= 0, gold[before], 0)
        total = np.logaddexp(ended, np.logaddexp.reduce(over, axis=1))
        over_classes = np.where(following >= 0, classes.student_roots[following], -1)
        ids, log_probs, rest = merged(
            np.concatenate([classes.teacher_roots[kept_ids], over_classes], axis=1),
            np.concatenate([kept + (ended - total)[:, None], over - total[:, None]], axis=1),
            rest + ended - total,
        )
        return trimmed(ids, np.concatenate([log_probs, rest[:, None]], axis=1))

    def inside_teacher(self) -> ClassRows:
        """What the teacher said about the inside of its tokens, where the student has several.

        Of the tokens that begin with what the student has read so far, each gives its
        probability to the class of what comes next in it; the token that ends there to the rest.
        Where what was not kept could be more than a tenth of that, nothing is known.
        """
        places = self._places(of_teacher=True)
        kept_ids, kept, unknown = self.part.outcomes(places.teacher_rows, CLASS_TEMPERATURE)
        insides = self.classes.teacher_insides
        following, _, ended = insides.behind(places.read, places.tokens, kept_ids)
        next_classes = np.where(following >= 0, self.classes.student_roots[following], -1)
        log_probs = np.where((following >= 0) | ended, kept, -np.inf)
        mass = np.logaddexp.reduce(log_probs, axis=1, keepdims=True)
        known = (unknown <= mass[:, 0] + np.log(MOST_UNKNOWN))[:, None]
        log_probs = np.where(known, log_probs - np.where(known, mass, 0), -np.inf)
        rest = np.full(len(kept), -np.inf, np.float32)
        ids, log_probs, rest = merged(next_classes, log_probs, rest)
        log_probs = np.concatenate([log_probs, rest[:, None]], axis=1)
        return ClassRows(places.student_rows, *trimmed(ids, log_probs), known[:, 0])

    def inside_student(self) -> InnerOutcomes:
        """What the teacher says inside the student's tokens, at the boundaries of its own.

        The student's tokens of the same class that begin with what the teacher has read so far
        say what comes next as well: each for the class of what follows in it; the one that ends
        there, those with no boundary of the teacher's there, and what the teacher did not keep,
        for the rest. Where none is for the rest, the teacher's rest is news and left out.
        """
        places = self._places(of_teacher=False)
        ids, log_probs = self.at_boundaries(places.teacher_rows)
        pairs = zip(places.tokens.tolist(), places.read.tolist(), strict=True)
        groups = [self.classes.inside(token, read) for token, read in pairs]
        count = np.array([len(members.tokens) for members in groups], np.int64)
        place = np.repeat(np.arange(len(groups)), count)
        members = Members.joined(groups)
        column = columns_of(ids, place, members.classes)
        of_rest = column == ids.shape[1]
        # Outcomes of a place in the order of their classes, the rest first.
        keys = place * (self.nothing + 1) + np.where(of_rest, 0, members.classes + 1)
        _, first, outcome = np.unique(keys, return_index=True, return_inverse=True)
        outcome_place, is_rest = place[first], of_rest[first]
        probability = np.exp(log_probs[outcome_place, column[first]].astype(np.float64))
        probability[is_rest] = 0
        kept = np.bincount(outcome_place, probability, minlength=len(groups))
        probability[is_rest] = np.maximum(0, 1 - kept[outcome_place[is_rest]])
        total = np.bincount(outcome_place, probability, minlength=len(groups))
        outcomes = np.bincount(outcome_place, minlength=len(groups))
        known = (total >= LEAST_POSSIBLE) & (outcomes > 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.log(probability / total[outcome_place])
        return InnerOutcomes(
            place_rows=places.student_rows,
            settled=known | (count == 1),
            outcome_places=outcome_place,
            log_probs=np.where(known[outcome_place], shares, -np.inf),
            token_places=place,
            token_outcomes=outcome,
            tokens=np.where(known[place], members.tokens, -1),
        )

    def reaching(self, arrays: Arrays, shared_before: np.ndarray) -> Arrays:
        """The student's tokens that reach over each of its boundaries; see `loss.with_reaching`.

        Args:
            arrays: Of the batch so far.
            shared_before: `[N]`, bool: where tokens that both have do not count.

        Returns:
            The arrays that begin with `over_`, see `RootTargets.arrays`, and two anew:
            `soft_weights`, 0 at boundaries that more than 512 tokens reach over, and
            `inner_known`, 0 where no boundary tells whether the token ends.
        """
        kept_ids = arrays["kept_ids"]
        soft_weights, inner_known = arrays["soft_weights"].copy(), arrays["inner_known"].copy()
        rows = len(kept_ids)
        own = np.full(rows, -1)
        own[: len(self.student_before)] = self.student_before
        groups = [
            self.classes.reaching_over(token, shared_before=shared)
            for token, shared in zip(own.tolist(), shared_before.tolist(), strict=True)
        ]
        count = np.array([len(members.tokens) for members in groups])
        soft_weights[count > MOST_BEGINNERS] = 0
        # The end of a token is told at the row behind it, or there is nothing else it could be.
        behind = np.flatnonzero(own >= 0)
        ends = np.zeros(rows, bool)
        ends[behind - 1] = (soft_weights[behind] > 0) | (count[behind] <= 1)
        inner_known[~ends] = 0
        count[soft_weights == 0] = 0
        row = np.repeat(np.arange(rows), count)
        members = Members.joined([part for part, size in zip(groups, count, strict=True) if size])
        longer = members.tokens != own[row]
        row, members = row[longer], members.where(longer)
        number = rank_within(row)
        size = round_up(int(number.max(initial=0)) + 1, INNER_MULTIPLE)
        over_tokens = np.full((rows, size), self.nothing, np.int32)
        over_tokens[row, number] = members.tokens
        over_columns = np.full((rows, size), kept_ids.shape[1], np.int32)
        over_columns[row, number] = columns_of(kept_ids, row, members.classes)
        has_longer = np.isin(np.arange(rows), row)
        return {
            "over_own": np.where(has_longer, own, self.nothing).astype(np.int32),
            "over_tokens": over_tokens,
            "over_columns": over_columns,
            "soft_weights": soft_weights,
            "inner_known": inner_known,
        }

    def _places(self, *, of_teacher: bool) -> InnerPlaces:
        """The places inside single tokens of one side, at boundaries of the other."""
        order = 1 if of_teacher else -1
        lengths = [self.classes.teacher_insides.lengths, self.classes.student_insides.lengths]
        whole_lengths, split_lengths = lengths[::order]
        parts: list[tuple[np.ndarray, ...]] = []
        offsets = [0, 0]
        for example in self.part.examples:
            sides = [(example.teacher, example.chunks.teacher), (example, example.chunks.student)]
            (whole, wholes), (split, splits) = sides[::order]
            before = np.concatenate([[0], np.cumsum(split_lengths[split.ids])])
            # A space that only one side puts in front would shift all places by one.
            same = whole_lengths[whole.ids[wholes[:, 0]]] == np.diff(before[splits])[:, 0]
            single = (np.diff(wholes)[:, 0] == 1) & same
            count = np.diff(splits)[single, 0] - 1
            inside = counted_up(count) + 1
            at = np.repeat(splits[single, 0], count) + inside
            token = np.repeat(wholes[single, 0], count)
            teacher_at, student_at = [token, at][::order]
            parts.append(
                (
                    (np.cumsum(example.counted) - 1 + offsets[1])[student_at],
                    (np.cumsum(example.teacher.counted) - 1 + offsets[0])[teacher_at],
                    whole.ids[token].astype(np.int64),
                    before[at] - before[at - inside],
                )
            )
            offsets = [offsets[0] + example.teacher.count, offsets[1] + example.count]
        return InnerPlaces(*map(np.concatenate, zip(*parts, strict=True)))


class RootTargets(AlignedTargets):
    """Distributions over classes of tokens, at every boundary that says something."""

    name = "roots"
    rows_before = 1

    @cached_property
    def classes(self) -> TokenClasses:
        """Of both vocabularies."""
        tokenizers = self.teacher.tokenizer, self.student.tokenizer
        return TokenClasses(tokenizers, self.tables, self.shared)

    @property
    def student_ids(self) -> np.ndarray:
        """The root of each of the teacher's tokens, or -1."""
        return self.classes.teacher_roots

    def arrays(self, part: AlignedRows, temperature: float) -> Arrays:
        """The teacher's classes at common boundaries, then inside the tokens of either side.

        The temperature is 1, whatever is asked for.

        Returns:
            Besides `kept_ids`, `teacher_log_probs` and `soft_weights`, with J places inside a
            token, S outcomes of them and E tokens: `inner_log_probs` float32 `[N, S]`, -inf where
            there is none; `outcome_places` int32 `[N, S]`, the place of each outcome (J for
            none); `inner_tokens` int32 `[N, E]`, the tokens that count for an outcome, with
            `inner_outcomes` and `inner_places` `[N, E]` of each (S and J for none);
            `inner_known` float32 `[N]`, 1 where the teacher says all of it; `inner_blank` `[N, J]`,
            zeros that carry J. And for each boundary `over_own` int32 `[N]`, the token that ended
            there; `over_tokens` int32 `[N, E]`, the longer ones that begin with it; and
            `over_columns` int32 `[N, E]`, the column of `kept_ids` of what follows in each, K for
            the rest.
        """
        chunks, nothing = part.chunks, self.student.token_count
        batch = ClassBatch(part, self.classes, nothing=nothing)
        shared = batch.shared_before()
        between = ClassRows(
            chunks.student, *batch.at_boundaries(chunks.teacher, shared), np.ones(len(shared), bool)
        )
        rows = between.above(batch.inside_teacher())
        arrays = self.laid(rows.ids, rows.log_probs, rows.rows, part.count, rows.known)
        arrays |= batch.inside_student().laid(part.count, nothing=nothing)
        shared_rows = np.zeros(part.count, bool)
        shared_rows[chunks.student] = shared
        return arrays | batch.reaching(arrays, shared_rows)

    def soft_loss(self, config: KDConfig) -> SoftLoss:
        """The divergence over classes at temperature 1, and what they leave open."""
        return partial(
            class_sum,
            divergence=config.divergence,
            nothing=self.student.token_count,
            roots=self.classes.student_roots,
        )


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


def token_before(examples: Sequence[Example]) -> np.ndarray:
    """Of every counted token of all examples the token before it, -1 where that is not counted."""
    parts = [np.zeros(0, np.int64)]
    for example in examples:
        at = np.flatnonzero(example.counted)
        parts.append(np.where(example.counted[at - 1], example.ids[at - 1], -1).astype(np.int64))
    return np.concatenate(parts)


def columns_of(kept_ids: np.ndarray, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The column of `kept_ids` `[n, K]` in which each of some rows has an id; K for -1 or none.

    >>> columns_of(np.array([[4, 2], [1, 4]]), np.array([0, 1, 1]), np.array([2, 4, 2])).tolist()
    [1, 1, 2]
    """
    width = max(kept_ids.max(initial=0), ids.max(initial=0)) + 2
    keys = (np.arange(len(kept_ids))[:, None] * width + kept_ids + 1).ravel()
    order = np.argsort(keys, kind="stable")
    sought = rows * width + ids + 1
    at = order[np.searchsorted(keys[order], sought).clip(max=len(keys) - 1)]
    return np.where((keys[at] == sought) & (ids >= 0), at % kept_ids.shape[1], kept_ids.shape[1])
