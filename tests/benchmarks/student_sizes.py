"""How small a student may be: layers left out of a model, unhealed, healed, and made of nothing.

    python tests/benchmarks/student_sizes.py --model FOLDER [--layers 27 24 20 15] [--steps 200]
        [--seeds 1] [--output FOLDER]

For each number of layers `student make` makes a student of the model, and the whole model teaches
it, all weights trained: by KD alone (alpha 1, temperature 1), by cross-entropy alone (alpha 0), and
by KD a student of the same shape whose weights are random; the same batches in the same order. The
texts are TinyStories and gsm8k; the step that is kept is chosen by some, the figures stand on
others. Tokens a second are those of one answer. What is finished is not done again.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads a BLAS before mlx)

import argparse
import importlib
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Any

import mlx.core as mx
from _setting import LONGEST, print_setting, shared_data, spread, stories
from mlx_lm.generate import generate_step
from mlx_lm.utils import MODEL_REMAPPING
from rich.console import Console

from conch_dna.checkpoints import read_json, write_folder, write_json
from conch_dna.language_model import ModelSource, named_arrays
from conch_dna.screen.presentation import text_table
from conch_dna.screen.progress import Progress
from conch_dna.training.data.records import Record, read_records
from conch_dna.training.settings import KDConfig
from conch_dna.training.students.block_influence import make_student, other_files, windows_of
from conch_dna.training.students.student_folder import file_arrays
from conch_dna.training.true_kd import TrueKnowledgeDistiller

# Of each of the two data sets.
TRAINING, CHOOSING, JUDGING = 200, 8, 24
INFLUENCE_TOKENS = 2_048
GENERATED, ROUNDS = 48, 3
KD, ALONE, RANDOM = "KD", "cross-entropy alone", "KD, random weights"
KINDS = {KD: 1.0, ALONE: 0.0, RANDOM: 1.0}
CONFIG = KDConfig(
    full=True,
    temperature=1.0,
    max_seq_length=512,
    too_long="skip",
    val_batches=-1,
)


def records(name: str, gsm8k: str, count: int, *, skip: int = 0) -> list[Record]:
    """So many of both data sets by turns, behind some that are skipped."""
    path = shared_data() / "text" / "gsm8k" / f"{gsm8k}.jsonl"
    solved = read_records(path)[skip : skip + count]
    told = [opened(each["text"]) for each in stories(name, skip + count)[skip:]]
    return [each for pair in zip(told, solved, strict=True) for each in pair]


def opened(text: str) -> Record:
    """The beginning of a story, cut between words."""
    return {"text": " ".join(text.split())[:LONGEST].rsplit(" ", 1)[0]}


def text_of(record: Record) -> str:
    """What a record has to read."""
    return str(record.get("text") or f"{record['prompt']}{record['completion']}")


def made(teacher: ModelSource, folder: Path, layers: int, texts: Sequence[str]) -> ModelSource:
    """The student of so many layers, where it is not there yet."""
    if not folder.is_dir():
        windows = windows_of(teacher.tokenizer, texts, tokens=INFLUENCE_TOKENS)
        with Progress(plain=True) as report:
            make_student(teacher, folder, windows, layers=layers, report=report)
    return ModelSource(str(folder))


def random_student(student: ModelSource, folder: Path, seed: int) -> ModelSource:
    """A student of another's shape and precision, with the weights that mlx_lm begins with."""
    if not folder.is_dir():
        kind = student.config["model_type"]
        module = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(kind, kind)}")
        mx.random.seed(seed)
        model = module.Model(module.ModelArgs.from_dict(student.config))
        model.set_dtype(next(iter(file_arrays(student).values())).dtype)
        write_folder(
            folder,
            arrays={"model.safetensors": named_arrays(model.parameters())},
            documents={"config.json": student.config},
            writers={each.name: partial(copyfile, each) for each in other_files(student.folder)},
        )
    return ModelSource(str(folder))


def size_and_speed(source: ModelSource, path: Path) -> dict[str, float]:
    """Megabytes of weights, and tokens a second of one greedy answer, the median of some."""
    if path.is_file():
        return read_json(path, needs={"tokens_a_second": float})
    model = source.load()
    prompt = mx.array(source.tokenizer.encode("Once upon a time"))
    speeds = []
    for _ in range(1 + ROUNDS):
        began = time.perf_counter()
        count = sum(1 for _ in generate_step(prompt, model.model, max_tokens=GENERATED))
        speeds.append(count / (time.perf_counter() - began))
    model.release()
    nbytes = sum(each.nbytes for each in file_arrays(source).values())
    found = {"megabytes": nbytes / 1e6, "tokens_a_second": statistics.median(speeds[1:])}
    write_json(path, found)
    return found


def trained(
    args: argparse.Namespace, student: ModelSource, data: dict[str, Any], kind: str, seed: int
) -> dict[str, Any]:
    """What one run came to on the texts that judge: before, after, and the teacher on them."""
    layers = student.config["num_hidden_layers"]
    run = f"{layers}-{kind.replace(',', '').replace(' ', '-')}-{seed}"
    config = replace(
        CONFIG,
        alpha=KINDS[kind],
        seed=seed,
        run=run,
        learning_rate=args.learning_rate,
        num_iters=args.steps,
        warmup_iters=max(1, args.steps // 10),
        steps_per_eval=max(1, args.steps // 4),
        steps_per_save=max(1, args.steps // 4),
        output_dir=str(args.output / "runs"),
    )
    with Progress(plain=True) as report:
        distiller = TrueKnowledgeDistiller(args.model, student.model_id, config, report=report)
        result = distiller.distill_domain("sizes", **data, resume=True)
    found: dict[str, Any] = result.evaluation["test"]
    kl = [found[when]["kl_nats"] for when in ("before", "after")]
    print(f"{run}: KL {kl[0]:.4f} to {kl[1]:.4f}", flush=True)
    return found


def row_of(name: str, size: dict[str, float], figures: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """A row: of one model, or of one of each seed."""
    cells = {
        "kl_nats": [each["kl_nats"] for each in figures],
        "perplexity": [each["perplexity"] for each in figures],
        "top1": [100 * each["top1_agreement"] for each in figures],
    }
    digits = {"kl_nats": 4, "perplexity": 2, "top1": 1}
    shown = [
        spread(values, digits[each]) if len(values) > 1 else f"{values[0]:.{digits[each]}f}"
        for each, values in cells.items()
    ]
    return name, f"{size['megabytes']:.1f}", f"{size['tokens_a_second']:.1f}", *shown


def main() -> None:
    """Do what is not finished, and show all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id, its weights whole")
    parser.add_argument("--layers", nargs="+", type=int, default=[27, 24, 20, 15])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("models/student_sizes"))
    args = parser.parse_args()
    print_setting(
        f"{args.model}: {args.steps} steps of {CONFIG.batch_size}, learning rate "
        f"{args.learning_rate:g}"
    )
    data = {
        "data": records("train", "train", TRAINING),
        "valid_data": records("heldout", "test", CHOOSING),
        "test_data": records("heldout", "test", JUDGING, skip=CHOOSING),
    }
    teacher = ModelSource(args.model)
    if teacher.config.get("quantization"):
        parser.error(f"{args.model} is quantised, and all weights are to be trained")
    texts = [text_of(each) for each in data["data"]]
    whole = size_and_speed(teacher, args.output / "whole.json")
    rows: list[tuple[str, ...]] = []
    for layers in args.layers:
        student = made(teacher, args.output / f"{layers}-layers", layers, texts)
        size = size_and_speed(student, args.output / f"{layers}-layers.json")
        done: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        for seed, kind in itertools.product(range(args.seeds), KINDS):
            model = student
            if kind == RANDOM:
                model = random_student(student, args.output / f"{layers}-random-{seed}", seed)
            done[kind].append(trained(args, model, data, kind, seed))
        if not rows:
            rows.append(row_of("the whole model", whole, [done[KD][0]["teacher"]]))
        rows.append(row_of(f"{layers} layers, unhealed", size, [done[KD][0]["before"]]))
        for kind, runs in done.items():
            rows.append(row_of(f"  {kind}", size, [each["after"] for each in runs]))
    columns = ("", "MB", "tokens/s", "KL", "perplexity", "top-1, %")
    Console(width=130).print(text_table(f"{args.model} and its students", columns, rows))


if __name__ == "__main__":
    main()
