"""Several adapters become one: each text is taught by the adapter of its own domain.

Ties adapters, targets, the one trainer and the gate of recall together; knows nothing of other
programs' files. Another way to begin: what `_train` puts on the model.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conch_dna.checkpoints import content_digest, provenance, write_folder
from conch_dna.errors import ConchError, number_of
from conch_dna.exporting.judging import valid_answers, warn_of_few
from conch_dna.exporting.settings import MergeSettings
from conch_dna.exporting.source import AdapterSource, same_base
from conch_dna.exporting.work_folder import WorkFolder
from conch_dna.generations.promotion import GateVerdict, TextScores, recall_gate, text_scores
from conch_dna.generations.settings import GateSettings
from conch_dna.language_model import LanguageModel
from conch_dna.metrics import ranges_of
from conch_dna.retraining.adapter_config import shape_of
from conch_dna.retraining.domain import active_adapter
from conch_dna.screen.presentation import text_table
from conch_dna.screen.progress import Report, silent
from conch_dna.training.adapters import (
    ADAPTER_CONFIG,
    load_verified,
    make_trainable,
    save_adapter,
    trained_tensors,
)
from conch_dna.training.batches import Batch, sequential_batches
from conch_dna.training.data.examples import Split
from conch_dna.training.data.records import json_lines
from conch_dna.training.data.soft_targets import SoftTargetCache, TargetBatches
from conch_dna.training.runs.domain_run import DATA_FILE, HELDOUT_FILE
from conch_dna.training.runs.on_policy.questions import questions_of
from conch_dna.training.settings import KDConfig, trainer_settings, validate_domain
from conch_dna.training.structured_answers import DOMAIN_SCHEMAS
from conch_dna.training.trainer import Trainer

if TYPE_CHECKING:
    from rich.table import Table

MERGED_FILE = "merged.json"
CANDIDATE = "candidate"


class DomainBatches:
    """Batches with as many texts of each adapter, which count for as much whatever their length.

    Args:
        streams: One of each adapter, with its targets.
    """

    def __init__(self, streams: Sequence[TargetBatches]) -> None:
        self.streams = streams

    @property
    def digest(self) -> str:
        """Content address of the streams, in their order."""
        return content_digest(*(stream.digest for stream in self.streams))

    def batch(self, index: int) -> Batch:
        """Batch `index`, counted over all epochs."""
        return joined([stream.batch(index) for stream in self.streams])

    def parts(self, index: int, count: int) -> list[Batch]:
        """The same in so many parts, each with texts of every adapter."""
        streams = [stream.parts(index, count) for stream in self.streams]
        return [joined(each) for each in zip(*streams, strict=True)]


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches of several adapters as one, in which each of them has the same part of the KD loss.

    Their rows stand below each other; `kd_weights` of a token is all tokens / (batches · tokens of
    its own batch), so that they sum up to the count and the loss stays one of a token.
    """
    length = max(batch.arrays["inputs"].shape[1] for batch in batches)
    total = sum(batch.count for batch in batches)
    inputs = []
    parts: dict[str, list[np.ndarray]] = {}
    rows = 0
    for batch in batches:
        own = batch.arrays["inputs"]
        inputs.append(np.pad(own, ((0, 0), (0, length - own.shape[1]))))
        row, column = np.divmod(batch.arrays["positions"], own.shape[1])
        moved = {
            **{name: array for name, array in batch.arrays.items() if name != "inputs"},
            "positions": ((rows + row) * length + column).astype(np.int32),
            "kd_weights": batch.arrays["weights"]
            * np.float32(total / (len(batches) * batch.count)),
        }
        for name, array in moved.items():
            parts.setdefault(name, []).append(array)
        rows += len(own)
    arrays = {name: np.concatenate(each) for name, each in parts.items()}
    return Batch(
        {"inputs": np.concatenate(inputs), **arrays},
        total,
        tuple(name for batch in batches for name in batch.names),
        sum(batch.text_bytes for batch in batches),
    )


def recall_of(model: LanguageModel, split: Split, config: KDConfig) -> TextScores:
    """How well a model writes held-out texts; see `promotion.text_scores`."""
    return text_scores(
        model, split.heldout, batch_size=config.batch_size, memory=config.loss_memory
    )


def domain_figures(
    name: str, model: LanguageModel, split: Split, config: KDConfig, answers: int
) -> dict[str, Any]:
    """How well a model recalls a domain's held-out texts, and keeps its schema.

    Args:
        name: The domain.
        model: In memory.
        split: Its texts.
        config: How they are read.
        answers: Held-out prompts answered at most, where the domain has a schema.

    Returns:
        `recall`, a share of tokens for each text; `slices` of them, as gates have them; and
        `valid`, 1 or 0 of each prompt.
    """
    scores = recall_of(model, split, config)
    questions = []
    if name in DOMAIN_SCHEMAS and answers:
        names = [example.name for example in split.heldout]
        questions = questions_of(split.heldout_records, names, model.tokenizer)
    return {
        "recall": scores.top1.tolist(),
        "slices": {"recall": {"length": ranges_of(scores.tokens.tolist(), "tokens")}},
        "valid": valid_answers(model, questions[:answers], config, name),
    }


def _shape(adapters: Iterable[AdapterSource], rank: int) -> dict[str, Any]:
    """The settings of one adapter that has all layers of several; those of every weight aside."""
    shapes = [each for a in adapters if not (each := shape_of(a.document))["full"]]
    if not shapes:
        return {"lora_rank": rank} if rank else {}
    keys = [key for each in shapes for key in each["lora_keys"].split(",")]
    layers = [each["lora_layers"] for each in shapes]
    return {
        "lora_rank": rank or max(each["lora_rank"] for each in shapes),
        "lora_scale": shapes[0]["lora_scale"],
        "lora_keys": ",".join(dict.fromkeys(keys)),
        "lora_layers": -1 if -1 in layers else max(layers),
    }


def _heldout(
    splits: Mapping[str, Split], caches: Mapping[str, SoftTargetCache], batch_size: int
) -> list[Batch]:
    """Batches of what is held out; each domain has the same part of their KD loss."""
    counts = {name: sum(e.count for e in split.heldout) for name, split in splits.items()}
    batches = []
    for name, split in splits.items():
        share = np.float32(sum(counts.values()) / (len(splits) * counts[name]))
        for indices in sequential_batches(split.heldout, batch_size):
            batch = caches[name].collate([split.heldout[i] for i in indices], 1.0)
            weights = {"kd_weights": batch.arrays["weights"] * share}
            batches.append(replace(batch, arrays={**batch.arrays, **weights}))
    return batches


class Merging:
    """Adapters of one model on their way into one; use `merged`.

    Args:
        adapters: By the names of their domains, two or more.
        folder: Where the merged adapter is to stand.
        settings: How.
        report: Gets the progress.

    Raises:
        ConchError: There are fewer than two, or they are of other models.
    """

    def __init__(
        self,
        adapters: Mapping[str, AdapterSource],
        folder: Path,
        settings: MergeSettings,
        *,
        report: Report = silent,
    ) -> None:
        self.base = same_base(adapters)
        self.adapters = adapters
        self.folder = folder
        self.settings = settings
        self.report = report
        self.work = WorkFolder(folder, "merging", "adapter", report)

    def merged(self, *, resume: bool = False, overwrite: bool = False) -> dict[str, GateVerdict]:
        """Make the adapter, and put it in its place if it recalls every domain well enough.

        Args:
            resume: Go on with what an interrupted or refused one of the same settings left.
            overwrite: Replace an adapter that stands there, and what an interrupted one left.

        Returns:
            What the gate says of each domain; `figures` hold the shares of valid answers too.

        Raises:
            ConchError: A folder in the way, an adapter without its texts, a full disk; or the
                merged adapter is refused.
        """
        self.work.require_place(ADAPTER_CONFIG, overwrite=overwrite)
        if self.folder.resolve() in [each.folder.resolve() for each in self.adapters.values()]:
            raise ConchError(f"{self.folder} is one of those that are merged: name another folder")
        splits = self._splits()
        with self.work.held():
            self.work.begin(self._identity(splits), resume=resume, overwrite=overwrite)
            caches, own = self._taught(splits)
            if not self.work.has(CANDIDATE):
                self._train(splits, caches)
            verdicts = self._judged(splits, own)
            lost = [each.reason for each in verdicts.values() if not each.passed]
            if lost:
                raise ConchError(
                    f"{'; '.join(lost)}. Nothing stands at {self.folder}: more --steps or a higher "
                    "--rank with --overwrite, or a higher --recall-margin with --resume to take it"
                )
            self._take(splits, verdicts)
        self.work.remove()
        return verdicts

    def _config(self, name: str) -> KDConfig:
        """How an adapter's texts are read, and what of the model is trained."""
        settings = self.settings
        return replace(
            self.adapters[name].config(),
            **_shape(self.adapters.values(), settings.rank),
            num_iters=settings.steps,
            learning_rate=settings.learning_rate,
            weight_decay=0.0,
            warmup_iters=min(10, settings.steps // 10),
            batch_size=settings.batch_size,
            loss_memory=settings.loss_memory,
            steps_per_eval=max(1, settings.steps // 4),
            seed=settings.seed,
        )

    def _splits(self) -> dict[str, Split]:
        """Each adapter's texts; what one holds out no other one teaches."""
        found = {n: each.split(None, self._config(n)) for n, each in self.adapters.items()}
        heldout = {example.digest for split in found.values() for example in split.heldout}
        for name, split in found.items():
            kept = [e.digest not in heldout for e in split.train]
            if left := kept.count(False):
                message = (
                    f"{number_of(left, 'text')} of {name} held out of another domain: not taught"
                )
                self.report("message", {"message": message})
            found[name] = split = replace(
                split,
                train=list(compress(split.train, kept)),
                train_records=list(compress(split.train_records, kept)),
            )
            if len(split.train) < self.settings.batch_size:
                raise ConchError(
                    f"{name} has {number_of(len(split.train), 'text')} to learn from, and a batch "
                    f"has {self.settings.batch_size} of each: give a smaller --batch-size"
                )
            warn_of_few(split, name, self.report)
        return found

    def _identity(self, splits: Mapping[str, Split]) -> dict[str, Any]:
        texts = {
            name: content_digest(*(e.digest for e in [*split.train, *split.heldout]))
            for name, split in splits.items()
        }
        digests = {name: each.digest for name, each in self.adapters.items()}
        how = {**self.settings.identity(), "order": list(self.adapters)}
        return {**how, "adapters": digests, "texts": texts}

    def _taught(
        self, splits: Mapping[str, Split]
    ) -> tuple[dict[str, SoftTargetCache], dict[str, dict[str, Any]]]:
        """What each adapter says of its own texts, and how well it recalls them."""
        caches, figures = {}, {}
        for name, adapter in self.adapters.items():
            config, split = self._config(name), splits[name]
            cache = adapter.examples(config).targets(self.work.path / "soft_targets")
            assert isinstance(cache, SoftTargetCache)
            needed = [*split.train, *split.heldout]
            total = sum(example.count for example in cache.missing(needed))
            bare, adapted = adapter.load()
            self._phase(f"what {name} says", total, "tokens")
            with adapter.adapted.lent(adapted):
                cache.fill(adapter.adapted, needed, batch_size=config.batch_size)
            figures[name] = self._figures(name, adapted, split)
            bare.release()
            adapted.release()
            caches[name] = cache
        return caches, figures

    def _figures(self, name: str, model: LanguageModel, split: Split) -> dict[str, Any]:
        return domain_figures(name, model, split, self._config(name), self.settings.answers)

    def _train(self, splits: Mapping[str, Split], caches: Mapping[str, SoftTargetCache]) -> None:
        config = self._config(next(iter(splits)))
        student = self.base.load()
        document = make_trainable(student, config)
        self._phase("training", config.num_iters, "steps")
        trainer = Trainer(
            student.model,
            next(iter(caches.values())).loss(student, config),
            DomainBatches(
                [
                    TargetBatches(
                        split.train, config.batch_size, caches[name], temperature=1.0, seed=number
                    )
                    for number, (name, split) in enumerate(splits.items(), config.seed)
                ]
            ),
            _heldout(splits, caches, config.batch_size),
            trainer_settings(config),
            self.work.path,
            report=self.report,
        )
        training = trainer.run(resume=True)
        tensors = trained_tensors(student)
        student.release()
        document |= {
            "model": self.base.openable_name,
            "conch_dna": {
                "domain": self.folder.parent.name,
                "student": self.base.model_id,
                "student_digest": self.base.weights_digest,
                "config": config.to_json(),
                "best_step": training.best_step,
                **provenance(),
            },
        }
        candidate = self.work.path / CANDIDATE
        save_adapter(candidate, tensors, document)
        load_verified(self.base, candidate, tensors).release()

    def _judged(
        self, splits: Mapping[str, Split], own: Mapping[str, dict[str, Any]]
    ) -> dict[str, GateVerdict]:
        """What the gate says of each domain, the merged adapter against the domain's own."""
        self._phase("measuring the merged adapter", 0, "")
        candidate = replace(next(iter(self.adapters.values())), folder=self.work.path / CANDIDATE)
        bare, merged = candidate.load()
        settings = GateSettings(recall_margin=self.settings.recall_margin, seed=self.settings.seed)
        verdicts = {}
        for name, split in splits.items():
            found = self._figures(name, merged, split)
            verdict = recall_gate(found, own[name], settings)
            figures = {
                **verdict.figures,
                "without": float(np.mean(recall_of(bare, split, self._config(name)).top1)),
                "valid": found["valid"],
                "own_valid": own[name]["valid"],
            }
            # The gate names the figure, and each domain has one.
            reason = f"{name}: {verdict.reason.replace('the parent', 'its own adapter')}"
            verdicts[name] = replace(verdict, reason=reason, figures=figures)
        bare.release()
        merged.release()
        return verdicts

    def _take(self, splits: Mapping[str, Split], verdicts: Mapping[str, GateVerdict]) -> None:
        """Put what was measured in its place, with its figures and the texts of all."""
        heldout = [record for split in splits.values() for record in split.heldout_records]
        learned = [record for split in splits.values() for record in split.train_records]
        document = {
            "adapters": {name: str(each.folder) for name, each in self.adapters.items()},
            "settings": self.settings.to_json(),
            "verdicts": {name: asdict(each) for name, each in verdicts.items()},
            **provenance(),
        }
        write_folder(
            self.folder,
            documents={
                MERGED_FILE: document,
                DATA_FILE: json_lines([*learned, *heldout]),
                HELDOUT_FILE: json_lines(heldout),
            },
            writers=self.work.writers(CANDIDATE),
        )

    def _phase(self, name: str, total: int, unit: str) -> None:
        self.report("phase", {"name": name, "total": total, "unit": unit})


def adapters_of(
    names: Sequence[str], root: Path, *, trust_remote_code: bool, report: Report
) -> dict[str, AdapterSource]:
    """Adapters by what a command calls them.

    Args:
        names: Domains, or NAME=FOLDER.
        root: Folder of all domains' adapters.
        trust_remote_code: Let Python code that comes with a model run.
        report: Gets what is said of them.

    Raises:
        ConchError: One is not there, or named twice.
    """
    found: dict[str, AdapterSource] = {}
    for each in names:
        name, _, folder = each.partition("=")
        validate_domain(name, with_own_data=True)
        if name in found:
            raise ConchError(f"{name} is named twice: name each adapter once")
        path = Path(folder).expanduser() if folder else active_adapter(root, name)
        found[name] = AdapterSource.open(path, trust_remote_code=trust_remote_code, report=report)
    return found


def merge_table(verdicts: Mapping[str, GateVerdict]) -> "Table":
    """What is left of each domain: recall and valid answers, merged beside its own adapter."""
    columns = ("domain", "without", "own", "merged", "95% interval", "valid, own", "merged")
    rows = []
    for name, verdict in verdicts.items():
        found = verdict.figures
        interval = found.get("interval")
        rows.append(
            (
                name,
                f"{found['without']:.1%}",
                f"{found['parent']:.1%}",
                f"{found['child']:.1%}",
                "{:+z.1%} to {:+z.1%}".format(*interval) if interval else "–",
                *(_counted(found[key]) for key in ("own_valid", "valid")),
            )
        )
    return text_table("recall of held-out texts", columns, rows, numbers=columns[1:])


def _counted(valid: Sequence[float]) -> str:
    return f"{round(sum(valid))} of {len(valid)}" if valid else "–"
