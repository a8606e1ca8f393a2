"""Several adapters in one, beside three cheaper ways, and beside each by itself.

    python tests/benchmarks/merge_neurons.py --model FOLDER --domains NAME=FILE NAME=FILE …
        [--texts 96] [--steps 40] [--learning-rate 5e-4] [--seeds 1] [--answers 16]
        [--output FOLDER]

Each domain's own adapter is fine-tuned on the first texts of its file, of which a quarter is held
out. Merged is what `conch-dna merge` makes. Beside it stand the mean of their weights (every rank
kept), the mean of their predictions (all of them run), and one adapter fine-tuned on all texts,
with as many steps and texts as merging has. Recall is the share of tokens of held-out texts that
are ranked first. What is finished is not done again.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads a BLAS before mlx)

import argparse
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from _setting import print_setting, spread
from rich.console import Console

from conch_dna.checkpoints import read_json, write_json
from conch_dna.exporting.merging import Merging, domain_figures
from conch_dna.exporting.settings import MergeSettings
from conch_dna.exporting.source import AdapterSource
from conch_dna.language_model import LanguageModel
from conch_dna.screen.presentation import text_table
from conch_dna.screen.progress import Progress
from conch_dna.training.adapters import ADAPTER_CONFIG, save_adapter
from conch_dna.training.batches import collate, sequential_batches
from conch_dna.training.data.records import Record, read_records
from conch_dna.training.settings import KDConfig
from conch_dna.training.true_kd import TrueKnowledgeDistiller

OWN, MERGED = "its own adapter", "merged"
WEIGHTS, PREDICTIONS, MIXED = "mean of weights", "mean of predictions", "one on all texts"
HELD_OUT = 0.25


class Bench:
    """One seed's adapters, and what each way makes of them.

    Args:
        args: Of the command line.
        seed: Of all that is drawn.
    """

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args = args
        self.seed = seed
        self.folder: Path = args.output / f"seed-{seed}"
        self.records = {n: read_records(Path(f))[: args.texts] for n, f in args.domains}

    def tuned(self, name: str, records: Sequence[Record], *, batch_size: int, valid: Any) -> Path:
        """An adapter fine-tuned on texts."""
        steps = self.args.steps
        config = KDConfig(
            alpha=0.0,
            select_by="loss",
            lora_keys="all",
            learning_rate=self.args.learning_rate,
            num_iters=steps,
            warmup_iters=max(1, steps // 10),
            steps_per_eval=max(1, steps // 4),
            steps_per_save=steps,
            batch_size=batch_size,
            val_fraction=HELD_OUT,
            max_seq_length=512,
            too_long="skip",
            max_tokens=192,
            seed=self.seed,
            output_dir=str(self.folder / "neurons"),
        )
        with Progress(plain=True) as report:
            distiller = TrueKnowledgeDistiller(
                self.args.model, self.args.model, config, report=report
            )
            result = distiller.distill_domain(name, data=records, valid_data=valid, resume=True)
        return Path(result.adapter_path)

    def sources(self) -> dict[str, AdapterSource]:
        """The domains' own adapters."""
        size = MergeSettings().batch_size
        return {
            name: self.opened(self.tuned(name, records, batch_size=size, valid=()))
            for name, records in self.records.items()
        }

    def opened(self, path: Path) -> AdapterSource:
        return AdapterSource.open(path, trust_remote_code=False, report=lambda *_: None)

    def figures(
        self, way: str, sources: Mapping[str, AdapterSource], scored: Callable[..., Any]
    ) -> dict[str, Any]:
        """What a way comes to in each domain; read back if it is there."""
        path = self.folder / f"{way.replace(' ', '-')}.json"
        if not path.is_file():
            found = {}
            for name, source in sources.items():
                config = source.config()
                split = source.split(None, config)
                found[name] = scored(name, source, split, config)
            write_json(path, found)
        return read_json(path, needs={})

    def of_adapter(self, path: Path | None) -> Callable[..., Any]:
        """Figures of one adapter in all domains; None for each domain's own."""

        def scored(name: str, source: AdapterSource, split: Any, config: KDConfig) -> Any:
            bare, model = (self.opened(path) if path else source).load()
            figures = domain_figures(name, model, split, config, self.args.answers)
            bare.release()
            model.release()
            return {"recall": figures["recall"], "valid": figures["valid"]}

        return scored

    def merged(self, sources: Mapping[str, AdapterSource]) -> Path:
        """What `conch-dna merge` makes; nothing is refused."""
        folder = self.folder / "merged"
        if not folder.is_dir():
            settings = MergeSettings(
                steps=self.args.steps,
                learning_rate=self.args.learning_rate,
                recall_margin=1.0,
                answers=0,
                seed=self.seed,
            )
            with Progress(plain=True) as report:
                Merging(sources, folder, settings, report=report).merged(resume=True)
        return folder

    def mean_of_weights(self, sources: Mapping[str, AdapterSource]) -> Path:
        """Their updates' mean, exactly: the ranks stand side by side."""
        folder = self.folder / "mean"
        tensors = [mx.load(str(each.folder / "adapters.safetensors")) for each in sources.values()]
        document = dict(next(iter(sources.values())).document)
        parts: dict[str, mx.array] = {}
        for name in tensors[0]:
            axis = 1 if name.endswith("lora_a") else 0
            share = 1 if axis else 1 / len(tensors)
            parts[name] = mx.concatenate([share * each[name] for each in tensors], axis=axis)
        rank = sum(each.document["lora_parameters"]["rank"] for each in sources.values())
        document["lora_parameters"] = {**document["lora_parameters"], "rank": rank}
        save_adapter(folder, parts, document)
        assert (folder / ADAPTER_CONFIG).is_file()
        return folder

    def mixed(self, sources: Mapping[str, AdapterSource]) -> Path:
        """One adapter fine-tuned on what all of them learned from."""
        learned, held = [], []
        for source in sources.values():
            split = source.split(None, source.config())
            learned += split.train_records
            held += split.heldout_records
        size = MergeSettings().batch_size * len(sources)
        return self.tuned("all-texts", learned, batch_size=size, valid=held)


def of_all(sources: Mapping[str, AdapterSource]) -> Callable[..., Any]:
    """Figures of the mean of all adapters' predictions; it answers nothing."""

    def scored(name: str, source: AdapterSource, split: Any, config: KDConfig) -> Any:
        loaded = [each.load() for each in sources.values()]
        right = _ranked_first([model for _, model in loaded], split.heldout, config)
        for pair in loaded:
            for model in pair:
                model.release()
        return {"recall": right, "valid": []}

    return scored


def _ranked_first(models: Sequence[LanguageModel], examples: Any, config: KDConfig) -> list[float]:
    """Of each text the share of tokens that the mean of some models' probabilities ranks first."""
    found: dict[int, float] = {}
    for indices in sequential_batches(examples, 1):
        (index,) = indices
        batch = collate([examples[index]])
        at = mx.array(batch.arrays["positions"][: batch.count])
        labels = mx.array(batch.arrays["labels"][: batch.count])
        total = 0
        for model in models:
            parts = model.logits_at(mx.array(batch.arrays["inputs"]), at, memory=config.loss_memory)
            total = total + mx.concatenate(
                [mx.softmax(logits.astype(mx.float32), axis=-1) for _, logits in parts]
            )
        found[int(index)] = float(mx.mean(mx.argmax(total, axis=-1) == labels))
    return [found[index] for index in range(len(examples))]


def measured(args: argparse.Namespace, seed: int) -> dict[str, dict[str, Any]]:
    """All ways of one seed."""
    bench = Bench(args, seed)
    sources = bench.sources()
    found = {
        OWN: bench.figures(OWN, sources, bench.of_adapter(None)),
        MERGED: bench.figures(MERGED, sources, bench.of_adapter(bench.merged(sources))),
        WEIGHTS: bench.figures(WEIGHTS, sources, bench.of_adapter(bench.mean_of_weights(sources))),
        PREDICTIONS: bench.figures(PREDICTIONS, sources, of_all(sources)),
        MIXED: bench.figures(MIXED, sources, bench.of_adapter(bench.mixed(sources))),
    }
    shutil.rmtree(bench.folder / "mean", ignore_errors=True)
    return found


def row_of(way: str, name: str, runs: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """A way's row in a domain."""
    recall = [100 * statistics.mean(run[way][name]["recall"]) for run in runs]
    lost = [
        100 * float(np.mean(run[way][name]["recall"]) - np.mean(run[OWN][name]["recall"]))
        for run in runs
    ]
    valid = [each for run in runs for each in run[way][name]["valid"]]
    kept = f"{round(sum(valid))} of {len(valid)}" if valid else "–"
    return name, way, spread(recall, 1), spread(lost, 1), kept


def main() -> None:
    """Do what is not finished, and show all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--domains", nargs="+", required=True, type=lambda t: t.split("=", 1))
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--answers", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("models/merge_neurons"))
    args = parser.parse_args()
    print_setting(f"{args.model}: {args.steps} steps, learning rate {args.learning_rate:g}")
    runs = [measured(args, seed) for seed in range(args.seeds)]
    ways = (OWN, MERGED, WEIGHTS, PREDICTIONS, MIXED)
    rows = [row_of(way, name, runs) for name, _ in args.domains for way in ways]
    columns = ("domain", "", "recall, %", "against its own, points", "valid JSON")
    Console(width=130).print(text_table("one adapter for all", columns, rows))


if __name__ == "__main__":
    main()
