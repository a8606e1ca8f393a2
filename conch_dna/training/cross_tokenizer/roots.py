"""A teacher's targets as classes of tokens: what two vocabularies can say about the same text.

Knows aligned examples and the teacher's cached targets; nothing of weights or batches' layout.
It is what the alignment "roots" stands on; another way to resolve a class would be a method here.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from conch_dna.language_model import ModelSource
from conch_dna.training.batches import round_up
from conch_dna.training.cross_tokenizer.outcome_rows import (
    INNER_MULTIPLE,
    Stored,
    by_row,
    columns_of,
    kept_and_rest,
    merged,
    token_before,
    trimmed,
)
from conch_dna.training.cross_tokenizer.records import AlignedExample
from conch_dna.training.cross_tokenizer.token_bytes import TokenBytes
from conch_dna.training.cross_tokenizer.token_insides import TokenInsides
from conch_dna.training.cross_tokenizer.vocabulary import common_roots, shared_tokens
from conch_dna.training.soft_targets import TargetIdentity

LEAST_POSSIBLE = 0.5
MOST_UNKNOWN = 0.1
MOST_BEGINNERS = 512

NO_MEMBERS = np.zeros(0, np.int64), np.zeros(0, np.int64)


class ClassTargets:
    """The teacher's targets of a batch in classes of tokens; see `vocabulary.common_roots`.

    Args:
        teacher: For its tokenizer.
        student: Likewise.
        tables: The bytes of their tokens.
        identity: Of the teacher's cache.
    """

    def __init__(
        self,
        teacher: ModelSource,
        student: ModelSource,
        tables: tuple[TokenBytes, TokenBytes],
        identity: TargetIdentity,
    ) -> None:
        self.teacher = teacher
        self.student = student
        self.tables = tables
        self.identity = identity

    @cached_property
    def roots(self) -> tuple[np.ndarray, np.ndarray]:
        """The class of each of the teacher's tokens and of each of the student's."""
        return common_roots(self.teacher.tokenizer, self.student.tokenizer)

    def _kept(self, stored: Stored, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `kept_and_rest`; a temperature acts on tokens, so classes have none but 1."""
        return kept_and_rest(stored, rows, self.identity, 1.0)

    @cached_property
    def _shared(self) -> np.ndarray:
        """The student's id of each of the teacher's tokens that both have, or -1."""
        return shared_tokens(*self.tables)

    @cached_property
    def _both(self) -> np.ndarray:
        """Whether the teacher has each of the student's tokens."""
        has = np.zeros(len(self.tables[1].pieces), bool)
        has[self._shared[self._shared >= 0]] = True
        return has

    def same_before(
        self, examples: Sequence[AlignedExample], rows: np.ndarray, own_rows: np.ndarray
    ) -> np.ndarray:
        """Whether both read the same token before a boundary that both have.

        What a longer token that both have would have said there both said a token earlier.

        Args:
            examples: Of the batch.
            rows: Of the teacher, `[n]`.
            own_rows: Of the student, `[n]`.
        """
        first = token_before([example.teacher for example in examples])[rows]
        second = token_before(examples)[own_rows]
        return (first >= 0) & (second >= 0) & (self._shared[first] == second)

    def at_boundaries(
        self,
        examples: Sequence[AlignedExample],
        stored: Stored,
        rows: np.ndarray,
        same: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the teacher says comes next, at boundaries of its own, in classes.

        A teacher that reads `th` says little of an e, if it has a token `the`: it would have said
        so a token earlier. So what it says at the boundary counts as far as it had ended its
        token there, and beside it the longer tokens that begin with that one, each for the class
        of what follows in it. Where the token before was not cached, none reaches over.

        Args:
            examples: Of the batch.
            stored: What the cache holds of each.
            rows: Counted over the teacher's counted tokens of all of them, `[n]`.
            same: See `same_before`, `[n]`: where it is so, tokens that both have do not count.

        Returns:
            Ids of classes `[n, K]`, each once in its row and -1 elsewhere, and log-probabilities
            `[n, K + 1]`, the rest last.
        """
        kept_ids, kept, rest = self._kept(stored, rows)
        own = token_before([example.teacher for example in examples])[rows]
        told = np.concatenate([part["gold_log_prob"] for part in stored]).astype(np.float32)
        before = np.maximum(rows - 1, 0)
        over_ids, over, _ = self._kept(stored, before)
        insides = self._insides[0]
        following, goes_on, _ = insides.behind(insides.lengths[own], own, over_ids)
        counts = goes_on & (own >= 0)[:, None]
        if same is not None:
            counts &= ~(same[:, None] & (self._shared[over_ids] >= 0))
        over = np.where(counts, over, -np.inf)
        ended = np.where(own >= 0, told[before], 0)
        total = np.logaddexp(ended, np.logaddexp.reduce(over, axis=1))
        classes = np.where(following >= 0, self.roots[1][following], -1)
        ids, log_probs, rest = merged(
            np.concatenate([self.roots[0][kept_ids], classes], axis=1),
            np.concatenate([kept + (ended - total)[:, None], over - total[:, None]], axis=1),
            rest + ended - total,
        )
        return trimmed(ids, np.concatenate([log_probs, rest[:, None]], axis=1))

    @cached_property
    def _insides(self) -> tuple[TokenInsides, TokenInsides]:
        """Of the teacher's tokens for the student, and of the student's for the teacher."""
        teacher, student = self.tables
        return (
            TokenInsides(teacher, student, self.student.tokenizer),
            TokenInsides(student, teacher, self.teacher.tokenizer),
        )

    def inside(
        self,
        examples: Sequence[AlignedExample],
        stored: Stored,
    ) -> tuple[np.ndarray, ...]:
        """What the teacher said about the inside of its tokens, where the student has several.

        Of the tokens that begin with what the student has read so far, each gives its
        probability to the class of what comes next in it; the token that ends there to the rest.
        Where what was not kept could be more than a tenth of that, nothing is told.

        Returns:
            Rows of the student `[n]`; for each what `at_boundaries` gives; and whether it is told.
        """
        own_rows, teacher_rows, read, own = self._inner(examples, of_teacher=True)
        kept_ids, kept, unknown = self._kept(stored, teacher_rows)
        following, _, ended = self._insides[0].behind(read, own, kept_ids)
        roots = np.where(following >= 0, self.roots[1][following], -1)
        said = (following >= 0) | ended
        log_probs = np.where(said, kept, -np.inf)
        mass = np.logaddexp.reduce(log_probs, axis=1, keepdims=True)
        told = unknown <= mass[:, 0] + np.log(MOST_UNKNOWN)
        log_probs = np.where(told[:, None], log_probs - np.where(told[:, None], mass, 0), -np.inf)
        ids, log_probs, rest = merged(roots, log_probs, np.full(len(kept), -np.inf, np.float32))
        return own_rows, *trimmed(ids, np.concatenate([log_probs, rest[:, None]], axis=1)), told

    def within(
        self, examples: Sequence[AlignedExample], stored: Stored, rows: int
    ) -> dict[str, np.ndarray]:
        """What the teacher says inside the student's tokens, at the boundaries of its own.

        The student's tokens of the same class that begin with what the teacher has read so far
        say what comes next as well: each for the class of what follows in it; the one that ends
        there, those with no boundary of the teacher's there, and what the teacher did not keep,
        for the rest. Where none is for the rest, the teacher's rest is news and left out.

        Returns:
            For each row, the outcomes of all places in its token beside each other:
            `inner_log_probs` float32 `[N, S]`, -inf where there is none; `inner_tokens` int32
            `[N, E]`, the tokens that count for one, `inner_outcomes` and `inner_places` `[N, E]`
            of each (S and J where there is none), `outcome_places` `[N, S]`, and `inner_told`
            float32 `[N]`, 1 where every place is told. J is the last axis of `inner_blank`
            `[N, J]`, which is 0.
        """
        own_rows, teacher_rows, read, own = self._inner(examples, of_teacher=False)
        ids, kept = self.at_boundaries(examples, stored, teacher_rows)
        kept = kept[:, :-1]
        found = [self._inner_members(*x) for x in zip(own.tolist(), read.tolist(), strict=True)]
        count = np.array([len(tokens) for tokens, _ in found], np.int64)
        place = np.repeat(np.arange(len(found)), count)
        tokens = np.concatenate([np.zeros(0, np.int64), *(tokens for tokens, _ in found)])
        classes = np.concatenate([np.zeros(0, np.int64), *(classes for _, classes in found)])
        # Outcomes of a place: its classes that were kept, and -1, the rest.
        width = len(self.tables[1].pieces) + 1
        keys = np.arange(len(ids))[:, None] * width + ids + 1
        order = np.argsort(keys, axis=None)
        wanted = place * width + classes + 1
        at = np.searchsorted(keys.ravel()[order], wanted).clip(max=max(0, keys.size - 1))
        known = (classes >= 0) & (keys.ravel()[order][at] == wanted) if keys.size else classes > 0
        outcome_keys, outcome = np.unique(
            np.where(known, wanted, place * width), return_inverse=True
        )
        outcome_place, outcome_class = outcome_keys // width, outcome_keys % width - 1
        if keys.size:
            at = np.searchsorted(keys.ravel()[order], outcome_keys).clip(max=keys.size - 1)
            probability = np.exp(kept.ravel()[order][at].astype(np.float64))
        else:
            probability = np.zeros(len(outcome_keys))
        probability[outcome_class < 0] = 0
        reached = np.bincount(outcome_place, probability, minlength=len(found))
        is_rest = outcome_class < 0
        probability[is_rest] = np.maximum(0, 1 - reached[outcome_place[is_rest]])
        total = np.bincount(outcome_place, probability, minlength=len(found))
        outcomes = np.bincount(outcome_place, minlength=len(found))
        told = (total >= LEAST_POSSIBLE) & (outcomes > 1)
        settled = told | (count == 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            log_probs = np.log(probability / total[outcome_place])
        return by_row(
            rows,
            own_rows,
            (np.where(told[place], tokens, -1), place, outcome),
            (np.where(told[outcome_place], log_probs, -np.inf), outcome_place),
            settled,
            nothing=self.student.token_count,
        )

    def reaching(
        self,
        examples: Sequence[AlignedExample],
        arrays: dict[str, np.ndarray],
        same: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """The student's tokens that reach over each of its boundaries; see `with_reaching`.

        Args:
            examples: Of the batch.
            arrays: Of the batch, with what `within` gives.
            same: See `same_before`; for every row of the student, `[N]`.

        Returns:
            `over_own` int32 `[N]`, the token that ended at the boundary; `over_tokens` int32
            `[N, E]`, the longer ones that begin with it; `over_columns` int32 `[N, E]`, the
            outcome of what follows in each, a column of `kept_ids` or K for the rest (the
            student's number of tokens stands for no token). And anew: `soft_weights`, 0 at
            boundaries that more than 512 tokens reach over, and `inner_told`, 0 where no
            boundary tells whether the token ends.
        """
        kept_ids, told, inner_told = (
            arrays[name].copy() for name in ("kept_ids", "soft_weights", "inner_told")
        )
        rows, kept = kept_ids.shape
        nothing = self.student.token_count
        own = np.full(rows, -1)
        before = token_before(examples)
        own[: len(before)] = before
        lengths = self._insides[1].lengths
        found = [
            self._over(token, int(lengths[token]), known) if token >= 0 else NO_MEMBERS
            for token, known in zip(own.tolist(), same.tolist(), strict=True)
        ]
        count = np.array([len(tokens) for tokens, _ in found])
        told[count > MOST_BEGINNERS] = 0
        # The end of a token is told at the row behind it, or there is nothing else it could be.
        behind = np.flatnonzero(own >= 0)
        ends = np.zeros(rows, bool)
        ends[behind - 1] = (told[behind] > 0) | (count[behind] <= 1)
        inner_told[~ends] = 0
        count[(told == 0) | (count > MOST_BEGINNERS)] = 0
        row = np.repeat(np.arange(rows), count)
        chosen = [part for part, wanted in zip(found, count, strict=True) if wanted]
        tokens = np.concatenate([np.zeros(0, np.int64), *(tokens for tokens, _ in chosen)])
        classes = np.concatenate([np.zeros(0, np.int64), *(classes for _, classes in chosen)])
        column = columns_of(kept_ids, row, np.where(classes >= 0, classes, nothing), nothing)
        longer = tokens != own[row]
        row, tokens, column = row[longer], tokens[longer], column[longer]
        number = np.arange(len(row)) - np.searchsorted(row, row)
        size = round_up(int(number.max(initial=0)) + 1, INNER_MULTIPLE)
        over = {
            "over_own": np.where(np.isin(np.arange(rows), row), own, nothing).astype(np.int32),
            "over_tokens": np.full((rows, size), nothing, np.int32),
            "over_columns": np.full((rows, size), kept, np.int32),
        }
        over["over_tokens"][row, number] = tokens
        over["over_columns"][row, number] = column
        return {**over, "soft_weights": told, "inner_told": inner_told}

    @cached_property
    def _known(self) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
        return {}

    def _members(self, own: int, read: int) -> tuple[np.ndarray, np.ndarray]:
        """The student's tokens that begin with a token's first bytes, and what class follows.

        -1 follows in the token that ends there, and where the teacher has no boundary there.
        """
        if (own, read) not in self._known:
            insides = self._insides[1]
            tokens = insides.beginning(own, read)
            following = insides.following[tokens, read] if len(tokens) else tokens
            classes = np.where(following >= 0, self.roots[0][following], -1)
            self._known[own, read] = tokens, classes
        return self._known[own, read]

    def _over(self, own: int, read: int, same: bool) -> tuple[np.ndarray, np.ndarray]:
        """A token and those that reach over it, those only that the teacher does not have."""
        tokens, classes = self._members(own, read)
        if same:
            counts = ~self._both[tokens] | (tokens == own)
            tokens, classes = tokens[counts], classes[counts]
        return tokens, classes

    def _inner_members(self, own: int, read: int) -> tuple[np.ndarray, np.ndarray]:
        """Those of the token's own class; none where there are more than 512."""
        tokens, classes = self._members(own, read)
        same = self.roots[1][tokens] == self.roots[1][own]
        return (tokens[same], classes[same]) if same.sum() <= MOST_BEGINNERS else NO_MEMBERS

    def _inner(
        self, examples: Sequence[AlignedExample], *, of_teacher: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The places inside single tokens of one side, at boundaries of the other.

        Returns:
            Of each place the student's row, the teacher's row, the bytes of the token before
            it, and the token.
        """
        teacher_lengths, student_lengths = (insides.lengths for insides in self._insides)
        parts: list[tuple[np.ndarray, ...]] = []
        offsets = [0, 0]
        for example in examples:
            whole = (example.teacher, example.chunks.teacher)
            split = (example, example.chunks.student)
            lengths = (teacher_lengths, student_lengths)
            if not of_teacher:
                whole, split, lengths = split, whole, lengths[::-1]
            before = np.concatenate([[0], np.cumsum(lengths[1][split[0].ids])])
            # A space that only one side puts in front would shift all places by one.
            same = lengths[0][whole[0].ids[whole[1][:, 0]]] == np.diff(before[split[1]])[:, 0]
            single = (np.diff(whole[1])[:, 0] == 1) & same
            first, count = split[1][single, 0], np.diff(split[1])[single, 0] - 1
            step = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + 1
            at = np.repeat(first, count) + step
            token = np.repeat(whole[1][single, 0], count)
            own, other = (token, at) if of_teacher else (at, token)
            parts.append(
                (
                    (np.cumsum(example.counted) - 1 + offsets[1])[other],
                    (np.cumsum(example.teacher.counted) - 1 + offsets[0])[own],
                    before[at] - before[at - step],
                    whole[0].ids[token].astype(np.int64),
                )
            )
            offsets = [offsets[0] + example.teacher.count, offsets[1] + example.count]
        rows, teacher_rows, read, tokens = (np.concatenate(p) for p in zip(*parts, strict=True))
        return rows, teacher_rows, read, tokens
