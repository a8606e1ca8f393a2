"""docs/protocol.md tells how to repeat what was measured: it names every script that measures."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
SCRIPTS = sorted(
    path.name
    for path in (ROOT / "tests" / "benchmarks").glob("*.py")
    # These belong to the scripts that import them.
    if path.name not in ("_setting.py", "_kill_operations.py", "_kill_exports.py")
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_named(script):
    assert f"tests/benchmarks/{script}" in PROTOCOL


@pytest.mark.parametrize("document", ["README.md", "docs/measurements.md"])
def test_what_measured_a_figure_is_named(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"\b[a-z][a-z_]*\.py\b", text)) & set(SCRIPTS)
    commands = {"conch-dna sediment benchmark"} & set(re.findall(r"conch-dna \w+ \w+", text))
    missing = [each for each in (*named, *commands) if each not in PROTOCOL]
    assert not missing


def test_every_row_of_a_table_of_commands_says_how_long_it_took():
    rows = re.findall(r"^\| (?!figure|name|---).*\|$", PROTOCOL, re.MULTILINE)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert not [row for row in cells if not all(row)]
