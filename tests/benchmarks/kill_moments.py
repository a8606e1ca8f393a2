"""Commands killed at random moments: what they had acknowledged, and what the next run ends with.

    python tests/benchmarks/kill_moments.py [--moments 100] [--seed 0] [--only NAME] [--json FILE]

Each command runs in a process of its own, forked from one that has imported the packages and
computed nothing. SIGKILL comes at a moment drawn from the time that a whole run takes, or, every
second time, before a drawn change of a file (an open to write, a rename, a deletion), as Python's
audit events tell it. What it left is opened in a copy; then the same command goes on, and one time
in three is killed again. What is killed is in _kill_operations.py
and _kill_exports.py.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from _kill_exports import NAMES, Exports
from _kill_operations import Command, Facts, Operation, done_of
from _setting import TESTS, print_setting

PRELOADED = [
    "matplotlib.pyplot",
    "model2vec",
    "sentence_transformers",
    "conch_dna.cli",
    "conch_dna.generations.evolve",
    "conch_dna.retraining.pipeline",
    "conch_dna.sedimentation.embedders.local",
    "conch_dna.sedimentation.engine",
    "conch_dna.training.true_kd",
]
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link"}
WRITES = os.O_WRONLY | os.O_RDWR
NEVER = sys.maxsize
# What was killed between its last file and saying so is refused the second time; the result tells.
ALREADY = re.compile("has no document .*: nothing was deleted|is there: (name another|add --over)")
LONGEST_S = 120.0


# A process, and its end


def work(commands: Sequence[Command], said: Path, last_change: int, to: Connection) -> None:
    """Run commands until one fails; killed before a change of a file, by its number."""
    sys.dont_write_bytecode = True
    changes = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if event in CHANGES or (event == "open" and (arguments[2] or 0) & WRITES):
            changes += 1
            if changes == last_change:
                os.kill(os.getpid(), signal.SIGKILL)

    from conch_dna.cli import main

    with (
        open(said, "w", encoding="utf-8", buffering=1) as file,
        redirect_stdout(file),
        redirect_stderr(file),
    ):
        to.send("begun")
        sys.addaudithook(count)
        for command in commands:
            try:
                main.main(command, prog_name="conch-dna")
            except SystemExit as ended:
                # 1 says that a gate refused; whether rightly, the result says.
                if ended.code not in (None, 0, 1) and not ALREADY.search(said.read_text("utf-8")):
                    raise
            print("acknowledged", flush=True)
    to.send(changes)


def judged_only(commands: Sequence[Command], said: Path, last_change: int, to: Connection) -> None:
    """The same, killed where a generation is judged and not yet promoted."""
    from conch_dna.generations.line import Line

    Line.promote = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    work(commands, said, last_change, to)


class Ended(NamedTuple):
    """What became of a process."""

    exit_code: int
    seconds: float
    changes: int
    said: str


class Runner:
    """Forks processes; `context` is where they come from."""

    def __init__(self, folder: Path) -> None:
        self.said = folder / "said.txt"
        metal = sys.platform == "darwin"
        self.context = multiprocessing.get_context("spawn" if metal else "forkserver")
        if not metal:
            self.context.set_forkserver_preload(PRELOADED)  # type: ignore[attr-defined]

    def run(
        self,
        commands: Sequence[Command],
        *,
        after_s: float = LONGEST_S,
        before_change: int = NEVER,
        target: Callable[..., None] = work,
    ) -> Ended:
        """Run commands in a process, which is killed at a moment unless it ends before."""
        here, there = self.context.Pipe(duplex=False)
        process = self.context.Process(  # type: ignore[attr-defined]
            target=target, args=(commands, self.said, before_change, there)
        )
        process.start()
        there.close()
        here.recv()
        began = time.monotonic()
        process.join(after_s)
        seconds = time.monotonic() - began
        process.kill()
        process.join()
        changes = here.recv() if process.exitcode == 0 else 0
        here.close()
        return Ended(process.exitcode, seconds, changes, self.said.read_text(encoding="utf-8"))

    def judged(self, commands: Sequence[Command]) -> None:
        """Run a generation until it is judged, and no further."""
        ended = self.run(commands, target=judged_only)
        if ended.exit_code != -signal.SIGKILL:
            sys.exit(f"no child was judged: {ended.said}")

    def whole(self, commands: Sequence[Command]) -> Ended:
        """Run commands to their end, which must be a good one."""
        ended = self.run(commands)
        if ended.exit_code:
            sys.exit(f"ended with {ended.exit_code}: {commands}\n{ended.said}")
        return ended


# Moments


def fresh_folder(base: Path, folder: Path) -> None:
    """What a trial begins with, in place of what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    if base.is_dir():
        shutil.copytree(base, folder)
    else:
        folder.mkdir()


def checked(
    look: Callable[[Path, list[str]], list[str]], folder: Path, runs: list[str]
) -> list[str]:
    """Faults; that something cannot be opened is one."""
    try:
        return look(folder, runs)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is told and counted)
        return [f"not opened: {error!r}"]


def killed_at_moments(
    operation: Operation, runner: Runner, folder: Path, moments: int, draw: random.Random
) -> tuple[Counter[str], list[str]]:
    """Kill so often; gives counts, and a line for each fault."""
    counts: Counter[str] = Counter()
    faults: list[str] = []
    copy = folder.with_name("copy")
    # Twice: the first one compiles kernels and fills caches of the system.
    wholes = []
    for _ in range(2):
        fresh_folder(operation.base, folder)
        ended = runner.whole(operation.commands(folder))
        wholes.append(operation.result(folder))
    wanted = wholes[0]
    if wholes[1] != wanted:
        faults.append("two runs that nobody killed differ")
    counts["whole_ms"], counts["changes"] = round(1000 * ended.seconds), ended.changes
    runs: list[str] = []
    while counts["kills"] < moments:
        if not runs:
            fresh_folder(operation.base, folder)
        commands = operation.commands(folder)[done_of(runs) :]
        by_change = bool(counts["kills"] % 2)
        moment = draw.random()
        if by_change:
            place = f"before change {(change := 1 + int(moment * ended.changes))}"
            killed = runner.run(commands, before_change=change)
        else:
            place = f"after {(after_s := moment * ended.seconds):.3f} s"
            killed = runner.run(commands, after_s=after_s)
        where = f"kill {counts['kills'] + 1}, {place}"
        runs.append(killed.said)
        hit = killed.exit_code == -signal.SIGKILL
        if hit:
            counts["kills"] += 1
            counts["kills_before_a_change"] += by_change
        elif killed.exit_code:
            counts["failed"] += 1
            faults.append(f"{where}: ended with {killed.exit_code}: {killed.said[-300:]!r}")
        else:
            counts["ended_before"] += 1
        fresh_folder(folder, copy)
        if found := checked(operation.lost, copy, runs):
            counts["lost"] += 1
            faults += [f"{where}: {each}" for each in found]
        if hit and counts["kills"] < moments and draw.random() < 1 / 3:
            counts["killed_again"] += 1
            continue
        # None are left where the kill came between the last word and the end of the process.
        last = runner.run(operation.commands(folder)[done_of(runs) :])
        runs.append(last.said)
        if last.exit_code:
            counts["failed"] += 1
            faults.append(f"{where}: resumed ended with {last.exit_code}: {last.said[-300:]!r}")
        elif found := checked(partial(differences_of, operation, wanted), folder, runs):
            counts["different"] += 1
            faults += [f"{where}: {each}" for each in found]
        runs = []
    return counts, faults


def differences_of(operation: Operation, wanted: Facts, folder: Path, runs: list[str]) -> list[str]:
    """What a run that was killed ended with otherwise than one that was not."""
    found = operation.result(folder)
    names = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
    return [f"{name} differs" for name in sorted(names)] + operation.lost(folder, runs)


def main() -> None:
    """Kill, look, go on, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=100, help="of all operations together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=NAMES, nargs="+", default=NAMES, metavar="NAME")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    print_setting(f"Commands killed at {options.moments} moments, seed {options.seed}")
    began = time.monotonic()
    figures: dict[str, Any] = {"seed": options.seed, "operations": {}}
    columns = {
        "kills": "kills",
        "kills_before_a_change": "by change",
        "killed_again": "again",
        "ended_before": "too late",
        "lost": "lost",
        "different": "different",
        "failed": "failed",
        "changes": "changes",
        "whole_ms": "whole, ms",
    }
    print(f"  {'':<12}" + "".join(f"{title:>11}" for title in columns.values()))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve()
        runner = Runner(root)
        operations = Exports(root, runner.whole, runner.judged)
        made = {each: getattr(operations, each)() for each in options.only}
        there = {each: operation for each, operation in made.items() if operation}
        for number, (each, operation) in enumerate(there.items()):
            moments = options.moments // len(there) + (number < options.moments % len(there))
            draw = random.Random(f"{options.seed} {each}")
            folder = root / "trial" / each
            folder.parent.mkdir(exist_ok=True)
            counts, faults = killed_at_moments(operation, runner, folder, moments, draw)
            figures["operations"][each] = {**counts, "faults": faults}
            print(
                f"  {each:<12}" + "".join(f"{counts[column]:>11}" for column in columns), flush=True
            )
            for fault in faults:
                print(f"    {fault}")
        for each in made.keys() - there.keys():
            print(f"  {each:<12}there is no such command")
    figures["seconds"] = round(time.monotonic() - began, 1)
    print(f"  {figures['seconds']} s")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(each["faults"] for each in figures["operations"].values()))


if __name__ == "__main__":
    main()
