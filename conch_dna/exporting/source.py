"""What is fused or exported: an adapter, the model it is for, and the texts it knows.

Knows adapter folders and records; computes nothing. Another place of texts: a branch in `_records`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from conch_dna.checkpoints import content_digest
from conch_dna.cortex.engine.adapter_modules import (
    SharedTree,
    adapter_digest,
    read_adapter,
    read_config,
)
from conch_dna.errors import ConchError
from conch_dna.generations.data import DATA_FILE as LINE_DATA
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.retraining.adapter_config import adapter_config, student_name, written_down
from conch_dna.screen.progress import Report
from conch_dna.training.data.examples import Examples, Split
from conch_dna.training.data.records import Record, read_records
from conch_dna.training.data.views import view
from conch_dna.training.runs.domain_run import DATA_FILE, HELDOUT_FILE
from conch_dna.training.settings import STUDENT, KDConfig

# The settings of a distillation that say how its texts are read.
_KEPT = ("max_seq_length", "max_tokens", "train_on_prompt", "too_long", "generation_batch_size")


@dataclass(frozen=True, eq=False)
class AdapterSource:
    """An adapter's folder and the model it is for.

    Attributes:
        folder: Of the adapter.
        base: The model without it.
        report: Gets what is said of both.
    """

    folder: Path
    base: ModelSource
    report: Report

    @classmethod
    def open(
        cls, folder: Path, *, model: str = "", trust_remote_code: bool, report: Report
    ) -> "AdapterSource":
        """Find an adapter and its model.

        Args:
            folder: With adapter_config.json and adapters.safetensors.
            model: Its model, where the folder does not tell or tells another place.
            trust_remote_code: Let Python code that comes with the model run.
            report: Gets what is said of both.

        Raises:
            ConchError: It is no adapter's folder or not whole, or its model is not known or not
                here.
        """
        name = model or student_name(read_config(folder))
        if not isinstance(name, str) or not name:
            raise ConchError(f"{folder} does not say which model it is for: give --model")
        base = ModelSource(name, trust_remote_code=trust_remote_code, report=report)
        return cls(folder, base, report)

    @cached_property
    def document(self) -> dict[str, Any]:
        """Its adapter_config.json."""
        return adapter_config(self.folder)

    @cached_property
    def adapted(self) -> ModelSource:
        """The model with it, as one that answers and teaches."""
        return ModelSource(
            self.base.model_id,
            trust_remote_code=self.base.trust_remote_code,
            adapter=self.folder,
            report=self.report,
        )

    @property
    def domain(self) -> str:
        """The domain that it was distilled for; empty where it does not tell."""
        name = written_down(self.document).get("domain")
        return name if isinstance(name, str) else ""

    @cached_property
    def digest(self) -> str:
        """Content address of both."""
        return content_digest(self.base.weights_digest, adapter_digest(self.folder))

    def load(self) -> tuple[LanguageModel, LanguageModel]:
        """The model without the adapter and with it, which share the model's arrays.

        Raises:
            ConchError: The adapter is broken, or of another model.
        """
        bare = self.base.load()
        shared = SharedTree(bare.model)
        adapter = read_adapter(self.folder, bare, shared)
        return bare, LanguageModel(self.base, adapter.tree)

    def config(self) -> KDConfig:
        """How its texts are read and compared: as when it was distilled, at temperature 1."""
        recorded = written_down(self.document).get("config")
        recorded = recorded if isinstance(recorded, dict) else {}
        return KDConfig(
            **{name: recorded[name] for name in _KEPT if name in recorded},
            temperature=1.0,
            alpha=1.0,
            sampling_temperature=0.0,
            # Or a model would be a little away from itself.
            target_bits=32,
        )

    def split(self, data: Path | None, config: KDConfig) -> Split:
        """Texts to fit and to judge by, as the student reads them; see `Examples.split`.

        Args:
            data: A file of records, a share of which is held out; None for those that the adapter
                was trained on, and those that were held out of that.
            config: How they are read.

        Raises:
            ConchError: There are none, or they cannot be read.
        """
        records, heldout = self._records(data)
        return self.examples(config).split(records, valid=heldout)

    def examples(self, config: KDConfig) -> Examples:
        """Makes examples of texts that the adapter teaches."""
        return Examples(self.adapted, self.base, config, report=self.report)

    def _records(self, data: Path | None) -> tuple[list[Record], list[Record]]:
        if data is not None:
            return self._as_read(read_records(data)), []
        given = [self.folder / name for name in (DATA_FILE, LINE_DATA)]
        path = next((each for each in given if each.is_file()), None)
        if path is None or not (self.folder / HELDOUT_FILE).is_file():
            raise ConchError(
                f"{self.folder} does not hold the texts that its adapter learned from and those "
                f"held out of them ({DATA_FILE}, {HELDOUT_FILE}): distil it again, or, to fuse it, "
                "give texts of its domain with --data FILE"
            )
        heldout = read_records(self.folder / HELDOUT_FILE)
        learned = [record for record in read_records(path) if record not in heldout]
        return self._as_read(learned), self._as_read(heldout)

    def _as_read(self, records: Sequence[Record]) -> list[Record]:
        """Records as the student reads them, which is what the adapter says something of."""
        template = self.base.tokenizer.has_chat_template
        return [view(record, STUDENT, template=template) for record in records]


def same_base(adapters: Mapping[str, AdapterSource]) -> ModelSource:
    """The model that several adapters are for.

    Raises:
        ConchError: There are fewer than two of them, one is given twice, or they are for other
            models.
    """
    if len(adapters) < 2:
        raise ConchError(f"{len(adapters)} adapter is given: name two or more")
    (first, adapter), *others = adapters.items()
    for name, other in others:
        if other.base.weights_digest != adapter.base.weights_digest:
            raise ConchError(
                f"{first} is for {adapter.base.model_id}, {name} for {other.base.model_id}: only "
                "adapters of one model can be merged; distil one of them anew"
            )
    by_digest: dict[str, str] = {}
    for name, each in adapters.items():
        if (other_name := by_digest.setdefault(each.digest, name)) != name:
            raise ConchError(f"{other_name} and {name} are the same adapter: name others")
    return adapter.base
