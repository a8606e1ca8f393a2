"""Which tokens cover the same text: against sets of boundaries in plain Python."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from conch_dna.training.cross_tokenizer.alignments import Alignment, align_spans
from conch_dna.training.cross_tokenizer.token_bytes import (
    TokenBytes,
    TokenSpans,
    token_bytes,
    token_spans,
)

# How many texts are tried: a few at every commit, all of them by `make test-slow`.
tried = pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=pytest.mark.slow)])
FAMILIES = ("gpt2", "qwen2.5", "smollm2", "phi-3-mini", "tinystories2k")
MODELS = ("babyllama105", "babyllama361", "stories260K")
Chunk = tuple[tuple[int, int], tuple[int, int]]


def spans(*tokens: tuple[int, int] | tuple[int, int, bool]) -> TokenSpans:
    """Tokens as start, end and, where it is not so, whether they are exact."""
    starts, ends, exact = zip(*((*token, True)[:3] for token in tokens), strict=True)
    return TokenSpans(np.array(starts, np.int64), np.array(ends, np.int64), np.array(exact, bool))


def tiles(*lengths: int) -> TokenSpans:
    """Exact tokens, one behind the other."""
    edges = np.cumsum([0, *lengths])
    return TokenSpans(edges[:-1], edges[1:], np.ones(len(lengths), bool))


def chunks(alignment: Alignment) -> list[Chunk]:
    pairs = zip(alignment.teacher.tolist(), alignment.student.tolist(), strict=True)
    return [((a, b), (c, d)) for (a, b), (c, d) in pairs]


def swapped(found: list[Chunk]) -> list[Chunk]:
    return [(student, teacher) for teacher, student in found]


# By hand


def test_chunks_end_where_both_tokenizations_have_a_boundary() -> None:
    """`ab|c|def|g` against `a|bc|d|ef|g`."""
    alignment = align_spans(tiles(2, 1, 3, 1), tiles(1, 2, 1, 2, 1))
    assert chunks(alignment) == [((0, 2), (0, 2)), ((2, 3), (2, 4)), ((3, 4), (4, 5))]
    assert alignment.one_to_one.tolist() == [False, False, True]
    assert len(alignment) == 3
    assert alignment.teacher.dtype == alignment.student.dtype == np.int64


def test_the_same_tokens_are_all_one_to_one() -> None:
    side = tiles(3, 1, 4, 1, 5)
    alignment = align_spans(side, side)
    assert chunks(alignment) == [((i, i + 1), (i, i + 1)) for i in range(5)]
    assert alignment.one_to_one.all()


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (tiles(), tiles()),
        (tiles(2), tiles()),
        (tiles(), tiles(2, 3)),
        (tiles(1, 3), tiles(2, 1)),
        (spans((1, 2)), spans((0, 2))),
    ],
)
def test_without_a_common_boundary_there_is_no_chunk(
    teacher: TokenSpans, student: TokenSpans
) -> None:
    """The last pair ends together but does not begin together."""
    alignment = align_spans(teacher, student)
    assert len(alignment) == 0
    assert alignment.teacher.shape == alignment.student.shape == (0, 2)
    assert alignment.one_to_one.tolist() == []


def test_the_space_in_front_goes_with_the_word_it_stands_before() -> None:
    """`▁|the|▁cat` against `the|▁cat`, and against another that has the space alone too."""
    teacher, student = spans((0, 0), (0, 3), (3, 7)), tiles(3, 4)
    assert chunks(align_spans(teacher, student)) == [((0, 2), (0, 1)), ((2, 3), (1, 2))]
    both = align_spans(teacher, spans((0, 0), (0, 1), (1, 7)))
    assert chunks(both) == [((0, 1), (0, 1)), ((1, 3), (1, 3))]


SPECIAL = (7, 7, False)


@pytest.mark.parametrize("student_has_it", [True, False])
def test_a_special_token_at_the_end_takes_nothing_with_it(student_has_it: bool) -> None:
    teacher = spans((0, 3), (3, 7), SPECIAL)
    student = spans((0, 7), *([SPECIAL] if student_has_it else []))
    assert chunks(align_spans(teacher, student)) == [((0, 2), (0, 1))]
    assert chunks(align_spans(student, teacher)) == [((0, 1), (0, 2))]


def test_a_special_token_takes_only_its_chunk_with_it() -> None:
    """Between the same two tokens on one side only, it belongs to the chunk behind it."""
    teacher = spans((0, 3), (3, 3, False), (3, 7), (7, 9))
    assert chunks(align_spans(teacher, tiles(3, 4, 2))) == [((0, 1), (0, 1)), ((3, 4), (2, 3))]
    both = spans((0, 3), (3, 3, False), (3, 5), (5, 7), (7, 9))
    assert chunks(align_spans(teacher, both)) == [
        ((0, 1), (0, 1)),
        ((2, 3), (2, 4)),
        ((3, 4), (4, 5)),
    ]


@pytest.mark.parametrize(
    "teacher",
    [
        spans((0, 2), (2, 4, False), (4, 6), (6, 8)),
        spans((0, 2), (2, 4), (5, 6), (6, 8)),
        spans((0, 2), (3, 4), (4, 6), (6, 8)),
    ],
)
def test_text_that_is_not_spelled_takes_only_its_chunk_with_it(teacher: TokenSpans) -> None:
    """A token that does not match, a gap within the chunk and one before it."""
    student = tiles(2, 1, 3, 2)
    assert chunks(align_spans(teacher, student)) == [((0, 1), (0, 1)), ((3, 4), (3, 4))]
    assert chunks(align_spans(student, teacher)) == [((0, 1), (0, 1)), ((3, 4), (3, 4))]


# Against plain Python


@st.composite
def one_side(draw: st.DrawFn, size: int) -> tuple[list[tuple[int, int, bool]], bool]:
    """Tokens over a text, some of them not exact or after a gap, and whether all of it is fine."""
    cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=size))})
    tokens = [(start, end, True) for start, end in itertools.pairwise(cuts)]
    space = (0, 0, True)
    if not draw(st.booleans()):
        return ([space] if draw(st.booleans()) else []) + tokens, True
    kept = []
    for start, end, _ in tokens:
        fate = draw(st.sampled_from(["exact"] * 6 + ["wrong", "gone", "empty"]))
        if fate == "empty":
            kept.append((start, start, False))
        if fate != "gone":
            kept.append((start, end, fate != "wrong"))
    return kept, False


def expected_chunks(
    teacher: list[tuple[int, int, bool]], student: list[tuple[int, int, bool]]
) -> list[Chunk]:
    """Every chunk, from the set of ends that both have.

    Tokens without text are told apart by their number among those with the same end.
    """
    ends = []
    for tokens in (teacher, student):
        seen = Counter[int]()
        places = {}
        for place, (_, end, _) in enumerate(tokens):
            places[end, seen[end]] = place + 1
            seen[end] += 1
        ends.append(places)
    common = sorted(ends[0].keys() & ends[1].keys())
    found = []
    before = (0, 0)
    for key in common:
        ranges = tuple((first, places[key]) for first, places in zip(before, ends, strict=True))
        parts = [
            tokens[first:last]
            for tokens, (first, last) in zip((teacher, student), ranges, strict=True)
        ]
        fine = all(
            all(exact for _, _, exact in part)
            and all(left[1] == right[0] for left, right in itertools.pairwise(part))
            for part in parts
        )
        if fine and parts[0][0][0] == parts[1][0][0]:
            found.append((ranges[0], ranges[1]))
        before = (ranges[0][1], ranges[1][1])
    return found


def require_lossless(found: list[Chunk], teacher: TokenSpans, student: TokenSpans) -> None:
    """The boundaries are those of both sets, and the chunks take every token of both sides."""
    teacher_ends, student_ends = teacher.ends.tolist(), student.ends.tolist()
    common = sorted(set(teacher_ends) & set(student_ends))
    assert [teacher_ends[last - 1] for (_, last), _ in found] == common
    assert [student_ends[last - 1] for _, (_, last) in found] == common
    for side, tokens in enumerate((teacher_ends, student_ends)):
        covered = [index for chunk in found for index in range(*chunk[side])]
        # A space that only one side put in front of no text at all has nothing to belong to.
        assert covered == list(range(len(tokens))) or not common


@tried
def test_any_spans_are_cut_where_the_sets_of_boundaries_meet(examples: int) -> None:
    settings(max_examples=examples // 2, deadline=None)(
        given(st.data(), st.integers(0, 12))(require_cuts)
    )()


def require_cuts(data: st.DataObject, size: int) -> None:
    (teacher, first_whole), (student, second_whole) = (data.draw(one_side(size)) for _ in range(2))
    sides = [
        TokenSpans(
            np.array([start for start, _, _ in tokens], np.int64),
            np.array([end for _, end, _ in tokens], np.int64),
            np.array([exact for _, _, exact in tokens], bool),
        )
        for tokens in (teacher, student)
    ]
    alignment = align_spans(*sides)
    found = chunks(alignment)
    assert found == expected_chunks(teacher, student)
    assert alignment.one_to_one.tolist() == [b - a == d - c == 1 for (a, b), (c, d) in found]
    assert chunks(align_spans(sides[1], sides[0])) == swapped(found)
    if first_whole and second_whole:
        require_lossless(found, *sides)


# Real tokenizers


WORDS = st.sampled_from(
    [
        *(" ", "  ", "\n", "\r\n", "\t", "a", "the", " cat", "Once upon a time", " 1234", "don't"),
        *("e\u0301", "é", "\u0301", "\u1100\u1161", "ﬁ", "\u00a0", "👩\u200d👩\u200d👧", "👍🏽"),
        *(
            "日本語",
            "नमस्ते",
            "\U000f0000",
            "\x00",
            "\u2581",
            "<s>",
            "</s>",
            "<|endoftext|>",
            "<|end|>",
        ),
    ]
)
TEXTS = st.one_of(
    st.text(max_size=30),
    st.text("abcdefghij ABC.,!", max_size=30),
    st.lists(st.one_of(WORDS, st.text(max_size=6)), max_size=10).map("".join),
)


class Side:
    """A text's tokens by one tokenizer."""

    def __init__(self, text: bytes, ids: list[int], table: TokenBytes) -> None:
        self.text = text
        self.spans = token_spans(text, ids, table)
        self.edges = [*zip(self.spans.starts.tolist(), self.spans.ends.tolist(), strict=True)]
        self.pieces = [table.pieces[i] for i in ids]
        self.special = [i in table.special_ids for i in ids]
        breaks = [0, *itertools.chain(*self.edges), len(text)]
        self.whole = bool(self.spans.exact.all()) and breaks[::2] == breaks[1::2]

    def covered(self, first: int, last: int) -> bytes:
        """What a range of tokens covers; they must spell it, but for the space in front."""
        covered = self.text[self.edges[first][0] : self.edges[last - 1][1]]
        spelled = b"".join(self.pieces[first:last])
        assert spelled == covered or (spelled == b" " + covered and all(self.special[:first]))
        return covered


def require_pair(teacher: Side, student: Side) -> bool:
    """Check one pair on one text; returns whether both spell it, so that the sets tell all."""
    found = chunks(align_spans(teacher.spans, student.spans))
    before = (0, 0)
    covered = b""
    for ours, theirs in found:
        part = teacher.covered(*ours)
        assert part == student.covered(*theirs)
        assert before[0] <= ours[0] < ours[1] and before[1] <= theirs[0] < theirs[1]
        before = ours[1], theirs[1]
        covered += part
    if teacher.whole and student.whole:
        require_lossless(found, teacher.spans, student.spans)
        assert covered == teacher.text
    return teacher.whole and student.whole


@tried
def test_any_text_is_aligned_between_every_pair(shared_data: Path, examples: int) -> None:
    """Every example is tried on all pairs of a group, and on each tokenizer with itself."""
    groups = {"tokenizers": FAMILIES, "models": MODELS}
    backends: dict[str, Any] = {}
    tables = {}
    for group, names in groups.items():
        for name in names:
            tokenizer = AutoTokenizer.from_pretrained(shared_data / group / name)
            backends[name], tables[name] = tokenizer.backend_tokenizer, token_bytes(tokenizer)
    pairs = [pair for names in groups.values() for pair in itertools.combinations(names, 2)]
    seen, lossless = Counter[tuple[str, str]](), Counter[tuple[str, str]]()

    @settings(max_examples=examples, deadline=None)
    @given(TEXTS)
    def hold(text: str) -> None:
        data = text.encode()
        sides = {
            name: Side(data, backends[name].encode(text, add_special_tokens=False).ids, table)
            for name, table in tables.items()
        }
        for side in sides.values():
            same = chunks(align_spans(side.spans, side.spans))
            exact = np.flatnonzero(side.spans.exact).tolist()
            assert same == [((i, i + 1), (i, i + 1)) for i in exact]
        for pair in pairs:
            lossless[pair] += require_pair(sides[pair[0]], sides[pair[1]])
            seen[pair] += 1

    hold()
    assert set(seen) == set(pairs)
    assert min(seen.values()) >= examples
    assert min(lossless.values()) >= examples // 20
