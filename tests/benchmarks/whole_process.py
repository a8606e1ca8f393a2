"""KD on cached targets against mlx_lm's LoRA on the same files, whole processes, in turn.

    python tests/benchmarks/whole_process.py [--data tinystories gsm8k] [--steps 150] [--rounds 3]
        [--teacher FOLDER --student FOLDER] [--longest 512]

Both train the same student on the same folder of records, with as many steps of as many examples,
LoRA of rank 16 on all linear layers, one batch of held-out data before and after; mlx_lm with the
same BLAS. Tokens that count by the seconds from the process's start to its end, and by those of the
training loop alone. Also what share of the batches is no padding, which is all that packing several
examples into one row could win, and what its mask would cost attention.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads a BLAS before mlx)

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from _ratios import note_ratio
from _setting import print_setting, shared_data

from conch_dna.language_model import ModelSource
from conch_dna.training.batches import ExampleBatches
from conch_dna.training.data.records import fitting, read_records, tokenize_records
from models import keep_layers

HELDOUT, BATCH = 8, 4
# mlx_lm's own command, with a BLAS, and with its figures as numbers.
WITH_BLAS = """
import json
import conch_dna
from mlx_lm import lora
from mlx_lm.tuner.callbacks import TrainingCallback

class Told(TrainingCallback):
    def on_train_loss_report(self, info):
        print("REPORT", json.dumps(info), flush=True)

lora.get_reporting_callbacks = lambda *arguments, **options: Told()
lora.main()
"""


def prepared(name: str, tokenizer: Any, longest: int, folder: Path, count: int) -> list[Any]:
    """Write train.jsonl and valid.jsonl of texts that fit, and give the training examples."""
    path = shared_data() / "text" / name / "train.jsonl"
    records = list(itertools.islice(read_records(path), 2 * (count + HELDOUT)))
    if not tokenizer.has_chat_template:
        # mlx_lm takes prompts and completions only with one.
        records = [each if "text" in each else as_text(each) for each in records]
    examples = tokenize_records(records, tokenizer)
    kept = fitting(examples, longest, skip=True)[: count + HELDOUT]
    folder.mkdir(parents=True)
    for part, chosen in (("train", kept[:-HELDOUT]), ("valid", kept[-HELDOUT:])):
        lines = [json.dumps(records[index]) for index in chosen]
        (folder / f"{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return [examples[index] for index in kept[:-HELDOUT]]


def as_text(record: dict[str, Any]) -> dict[str, Any]:
    """A prompt and its completion as one text, of which all counts."""
    return {"text": f"{record['prompt']}\n{record['completion']}"}


def timed(command: Sequence[str]) -> tuple[float, str]:
    """Seconds of a command, and what it said."""
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return seconds, done.stdout + done.stderr


def distilled(
    folder: Path, data: Path, pair: tuple[str, str], steps: int, *more: str
) -> tuple[float, str]:
    """A run of ours."""
    command = [sys.executable, "-m", "conch_dna", "distill", "--domain", "speed"]
    command += ["--data", str(data), "--teacher", pair[0], "--student", pair[1]]
    command += ["--iters", str(steps), "--batch-size", str(BATCH), "--lora-keys", "all"]
    command += ["--steps-per-eval", str(steps), "--steps-per-save", str(steps)]
    command += ["--steps-per-report", str(steps), "--val-batches", "1", "--warmup-iters", "0"]
    return timed([*command, "--max-tokens", "1", "--output-dir", str(folder), *more])


def fine_tuned(
    folder: Path, data: Path, student: str, steps: int, longest: int
) -> tuple[float, str]:
    """A run of mlx_lm's."""
    config = folder.with_suffix(".yaml")
    config.write_text("lora_parameters: {rank: 16, scale: 10.0, dropout: 0.0}\n", encoding="utf-8")
    command = [sys.executable, "-c", WITH_BLAS, "--train", "--model", student, "--data", str(data)]
    command += ["--iters", str(steps), "--batch-size", str(BATCH), "--num-layers", "-1"]
    command += ["--steps-per-eval", str(steps), "--steps-per-report", str(steps), "--config"]
    command += [str(config), "--val-batches", "1", "--max-seq-length", str(longest)]
    command += ["--mask-prompt", "--save-every", str(steps), "--adapter-path", str(folder)]
    if "prompt" not in (data / "train.jsonl").read_text(encoding="utf-8").split("\n")[0]:
        command.remove("--mask-prompt")
    return timed(command)


def filled(examples: Sequence[Any], size: int) -> float:
    """Share of the batches' places that hold a text's tokens."""
    stream = ExampleBatches(examples, size, seed=0)
    places = used = 0
    for index in range(stream.batches_per_epoch):
        places += stream.batch(index).arrays["inputs"].size
        used += sum(len(examples[i].ids) - 1 for i in stream.indices(index))
    return used / places


def mask_ratio(heads: int = 9, width: int = 64, length: int = 224, rows: int = 4) -> float:
    """Attention of one packed row with a mask over that of as many rows without: time by time."""
    blocks = np.repeat(np.arange(rows), length)
    places = np.arange(rows * length)
    allowed = (blocks[:, None] == blocks[None]) & (places[:, None] >= places[None])
    mask = mx.where(mx.array(allowed), 0.0, -mx.inf)
    apart = mx.random.normal((rows, heads, length, width))
    packed = apart.transpose(1, 0, 2, 3).reshape(1, heads, rows * length, width)
    times: dict[str, list[float]] = {"packed": [], "apart": []}
    for _, (name, values, how) in itertools.product(
        range(6), (("packed", packed, mask), ("apart", apart, "causal"))
    ):
        began = time.perf_counter()
        mx.eval(mx.fast.scaled_dot_product_attention(values, values, values, scale=0.125, mask=how))
        times[name].append(time.perf_counter() - began)
    return float(np.median(times["packed"]) / np.median(times["apart"]))


def main() -> None:
    """Print a line of each collection."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["tinystories", "gsm8k"])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--teacher", default="")
    parser.add_argument("--student", default="")
    args = parser.parse_args()
    print_setting(f"KD on cached targets over mlx_lm's LoRA, {args.steps} steps of {BATCH}")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        teacher = args.teacher or str(shared_data() / "models" / "stories260K")
        student = args.student or str(keep_layers(Path(teacher), place / "student", [0, 2, 4]))
        tokenizer = ModelSource(student).tokenizer
        print(f"  attention of a packed row over rows apart: {mask_ratio():.1f} times")
        for name in args.data:
            data = place / f"data_{name}"
            examples = prepared(name, tokenizer, args.longest, data, args.examples)
            shares = ", ".join(f"{filled(examples, size):.1%} of {size}" for size in (4, 8, 16))
            print(f"  {name}: places that hold tokens, in batches: {shares}")
            pair = (teacher, student)
            distilled(place / name, data, pair, args.steps, "--targets-only")
            whole, loop = [], []
            for number in range(args.rounds):
                both: dict[str, tuple[float, float]] = {}
                for kind in ("kd", "mlx_lm") if number % 2 else ("mlx_lm", "kd"):
                    if kind == "kd":
                        seconds, _ = distilled(place / name, data, pair, args.steps, "--overwrite")
                        log = json.loads(
                            (
                                place / name / "speed" / "adapters_kd" / "training_log.json"
                            ).read_text(encoding="utf-8")
                        )
                        rate = next(r for r in log if r["split"] == "train")["tokens_per_second"]
                        stream = ExampleBatches(examples, BATCH, seed=0)
                        tokens = sum(
                            examples[i].count
                            for step in range(args.steps)
                            for i in stream.indices(step)
                        )
                    else:
                        seconds, said = fine_tuned(
                            place / f"sft_{name}", data, student, args.steps, args.longest
                        )
                        report = json.loads(re.findall("REPORT (.*)", said)[-1])
                        rate, tokens = report["tokens_per_second"], report["trained_tokens"]
                    both[kind] = tokens / seconds, rate
                whole.append(both["kd"][0] / both["mlx_lm"][0])
                loop.append(both["kd"][1] / both["mlx_lm"][1])
                print(
                    f"  {name}: "
                    + "; ".join(
                        f"{kind} {a:,.0f} tokens/s, in the loop {b:,.0f}"
                        for kind, (a, b) in sorted(both.items())
                    ),
                    flush=True,
                )
            for kind, values in (("whole processes", whole), ("loops", loop)):
                told = note_ratio(
                    f"tokens a second, KD over mlx_lm, {name}, {kind}", values, "at least 1.0"
                )
                print(f"  {name}: ratio of {kind} {told}; wanted at least 1.0")


if __name__ == "__main__":
    main()
