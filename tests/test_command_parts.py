"""YAML of users: what cannot be settings ends in one line, and soon.

Runs no command; what commands make of their settings is in test_cli.py.
"""

import io
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from conch_dna.__main__ import tell_loading
from conch_dna.errors import ConchError
from conch_dna.options.commands import MOST_YAML, OneLineErrors, OneLineGroup, read_yaml
from conch_dna.screen.presentation import print_tables, text_table

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [*{before}, *{before}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: " + "[" * 5_000, "nested deeper than 64 levels"),
        ("a: " + "[" * 100_000, "nested deeper than 64 levels"),
        ("".join(f"{' ' * level}a:\n" for level in range(400)), "nested deeper than 64 levels"),
        (LAUGHS, r"alias \(\*\)"),
        ("a: &a [*a]", r"alias \(\*\)"),
        ("a: 2026-99-99", "month must be in 1..12"),
        ("a: !!timestamp x", "is not YAML"),
        ("a: !!int ''", "is not YAML"),
        ("a: !!bool perhaps", "is not YAML"),
        ("a: 0x" + "f" * 20_000, "more than 64 bits"),
        ("a: " + "9" * 9_000, "is not YAML"),
        ("a: !!python/object:os.system x", "is not YAML"),
        ("a: " + "x" * MOST_YAML, "more than 1,048,576 bytes"),
        ("a: \x00", "is not YAML"),
    ],
)
def test_yaml_that_cannot_be_settings_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(ConchError, match=reason) as error:
        read_yaml(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert time.process_time() - began < 2


@pytest.mark.parametrize(("columns", "whole"), [(None, True), ("40", False)])
def test_a_table_in_a_pipe_is_as_wide_as_its_words(
    columns: str | None, whole: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    folder = "/".join(["a-folder"] * 20)
    print_tables(text_table("where", ("name", "folder"), [("thinking", folder)]))
    assert (folder in capsys.readouterr().out) == whole


def test_settings_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("rate: 1e-4\nlist: [1, {a: b}]\nname: größe\n", encoding="utf-8")
    assert read_yaml(path) == {"rate": 1e-4, "list": [1, {"a": "b"}], "name": "größe"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("distill --divergence maybe", "'maybe' is not one of 'forward_kl', 'jsd'"),
        ("distill --dmain x", "No such option '--dmain'. (Did you mean one of"),
        ("distill --top-k x", "Invalid value for '--top-k': 'x' is not a valid integer"),
        ("distill --domain", "Option '--domain' requires an argument"),
        ("distill extra --all", "Got unexpected extra argument (extra)"),
        ("vocab a", "Missing argument 'STUDENT'; see conch-dna vocab --help"),
        ("distil", "No such command 'distil'. Did you mean 'distill'?; see conch-dna --help"),
        ("cortex serv", "No such command 'serv'"),
        ("sediment query --mode maybe s q", "'maybe' is not one of 'baseline'"),
        ("generations evolve --lin x", "No such option '--lin'"),
        ("benchmark --methd x", "No such option '--methd'"),
        ("--versio", "No such option '--versio'"),
    ],
)
def test_how_a_command_was_called_wrongly_is_one_line(arguments, told):
    from conch_dna.cli import main

    result = CliRunner().invoke(main, arguments.split(), prog_name="conch-dna")
    assert result.exit_code == 2 and not result.stdout
    assert result.stderr.startswith("error: ") and told in result.stderr
    assert result.stderr.count("\n") == 1


# Ctrl-C


@pytest.mark.parametrize("module", ["conch_dna.cli", "numpy", "conch_dna.training.cli"])
def test_ctrl_c_before_there_is_a_command_is_one_line(module: str) -> None:
    code = f"""
import os, signal, sys

class AtImport:
    def find_spec(self, name, path, target=None):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, AtImport())
from conch_dna.__main__ import run
sys.argv = ["conch-dna", "--help"]
run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ([click.Option(["--resume"], is_flag=True)], "; the same command with --resume goes on"),
        ([], ""),
        ([click.Option(["--at-once"], callback=interrupt)], ""),
    ],
)
def test_ctrl_c_in_a_command_is_one_line(options: list[click.Parameter], more: str) -> None:
    group = OneLineGroup("group")
    group.add_command(OneLineErrors("wait", params=options, callback=lambda **_: interrupt()))
    result = CliRunner().invoke(group, ["wait"])
    assert (result.exit_code, result.stderr) == (130, f"stopped{more}\n")


class Terminal(io.StringIO):
    """Standard error as a terminal has it."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("spoken", "shown"), [(True, "a"), (False, "loading …\n")])
def test_a_terminal_that_hears_nothing_is_told_of_loading_once(monkeypatch, spoken, shown) -> None:
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, Terminal())
    tell_loading(0.05)
    if spoken:
        print("a", end="", file=sys.stderr)
    time.sleep(0.2)
    assert sys.stderr.getvalue() == shown  # type: ignore[attr-defined]
    assert sys.stdout.getvalue() == ""  # type: ignore[attr-defined]


def test_a_pipe_is_told_nothing_of_loading(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    tell_loading(0)
    time.sleep(0.05)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
