"""An adapter becomes part of its model: fused, in few bits, healed, judged, and only then there.

Ties the modules beside it together; knows what is in memory when. Each stage leaves in a working
folder what the next one needs, so that any of them can be interrupted.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from conch_dna.checkpoints import content_digest, provenance, write_folder
from conch_dna.errors import ConchError
from conch_dna.exporting.healing import healed_arrays
from conch_dna.exporting.judging import (
    Judgement,
    judged,
    kept_share,
    refusal,
    valid_answers,
    warn_of_few,
)
from conch_dna.exporting.mixed_bits import mixed_precision
from conch_dna.exporting.moments import input_moments
from conch_dna.exporting.quantised import (
    Precision,
    fuse_in_place,
    is_matrix,
    kept_whole,
    layers_of,
    precision_of,
    width_of,
    write_model,
)
from conch_dna.exporting.settings import FuseSettings
from conch_dna.exporting.source import AdapterSource
from conch_dna.exporting.work_folder import WorkFolder
from conch_dna.language_model import LanguageModel, ModelSource, named_arrays
from conch_dna.screen.progress import Report, silent
from conch_dna.training.adapters import outline
from conch_dna.training.batches import Example
from conch_dna.training.data.examples import Split
from conch_dna.training.data.soft_targets import SoftTargetCache
from conch_dna.training.runs.on_policy.questions import Question, questions_of
from conch_dna.training.settings import KDConfig, TrainingResult
from conch_dna.training.structured_answers import DOMAIN_SCHEMAS
from conch_dna.training.students.block_influence import first_windows
from conch_dna.training.students.student_folder import FUSED_FILE

CANDIDATE, HEALED = "candidate", "healed"
# Of the texts to train scales on, the share by which the step that is kept is chosen.
CHOOSING = 0.1
# Of texts on which the cost of a part in few bits is measured, once for each part.
COST_TOKENS = 1024


class Fusing:
    """One adapter on its way into its model; use `fused`.

    Args:
        adapter: What is fused.
        folder: Where the model is to stand.
        settings: How.
        data: A file of records; None for the adapter's own.
        report: Gets the progress.
    """

    def __init__(
        self,
        adapter: AdapterSource,
        folder: Path,
        settings: FuseSettings,
        *,
        data: Path | None = None,
        report: Report = silent,
    ) -> None:
        self.adapter = adapter
        self.folder = folder
        self.settings = settings
        self.data = data
        self.report = report
        self.work = WorkFolder(folder, "fusing", "model", report)
        names = ("batch_size", "val_fraction", "loss_memory", "seed")
        self.config: KDConfig = replace(
            adapter.config(), **{name: getattr(settings, name) for name in names}
        )
        self.precision: Precision = precision_of(adapter.base, settings)
        if settings.steps and self.precision.bits is None:
            raise ConchError(
                f"--steps train the scales of a quantised model, and {adapter.base.model_id} is "
                "whole: give --bits 4, or leave --steps out"
            )

    def fused(self, *, resume: bool = False, overwrite: bool = False) -> list[Judgement]:
        """Make the model, and put it in its place if it is good enough.

        Args:
            resume: Go on with what an interrupted or refused one of the same settings left.
            overwrite: Replace a folder that stands there, and what an interrupted one left.

        Returns:
            The adapter, the model without it, and the fused one, measured.

        Raises:
            ConchError: Bad settings for this model, a folder in the way, no texts, a full disk; or
                the fused model is refused.
        """
        self._require_room(overwrite=overwrite)
        with self.work.held():
            split = self._begin(resume=resume, overwrite=overwrite)
            rows = self._made(split)
            why = refusal(rows[1], rows[-1], self.settings.max_kl)
            if why:
                raise ConchError(
                    f"{why}. Nothing stands at {self.folder}: give a higher --max-kl with --resume "
                    "to take it, or with --overwrite more --bits, more --steps, or --bits float"
                )
            self._take(rows)
        self.work.remove()
        return rows

    def _require_room(self, *, overwrite: bool) -> None:
        self.work.require_place("config.json", overwrite=overwrite)
        if self.folder.resolve() in (
            self.adapter.folder.resolve(),
            self.adapter.base.folder.resolve(),
        ):
            raise ConchError(f"{self.folder} is what is fused: name another folder")
        outlined = outline(self.adapter.base)
        left = kept_whole(outlined.model, self.precision) if outlined else []
        if left:
            message = (
                f"{len(left)} layers stay whole, since groups of {self.precision.group_size} do "
                f"not divide their widths, such as {left[0]}"
            )
            self.report("message", {"message": message})

    def _begin(self, *, resume: bool, overwrite: bool) -> Split:
        """Read the texts, and compare with what lies in the working folder."""
        split = self.adapter.split(self.data, self.config)
        self._parts(split.train)
        warn_of_few(split, self.adapter.domain, self.report)
        identity = {
            **self.settings.identity(),
            "adapter": self.adapter.digest,
            "texts": content_digest(*(e.digest for e in [*split.train, *split.heldout])),
        }
        self.work.begin(identity, resume=resume, overwrite=overwrite)
        return split

    def _made(self, split: Split) -> list[Judgement]:
        """Every stage that is not done yet, and the figures."""
        choosing, learned = self._parts(split.train)
        targets = self.adapter.examples(self.config).targets(self.work.path / "soft_targets")
        assert isinstance(targets, SoftTargetCache)
        judging = self._costed_on(split.train)
        needed = [*split.heldout, *(split.train if self.settings.steps else judging)]
        questions = self._questions(split)
        bare, adapted = self.adapter.load()
        if missing := targets.missing(needed):
            total = sum(example.count for example in missing)
            self._phase("what the adapter says", total, "tokens")
        with self.adapter.adapted.lent(adapted):
            targets.fill(self.adapter.adapted, needed, batch_size=self.config.batch_size)
        self._phase("measuring the adapter", 0, "")
        valid = valid_answers(adapted, questions, self.config, self.adapter.domain)
        size = self.adapter.base.weight_bytes or 0
        rows = [
            Judgement("adapter", None, valid, size + _bytes_of(self.adapter.folder)),
            judged(*("without it", bare, split, targets, [], self.config, ""), nbytes=size),
        ]
        if not self.work.has(CANDIDATE):
            moments = self._moments(adapted, split.train)
            if judging:
                self.precision = mixed_precision(
                    *(adapted, self.precision, self.settings.mean_bits, moments),
                    *(judging, targets, self.config, self.report),
                )
            precision = fuse_in_place(adapted, self.precision, moments, self.report)
            arrays = named_arrays(adapted.model.parameters())
            write_model(self.adapter.base, self.work.path / CANDIDATE, arrays, precision)
        bare.release()
        adapted.release()
        made, training = self.work.path / CANDIDATE, None
        if self.settings.steps:
            made = self.work.path / HEALED
            if not self.work.has(HEALED):
                training = self._heal(targets, learned, choosing)
        self._phase("measuring the fused model", 0, "")
        source = ModelSource(
            str(made), trust_remote_code=self.adapter.base.trust_remote_code, report=self.report
        )
        fused = source.load()
        arguments = ("fused", fused, split, targets, questions, self.config)
        rows.append(judged(*arguments, self.adapter.domain, nbytes=source.weight_bytes or 0))
        fused.release()
        if training:
            self.report("message", {"message": f"scales: step {training.best_step} was kept"})
        return rows

    def _parts(self, train: Sequence[Example]) -> tuple[list[Example], list[Example]]:
        """The texts by which a step is chosen, and those that are trained on."""
        if not self.settings.steps:
            return [], []
        count = max(1, round(CHOOSING * len(train)))
        if len(train) - count < self.settings.batch_size:
            raise ConchError(
                f"{len(train)} texts, of which {count} choose the step, cannot fill a batch of "
                f"{self.settings.batch_size}: give more --data, or a smaller --batch-size"
            )
        return list(train[:count]), list(train[count:])

    def _costed_on(self, train: Sequence[Example]) -> list[Example]:
        """The texts on which it is measured what rounding a part costs."""
        if not self.settings.mean_bits:
            return []
        chosen: list[Example] = []
        for example in train:
            chosen.append(example)
            if sum(len(each.ids) for each in chosen) >= COST_TOKENS:
                break
        return chosen

    def _questions(self, split: Split) -> list[Question]:
        if self.adapter.domain not in DOMAIN_SCHEMAS or not self.settings.answers:
            return []
        names = [example.name for example in split.heldout]
        questions = questions_of(split.heldout_records, names, self.adapter.base.tokenizer)
        return questions[: self.settings.answers]

    def _moments(
        self, adapted: LanguageModel, train: Sequence[Example]
    ) -> dict[str, np.ndarray] | None:
        """Of the inputs of what is fitted; None where all is rounded or whole."""
        if self.settings.fit != "outputs" or self.precision.bits is None:
            return None
        wanted = {
            name: width_of(module)
            for name, module in layers_of(adapted.model)
            if is_matrix(module) and self.precision.of(name)
        }
        ids = [example.ids.tolist() for example in train]
        windows = first_windows(ids, tokens=self.settings.fit_tokens)
        tokens, widest = sum(map(len, windows)), max(wanted.values(), default=0)
        if tokens < 2 * widest:
            message = (
                f"{tokens:,} tokens of text are few to fit layers of {widest:,} numbers by, and "
                "may fit them worse than rounding: give more --data, or a higher --fit-tokens"
            )
            self.report("warning", {"message": message})
        return input_moments(adapted, wanted, windows, self.report)

    def _heal(
        self, targets: SoftTargetCache, learned: Sequence[Example], choosing: Sequence[Example]
    ) -> TrainingResult:
        candidate = ModelSource(
            str(self.work.path / CANDIDATE),
            trust_remote_code=self.adapter.base.trust_remote_code,
            report=self.report,
        )
        arrays, result = healed_arrays(
            *(candidate, targets, learned, choosing, self.settings, self.work.path),
            resume=True,
            report=self.report,
        )
        # Its own, layer by layer.
        precision = precision_of(candidate, FuseSettings())
        write_model(self.adapter.base, self.work.path / HEALED, arrays, precision)
        return result

    def _take(self, rows: Sequence[Judgement]) -> None:
        """Put what was measured in its place, with its figures."""
        document = {
            "adapter": str(self.adapter.folder),
            "model": self.adapter.base.model_id,
            "domain": self.adapter.domain,
            "settings": asdict(self.settings),
            "kept_share": kept_share(rows[1], rows[-1]),
            "figures": [row.to_json() for row in rows],
            **provenance(),
        }
        write_folder(
            self.folder,
            documents={FUSED_FILE: document},
            writers=self.work.writers(HEALED if self.settings.steps else CANDIDATE),
        )

    def _phase(self, name: str, total: int, unit: str) -> None:
        self.report("phase", {"name": name, "total": total, "unit": unit})


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
