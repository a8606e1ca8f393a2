"""What is killed: commands by operation, what of them must be left, and what they end with.

Knows stores, lines and folders of adapters; nothing of processes and moments. To add an operation:
a method of Operations, and its name in NAMES.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _setting  # noqa: F401  (puts the tests' helpers on the path)

from conch_dna.checkpoints import content_digest, file_digest, verify_folder
from conch_dna.errors import ConchError
from topic_models import documents, write_models

STEPS, SAVES = 8, 2
DOMAIN = "tales"
MANIFEST = f"""
stabilizers: {{ema_decay: 0.9, replay_share: 0.2}}
evaluation: {{answers: 3}}
training_params: {{num_iters: {STEPS}, steps_per_save: {SAVES}, steps_per_eval: 4, batch_size: 4,
  lora_keys: all, lora_rank: 4, max_tokens: 8, val_fraction: 0.25,
  learning_rate: 3e-3}}
gates: {{generalize_gain: -1.0, recall_margin: 1.0, max_tone_drift: 1.0}}
"""

Command = list[str]
Facts = dict[str, str]


class Operation(NamedTuple):
    """Commands of one process, and what is to be seen of them.

    Attributes:
        base: The folder that each trial begins with a copy of, or none.
        commands: Of a trial's folder; those that said they are done are not given again.
        lost: Faults of what was left, from a copy of its folder and what each process said.
        result: What a whole run ends with, by name; the same for every run.
    """

    base: Path
    commands: Callable[[Path], list[Command]]
    lost: Callable[[Path, list[str]], list[str]]
    result: Callable[[Path], Facts]


def done_of(runs: Sequence[str]) -> int:
    """How many commands said that they are done."""
    return sum(run.splitlines().count("acknowledged") for run in runs)


# What is left


def files(folder: Path, *patterns: str) -> Facts:
    """Digests of files, by their place."""
    return {
        str(path.relative_to(folder)): file_digest(path)
        for pattern in patterns
        for path in sorted(folder.glob(pattern))
    }


def not_whole(folders: Sequence[Path]) -> list[str]:
    """Folders that are not as they were written."""
    faults = []
    for folder in folders:
        try:
            verify_folder(folder)
        except ConchError as error:
            faults.append(repr(error))
    return faults


def gone_back(runs: Sequence[str]) -> list[str]:
    """Runs that repeat steps of which a checkpoint was kept: one stands before the next step."""
    faults, kept = [], 0
    for run in runs:
        steps = [int(step) for step in re.findall(r"^step (\d+): loss", run, re.MULTILINE)]
        if steps and steps[0] <= kept:
            faults.append(f"step {kept} was kept, and the next process began with {steps[0]}")
        kept = max([kept, *((step - 1) // SAVES * SAVES for step in steps)])
    return faults


def distilled(folder: Path) -> Facts:
    """What a distillation ends with, but for times."""
    return files(
        folder / "adapters" / DOMAIN,
        "adapters_kd/adapters.safetensors",
        "adapters_kd/evaluation.json",
        "adapters_kd/heldout.jsonl",
        "checkpoint_*/*.safetensors",
        "answers/*",
        "soft_targets/*/*",
        "adapters_kd/training_data.jsonl",
        ".writing-*",
    )


def distilled_so_far(folder: Path, runs: list[str]) -> list[str]:
    """Checkpoints that are not whole or not there; an adapter that was named and is not."""
    domain = folder / "adapters" / DOMAIN
    kept = sorted(domain.glob("checkpoint_*"))
    faults = not_whole(kept) + gone_back(runs)
    steps = [int(s) for run in runs for s in re.findall(r"^step (\d+): loss", run, re.MULTILINE)]
    newest = max((int(path.name.rsplit("_")[-1]) for path in kept), default=0)
    if steps and newest < (wanted := (max(steps) - 1) // SAVES * SAVES):
        faults.append(f"checkpoint {wanted} is not there: the newest is {newest}")
    if done_of(runs):
        faults += not_whole([domain / "adapters_kd"])
    return faults


def of_line(root: Path, name: str) -> Facts:
    """Generations, what HEAD names and what the log says, but for times."""
    from conch_dna.generations.line import Line

    line = Line(root, name)
    names = ("adapters.safetensors", "samples.json", "*.jsonl")
    left = (".writing-*", "work-*/*", "CANDIDATE-*")
    log = [[entry.event, entry.folder, entry.head] for entry in line.log()]
    return {
        "head": line.head,
        "log": json.dumps(log),
        "problems": json.dumps(line.problems()),
        **files(line.folder, *(f"G*/{each}" for each in names), *left),
    }


def line_so_far(root: Path, name: str, commands: int, runs: list[str]) -> list[str]:
    """Generations that are not whole, and a HEAD that is not the acknowledged one."""
    from conch_dna.generations.line import Line

    line = Line(root, name)
    faults = not_whole([line.path(each) for each in line.generations()]) + gone_back(runs)
    if done_of(runs) == commands and line.head != "G001":
        faults.append(f"G001 was acknowledged, and HEAD names {line.head}")
    return faults


class Store:
    """A folder's store, opened as every command opens it."""

    def __init__(self, student: str) -> None:
        self.student = student

    def facts(self, folder: Path) -> Facts:
        """Documents and vectors of the store, its active adapter, and an answer."""
        from conch_dna.sedimentation.engine import AntigravityEngine
        from conch_dna.sedimentation.stores.contract import RAW

        facts: Facts = {}
        with AntigravityEngine(folder / "db", self.student) as engine:
            active = engine.versions.active
            for name, version in (("raw", RAW), ("active", active)):
                rows = sorted(
                    (str(id_), vector.tobytes(), json.dumps(payload, sort_keys=True))
                    for page in engine.store.pages(version)
                    for id_, vector, payload in zip(
                        page.ids, page.vectors, page.payloads, strict=True
                    )
                )
                facts[f"{name} ids"] = " ".join(row[0] for row in rows)
                facts[f"{name} vectors"] = content_digest(*(row[1] for row in rows))
                facts[f"{name} payloads"] = content_digest(*(row[2] for row in rows))
            facts["adapter"] = engine.versions.adapter(active).digest
            facts["learned"] = str(active != RAW)
            if rows:
                facts["answer"] = json.dumps(engine.run_inference(documents(1)[0]["title"]).ids)
        return facts

    def so_far(
        self, folder: Path, *, there: set[str], gone: set[str], may_be: set[str], learned: bool
    ) -> list[str]:
        """Faults of a store that must hold some documents, and may hold others.

        Args:
            folder: Where it is.
            there: Ids that must be there.
            gone: Ids that must not.
            may_be: Other ids.
            learned: Whether a version was acknowledged as active.
        """
        facts = self.facts(folder)
        faults = []
        for name in ("raw", "active"):
            ids = set(facts[f"{name} ids"].split())
            if missing := there - ids:
                faults.append(f"{name}: {len(missing)} acknowledged documents are not there")
            if back := ids & gone:
                faults.append(f"{name}: {len(back)} deleted documents are there")
            if odd := ids - there - gone - may_be:
                faults.append(f"{name}: {sorted(odd)} were never given")
        if facts["raw ids"] != facts["active ids"]:
            faults.append("the active version has other documents than the raw one")
        if learned and facts["learned"] != "True":
            faults.append("the acknowledged version is not active")
        return faults


# Operations


def rows(path: Path, records: Sequence[dict[str, Any]]) -> str:
    """Write JSONL; gives its name."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def tales(word: str, count: int = 16) -> list[dict[str, Any]]:
    """Prompts and completions."""
    return [
        {"prompt": f"Once upon a time {n}", "completion": f" there were {n} {word}s."}
        for n in range(count)
    ]


class Operations:
    """Every operation by its name; what they begin with is made when one is asked for.

    Args:
        folder: Of everything they need.
        whole: Runs commands to their end.
        judged: Runs a generation until it is judged, and no further.
    """

    def __init__(
        self,
        folder: Path,
        whole: Callable[[list[Command]], object],
        judged: Callable[[list[Command]], object],
    ) -> None:
        self.folder = folder
        self.whole = whole
        self.judged = judged
        self.models = write_models(folder / "models")
        self.store = Store(self.models["student"])

    def training(self) -> Operation:
        """A teacher's answers, targets, training with checkpoints, an evaluated adapter."""
        prompts = self.folder / "prompts.txt"
        animals = ("cat", "dog", "bird", "fox", "frog", "pig")
        prompts.write_text("\n".join(f"Once there was a little {each} who" for each in animals))
        return Operation(
            self.folder / "nothing",
            lambda folder: [[*self._distill(folder, "--prompts", prompts), "--resume"]],
            distilled_so_far,
            distilled,
        )

    def on_policy(self) -> Operation:
        """The same with the student's own answers, in rounds of rollouts, scoring and training."""
        own = {"on-policy": 0.5, "rollouts": 4, "rollout-tokens": 12, "own-answers": -1}
        own["resident"] = "one"
        options = [part for name, value in own.items() for part in (f"--{name}", str(value))]
        training = self.training()
        return training._replace(
            commands=lambda folder: [[*command, *options] for command in training.commands(folder)]
        )

    def self_taught(self) -> Operation:
        """A student that teaches itself and is followed by its teacher."""
        path = self.folder / "shown.jsonl"
        animals = ("cat", "dog", "bird", "fox", "frog", "pig", "hen", "cow")
        path.write_text(
            "".join(
                json.dumps({"prompt": f"Once a {each}", "completion": f" ran to the big {each}."})
                + "\n"
                for each in animals
            )
        )
        own = {"on-policy": 1, "rollouts": 4, "rollout-tokens": 12, "teacher-ema": 0.5}
        own |= {"teacher": "self", "demonstrations": "answer"}
        options = [part for name, value in own.items() for part in (f"--{name}", str(value))]
        return self.training()._replace(
            commands=lambda folder: [
                [*self._distill(folder, "--data", path), *options, "--force", "--resume"]
            ]
        )

    def _distill(self, folder: Path, source: str, path: object) -> Command:
        settings = {
            "domain": DOMAIN,
            "teacher": "embedded:teacher",
            "student": "embedded:student",
            source.removeprefix("--"): path,
            "output-dir": folder / "adapters",
            "iters": STEPS,
            "learning-rate": 2e-4,
            "warmup-iters": 2,
            "batch-size": 2,
            "accumulation-steps": 2,
            "lora-rank": 4,
            "lora-dropout": 0.1,
            "max-tokens": 12,
            "generation-batch-size": 2,
            "val-fraction": 0.34,
            "steps-per-report": 1,
            "steps-per-eval": 4,
            "steps-per-save": SAVES,
        }
        parts = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        return ["distill", *parts]

    def _corpus(self, first: int, last: int) -> tuple[str, set[str]]:
        part = documents(last)[first:]
        return rows(self.folder / f"{first}.jsonl", part), {each["id"] for each in part}

    def _learn(self, folder: Path) -> list[Command]:
        path, _ = self._corpus(0, 120)
        db, student, teacher = str(folder / "db"), self.models["student"], self.models["teacher"]
        return [
            ["sediment", "ingest", db, path, "--model", student, "--batch-size", "20"],
            ["sediment", "distill", db, "--teacher", teacher],
        ]

    def _learned(self) -> Path:
        base = self.folder / "learned"
        if not base.is_dir():
            self.whole(self._learn(base))
            if self.store.facts(base)["learned"] != "True":
                sys.exit("the gate refused a version that later operations stand on")
        return base

    def activation(self) -> Operation:
        """A store is made and filled, and a version is learned, built, judged and activated."""
        _, ids = self._corpus(0, 120)

        def lost(folder: Path, runs: list[str]) -> list[str]:
            done = done_of(runs)
            there = ids if done else set[str]()
            return self.store.so_far(folder, there=there, gone=set(), may_be=ids, learned=done > 1)

        return Operation(self.folder / "nothing", self._learn, lost, self.store.facts)

    def table(self) -> Operation:
        """A store with an active version gets one that has a student of its own."""
        return self._next_version("distill", "--teacher", self.models["teacher"], "--train-student")

    def upgrade(self) -> Operation:
        """A store goes over to another model, which embeds all documents anew."""
        return self._next_version("upgrade", "--to", self.models["teacher"], "--do", "reembed")

    def _next_version(self, verb: str, *how: str) -> Operation:
        base, ids = self._learned(), self._corpus(0, 120)[1]

        def lost(folder: Path, runs: list[str]) -> list[str]:
            return self.store.so_far(folder, there=ids, gone=set(), may_be=set(), learned=True)

        def result(folder: Path) -> Facts:
            # A version that was judged and not activated leaves its number to nobody.
            students = files(folder, "db/versions/*-student/model.safetensors")
            return {**self.store.facts(folder), "students": " ".join({*students.values()})}

        return Operation(
            base, lambda folder: [["sediment", verb, str(folder / "db"), *how]], lost, result
        )

    def ingest(self) -> Operation:
        """Documents join a store that has an active version, a file after the other."""
        base, first = self._learned(), self._corpus(0, 120)[1]
        parts = [self._corpus(start, start + 30) for start in range(120, 240, 30)]

        def commands(folder: Path) -> list[Command]:
            db = str(folder / "db")
            return [["sediment", "ingest", db, path, "--batch-size", "5"] for path, _ in parts]

        def lost(folder: Path, runs: list[str]) -> list[str]:
            done = done_of(runs)
            there = first.union(*(ids for _, ids in parts[:done]))
            may_be = set[str]().union(*(ids for _, ids in parts[done : done + 1]))
            return self.store.so_far(folder, there=there, gone=set(), may_be=may_be, learned=True)

        return Operation(base, commands, lost, self.store.facts)

    def deletion(self) -> Operation | None:
        """Documents leave a store in all its versions; None while there is no such command."""
        from conch_dna.sedimentation.cli import sediment

        if "delete" not in sediment.commands:
            return None
        base, first = self._learned(), self._corpus(0, 120)[1]
        parts = [[f"d{n}" for n in range(start, start + 10)] for start in range(0, 40, 10)]

        def commands(folder: Path) -> list[Command]:
            return [["sediment", "delete", str(folder / "db"), *part] for part in parts]

        def lost(folder: Path, runs: list[str]) -> list[str]:
            done = done_of(runs)
            gone = {each for part in parts[:done] for each in part}
            may_be = {each for part in parts[done : done + 1] for each in part}
            there = first - gone - may_be
            return self.store.so_far(folder, there=there, gone=gone, may_be=may_be, learned=True)

        return Operation(base, commands, lost, self.store.facts)

    def promotion(self) -> Operation:
        """A child that was judged becomes the line's current generation."""
        base = self.folder / "judged"
        old, new = (rows(self.folder / f"{word}.jsonl", tales(word)) for word in ("cat", "ball"))
        manifest = self.folder / "evolve.yaml"
        manifest.write_text(MANIFEST)

        def line(verb: str, folder: Path, *more: str) -> Command:
            return ["generations", verb, DOMAIN, "--root", str(folder / "lines"), *more]

        def commands(folder: Path) -> list[Command]:
            more = ("--data", new, "--manifest", str(manifest), "--resume")
            return [line("evolve", folder, *more)]

        self.whole([line("init", base, "--model", "embedded:student", "--data", old)])
        self.judged(commands(base))
        return Operation(
            base,
            commands,
            lambda folder, runs: line_so_far(folder / "lines", DOMAIN, 1, runs),
            lambda folder: of_line(folder / "lines", DOMAIN),
        )

    def retraining(self) -> Operation:
        """Corrections are recorded, and an adapter learns from them and is promoted."""
        base = self.folder / "distilled"
        data = rows(self.folder / "data.jsonl", tales("cat", 12))
        manifest = self.folder / "retrain.yaml"
        manifest.write_text(MANIFEST)
        parts = [
            [
                {
                    "prompt": f"Once upon a day {n}",
                    "answer": "?",
                    "better": f" there were {n} balls.",
                    "problem": "no number",
                }
                for n in range(start, start + 6)
            ]
            for start in (0, 6)
        ]
        names = [rows(self.folder / f"told{n}.jsonl", part) for n, part in enumerate(parts)]

        def commands(folder: Path) -> list[Command]:
            adapters = ("--adapters", str(folder / "adapters"))
            how = ("--ego", "embedded:teacher", "--config", str(manifest), "--resume")
            return [
                *(["cortex", "record", DOMAIN, "--from", name, *adapters] for name in names),
                ["cortex", "retrain", DOMAIN, *adapters, *how],
            ]

        def pipeline(folder: Path) -> Any:
            from conch_dna.retraining.pipeline import TrainingPipeline

            return TrainingPipeline(folder / "adapters", "embedded:student")

        def told(folder: Path) -> list[str]:
            found, _ = pipeline(folder).buffer.read(DOMAIN)
            return [each.messages[0]["content"] for each in found]

        def lost(folder: Path, runs: list[str]) -> list[str]:
            wanted = {each["prompt"] for part in parts[: done_of(runs)] for each in part}
            missing = wanted - set(told(folder))
            faults = [f"{len(missing)} acknowledged corrections are not there"] if missing else []
            return faults + line_so_far(folder / "adapters" / "lines", DOMAIN, 3, runs)

        def result(folder: Path) -> Facts:
            counts = pipeline(folder).should_retrain(DOMAIN).counts
            facts = {"told": json.dumps(told(folder)), "counts": json.dumps(counts)}
            return {**facts, **of_line(folder / "adapters" / "lines", DOMAIN)}

        self.whole([self._distill(base, "--data", data)])
        return Operation(base, commands, lost, result)


NAMES = (
    "training",
    "on_policy",
    "self_taught",
    "ingest",
    "activation",
    "table",
    "upgrade",
    "deletion",
    "promotion",
    "retraining",
)
