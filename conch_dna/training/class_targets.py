"""A teacher's targets as classes of tokens: what two vocabularies can say about the same text.

Knows aligned examples and the teacher's cached targets; nothing of weights or batches' layout.
It is what the alignment "roots" stands on; another way to resolve a class would be a method here.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from conch_dna.language_model import ModelSource
from conch_dna.training.aligned_records import AlignedExample
from conch_dna.training.batches import round_up
from conch_dna.training.soft_targets import TargetIdentity
from conch_dna.training.token_boundaries import TokenBoundaries
from conch_dna.training.token_bytes import TokenBytes
from conch_dna.training.token_insides import TokenInsides
from conch_dna.training.vocabulary import common_roots

LEAST_POSSIBLE = 0.5
MOST_UNKNOWN = 0.1
NEGLIGIBLE = 1e-3
MOST_BEGINNERS = 512
INNER_MULTIPLE = 64
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


def _by_row(
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

    def kept(
        self, stored: Stored, rows: np.ndarray, temperature: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `kept_and_rest`."""
        return kept_and_rest(stored, rows, self.identity, temperature)

    @cached_property
    def _boundaries(self) -> tuple[TokenBoundaries, TokenBoundaries]:
        classes = len(self.tables[1].pieces)
        models = (self.teacher, self.student)
        first, second = (
            TokenBoundaries(model.tokenizer, table, roots, classes)
            for model, table, roots in zip(models, self.tables, self.roots, strict=True)
        )
        return first, second

    def possible(
        self, examples: Sequence[AlignedExample], ids: np.ndarray, log_probs: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Condition the teacher on what the student's boundary says and its own does not.

        A teacher with other tokens does not know that the student's last token ended where it
        did; what can therefore not follow is taken from its distribution, and the rest scaled up.

        Returns:
            Log-probabilities `[n, K + 1]`, and for each row whether at least half of the
            teacher's probability was possible: less says that the boundary is the news.
        """
        before_teacher, before_student = (
            np.concatenate(parts).astype(np.int64)
            for parts in zip(
                *(
                    (e.teacher.ids[e.chunks.teacher[:, 0] - 1], e.ids[e.chunks.student[:, 0] - 1])
                    for e in examples
                ),
                strict=True,
            )
        )
        teacher, student = self._boundaries
        asked = (ids >= 0) & (log_probs[:, :-1] > np.log(NEGLIGIBLE))
        row, column = np.nonzero(asked)
        ruled_out = ~student.possible(before_student[row], ids[row, column])
        row, column = row[ruled_out], column[ruled_out]
        news = teacher.possible(before_teacher[row], ids[row, column])
        impossible = np.zeros(log_probs.shape, bool)
        impossible[row[news], column[news]] = True
        log_probs = np.where(impossible, -np.inf, log_probs)
        mass = np.logaddexp.reduce(log_probs, axis=1, keepdims=True)
        told = mass[:, 0] >= np.log(LEAST_POSSIBLE)
        # A row that is not told keeps finite numbers; its weight is 0.
        return np.where(told[:, None], log_probs - mass, log_probs), told

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
        temperature: float,
    ) -> tuple[np.ndarray, ...]:
        """What the teacher said about the inside of its tokens, where the student has several.

        Of the tokens that begin with what the student has read so far, each gives its
        probability to the class of what comes next in it; the token that ends there to the rest.
        Where what was not kept could be more than a tenth of that, nothing is told.

        Returns:
            Rows of the student, and for each what `_soft` and `_possible` give.
        """
        own_rows, teacher_rows, read, own = self._inner(examples, of_teacher=True)
        kept_ids, kept, unknown = self.kept(stored, teacher_rows, temperature)
        following, ended = self._insides[0].behind(read, own, kept_ids)
        roots = np.where(following >= 0, self.roots[1][following], -1)
        said = (following >= 0) | ended
        log_probs = np.where(said, kept, -np.inf)
        mass = np.logaddexp.reduce(log_probs, axis=1, keepdims=True)
        told = unknown <= mass[:, 0] + np.log(MOST_UNKNOWN)
        log_probs = np.where(told[:, None], log_probs - np.where(told[:, None], mass, 0), -np.inf)
        ids, log_probs, rest = merged(roots, log_probs, np.full(len(kept), -np.inf, np.float32))
        best = np.full(len(ids), -1)
        return own_rows, ids, np.concatenate([log_probs, rest[:, None]], axis=1), best, told

    def within(
        self, examples: Sequence[AlignedExample], stored: Stored, temperature: float, rows: int
    ) -> dict[str, np.ndarray]:
        """What the teacher says inside the student's tokens, at the boundaries of its own.

        The student's tokens of the same class that begin with what the teacher has read so far
        say what comes next as well: each for the class of what follows in it, the one that ends
        there, and what the teacher did not keep, for the rest. Where none is for the rest, the
        teacher's rest is news and left out.

        Returns:
            For each row, the outcomes of all places in its token beside each other:
            `inner_log_probs` float32 `[N, S]`, -inf where there is none; `inner_tokens` int32
            `[N, E]`, the tokens that count for one, `inner_outcomes` and `inner_places` `[N, E]`
            of each (S and J where there is none), `outcome_places` `[N, S]`, and `inner_told`
            float32 `[N]`, 1 where every place is told. J is the last axis of `inner_blank`
            `[N, J]`, which is 0.
        """
        own_rows, teacher_rows, read, own = self._inner(examples, of_teacher=False)
        kept_ids, kept, rest = self.kept(stored, teacher_rows, temperature)
        ids, kept, rest = merged(self.roots[0][kept_ids], kept, rest)
        found = [self._members(*pair) for pair in zip(own.tolist(), read.tolist(), strict=True)]
        count = np.array([len(tokens) for tokens, _, _ in found], np.int64)
        place = np.repeat(np.arange(len(found)), count)
        tokens = np.concatenate([np.zeros(0, np.int64), *(tokens for tokens, _, _ in found)])
        classes = np.concatenate([np.zeros(0, np.int64), *(classes for _, classes, _ in found)])
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
        clear = np.array([clear for _, _, clear in found], bool)
        settled = (told | (count == 1)) & clear
        with np.errstate(divide="ignore", invalid="ignore"):
            log_probs = np.log(probability / total[outcome_place])
        return _by_row(
            rows,
            own_rows,
            (np.where(told[place], tokens, -1), place, outcome),
            (np.where(told[outcome_place], log_probs, -np.inf), outcome_place),
            settled,
            nothing=self.student.token_count,
        )

    @cached_property
    def _known(self) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray, bool]]:
        return {}

    def _members(self, own: int, read: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Tokens of a token's class that begin with its first bytes, and what class follows.

        -1 follows in the token that ends there, and for a class that can begin behind that token
        as well, so that hearing it says nothing of whether the token ended. None where there are
        more than 512.

        Returns:
            Both, and whether every class says that the token did not end.
        """
        if (own, read) not in self._known:
            insides = self._insides[1]
            tokens = insides.beginning(own, read)
            tokens = tokens[self.roots[1][tokens] == self.roots[1][own]]
            following = insides.following[tokens, read] if len(tokens) else tokens
            ended = insides.lengths[tokens] == read
            follows = (following >= 0) & ~ended
            classes = np.where(follows, self.roots[0][following], -1)
            possible = ended | (classes >= 0)
            if possible.sum() > MOST_BEGINNERS:
                possible[:] = False
            clear = True
            for end in tokens[ended & possible]:
                follow = np.flatnonzero(classes >= 0)
                joint = follow[self._boundaries[1].possible(end + 0 * follow, classes[follow])]
                classes[joint] = -1
                clear = not len(joint)
            self._known[own, read] = tokens[possible], classes[possible], clear
        return self._known[own, read]

    def _inner(
        self, examples: Sequence[AlignedExample], *, of_teacher: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The places inside single tokens of one side, at boundaries of the other.

        Of the student's tokens the place behind them too, since not ending there was possible.

        Returns:
            Of each place the student's row, the teacher's row, the bytes of the token before
            it, and the token.
        """
        teacher_lengths, student_lengths = (
            np.fromiter(map(len, table.texts), np.int64) for table in self.tables
        )
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
            first, count = split[1][single, 0], np.diff(split[1])[single, 0] - of_teacher
            step = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + 1
            at = np.repeat(first, count) + step
            token = np.repeat(whole[1][single, 0], count)
            # The place behind a token may be no place of its text any more.
            here = np.append(split[0].counted, False)[np.minimum(at, len(split[0].ids))]
            step, at, token = step[here], at[here], token[here]
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
