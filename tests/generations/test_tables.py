"""The pictures of a line and of what taught a generation say what they are there for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conch_dna.generations.tables import Node, draw_learning, draw_line

GATES = (("recall", True), ("generalize", True))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that were saved."""
    from matplotlib.figure import Figure

    saved: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: saved.append(self))
    return saved


def test_a_line_shows_dates_gates_and_what_was_refused(drawn: list[Any]) -> None:
    nodes = [
        Node(name="G000", parent=None, created="2026-11-01T09:08:07+00:00", note=""),
        Node(
            name="G001",
            parent="G000",
            created="2026-11-02T09:08:07+00:00",
            note="generalize +0.031",
            gates=GATES,
        ),
        Node(
            name="FAILED-G002-0123",
            parent="G001",
            created="2026-11-03T09:08:07+00:00",
            note="refused by recall",
            gates=(("recall", False), ("generalize", True)),
        ),
    ]
    draw_line(Path("line.png"), title="tales", nodes=nodes, head="G001")
    (axes,) = drawn[0].axes
    texts = [text.get_text() for text in axes.texts]
    assert texts == [
        "G000  2026-11-01 09:08",
        "the first: not judged",
        "G001  ← HEAD  2026-11-02 09:08",
        "✓ recall   ✓ generalize   generalize +0.031",
        "FAILED-G002  2026-11-03 09:08",
        "✗ recall   ✓ generalize",
    ]
    drawn[0].canvas.draw()
    for text in axes.texts:
        assert drawn[0].bbox.x1 > text.get_window_extent().x1, "no text is cut off"


def history(two: bool) -> list[dict[str, Any]]:
    counts = {"tokens": 10, "blended": 9, "t1_only": 0, "gold_fallback": 1, "skipped": 0}
    shares = {"js": 1.0 if two else 0.0, "first_weight": 5.0 if two else 10.0}
    losses = {"loss": 1.0, "kd": 0.1, "hard": 2.0}
    return [{"split": "train", "step": s, **losses, **counts, **shares} for s in (1, 2, 3)]


@pytest.mark.parametrize("teachers", [1, 2])
def test_what_two_teachers_share_is_drawn_for_two_only(teachers: int, drawn: list[Any]) -> None:
    rows = history(teachers == 2)
    draw_learning(Path("a.png"), history=rows, title="a", best=2, teachers=teachers)
    panels = drawn[0].axes
    assert len(panels) == 3 + teachers
    assert [axes.get_title() for axes in panels[:3]] == [
        "combined",
        "KD (t² KL)",
        "the text's part",
    ]
    legend = [text.get_text() for text in panels[3].get_legend().get_texts()]
    assert legend == ["the teacher" if teachers == 1 else "both teachers", "the text"]
    drawn[0].canvas.draw()
    for axes in panels[3:]:
        assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())
