"""The data of a line: what generation 0 brings, what a new one learns from and is judged by.

Knows records, examples and a line's folders; nothing of training or gates. What earlier generations
learned and held out lies in their folders, so nothing but the new data has to be given.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from conch_dna.checkpoints import content_digest, remove_unfinished, write_folder
from conch_dna.errors import ConchError
from conch_dna.generations.line import MANIFEST_FILE, Line
from conch_dna.generations.replay import ReplayBatches, create_replay_buffer
from conch_dna.generations.settings import EvolveConfig
from conch_dna.generations.two_teachers import TwoTeacherTargets
from conch_dna.language_model import ADAPTER_FILES, ModelSource
from conch_dna.training.batches import Batch, Example
from conch_dna.training.cross_tokenizer.records import AlignedExample
from conch_dna.training.data.examples import Examples
from conch_dna.training.data.records import Record, json_lines, read_records, split_heldout
from conch_dna.training.data.views import view
from conch_dna.training.runs.domain_run import HELDOUT_FILE
from conch_dna.training.settings import STUDENT

DATA_FILE = "data.jsonl"


@dataclass(frozen=True, eq=False)
class GenerationData:
    """The tokenized data of a generation.

    Attributes:
        train: New examples to learn from.
        heldout: New ones to be judged by.
        replay: Earlier ones to learn from again.
        recall: Earlier ones to be judged by.
        train_records: What `train` was made of.
        heldout_records: What `heldout` was made of.
        aligned: For each teacher with another tokenizer, by its role: its example for the digest of
            each that it teaches.
    """

    train: list[Example]
    heldout: list[Example]
    replay: list[Example]
    recall: list[Example]
    train_records: list[Record]
    heldout_records: list[Record]
    aligned: Mapping[str, Mapping[str, AlignedExample]]

    @property
    def with_targets(self) -> list[Example]:
        """All that needs the teachers' targets."""
        return [*self.train, *self.heldout, *self.replay]

    @property
    def judged_by(self) -> list[Example]:
        """All that is held out, the new ones first."""
        return [*self.heldout, *self.recall]


class TwoTeacherBatches(ReplayBatches):
    """A seeded stream of new and replayed examples that carry the target of two teachers."""

    def __init__(
        self, data: GenerationData, targets: TwoTeacherTargets, config: EvolveConfig
    ) -> None:
        super().__init__(
            data.train,
            data.replay,
            config.training.batch_size,
            share=config.replay_share if data.replay else 0.0,
            seed=config.training.seed,
        )
        self.targets = targets
        self.temperature = config.training.temperature

    @property
    def digest(self) -> str:
        """Content address of the stream and of the targets in it."""
        return content_digest(super().digest, self.targets.digest, str(self.temperature))

    def batch(self, index: int) -> Batch:
        """Batch `index` of the stream with its targets."""
        examples = [self.examples[i] for i in self.indices(index)]
        return self.targets.collate(examples, self.temperature)


def init_line(
    line: Line,
    model_id: str,
    records: Sequence[Record],
    *,
    config: EvolveConfig | None = None,
    adapter: Path | None = None,
) -> str:
    """Begin a line with a model as generation 0.

    Args:
        line: It must not exist yet.
        model_id: The base of all generations: a hub id, a folder or an embedded name.
        records: What it was trained on, or should not forget: later generations replay these and
            are measured on a part of them.
        config: For the split.
        adapter: An adapter that belongs to the model. What it held out of its own training, in
            `heldout.jsonl` of its folder, stays held out, and nothing else is.

    Returns:
        The generation's name.

    Raises:
        ConchError: The line exists, or the records cannot be split.
    """
    config = config or EvolveConfig()
    folder = Path(model_id).expanduser()
    model_id = str(folder.resolve()) if folder.is_dir() else model_id
    base = ModelSource(model_id)
    train, heldout = _split(records, config, adapter)
    with line.lock():
        remove_unfinished(line.folder)
        if line.generations():
            raise ConchError(
                f"line {line.name!r} has generations already: evolve it, or choose another name"
            )
        manifest = line.next_manifest(
            (None, None),
            seed=config.training.seed,
            base={"model": model_id, **base_digests(base)},
            digests={"parents": {}, "data": data_digest(records)},
        )
        writers: dict[str, Callable[[Path], Any]] = {}
        if adapter is not None:
            writers = {name: partial(shutil.copyfile, adapter / name) for name in ADAPTER_FILES}
        documents = {MANIFEST_FILE: manifest, **record_files(train, heldout)}
        write_folder(line.candidate, documents=documents, writers=writers)
        return line.promote(line.candidate, event="init")


def _split(
    records: Sequence[Record], config: EvolveConfig, adapter: Path | None
) -> tuple[list[Record], list[Record]]:
    """What generation 0 was trained on, and what it held out."""
    path = adapter / HELDOUT_FILE if adapter else None
    if path is not None and path.is_file():
        heldout = read_records(path)
        texts = {json_lines([record]) for record in heldout}
        return [record for record in records if json_lines([record]) not in texts], heldout
    seed = config.training.seed
    parts = split_heldout(records, config.training.val_fraction, seed=seed)
    train, heldout = ([records[index] for index in part] for part in parts)
    return train, heldout


def record_files(train: Sequence[Record], heldout: Sequence[Record]) -> dict[str, str]:
    """The files in a generation's folder that keep what it learned from and what it held out."""
    return {DATA_FILE: json_lines(train), HELDOUT_FILE: json_lines(heldout)}


def data_digest(records: Sequence[Record]) -> str:
    """Content address of records in their order."""
    return content_digest(json.dumps(list(records), sort_keys=True))


def base_digests(base: ModelSource) -> dict[str, str]:
    """Content addresses of a line's base model and of its tokenizer."""
    return {"weights": base.weights_digest, "tokenizer": base.tokenizer_digest}


def earlier_records(line: Line, names: Sequence[str], file: str) -> dict[str, list[Record]]:
    """The records in one file of every generation, by its name; none for one that kept none."""
    paths = {name: line.path(name) / file for name in names}
    return {
        name: read_records(path) if path.is_file() and path.stat().st_size else []
        for name, path in paths.items()
    }


def _as_learned(earlier: Mapping[str, Sequence[Record]], template: bool) -> dict[str, list[Record]]:
    """Earlier records as their generations read them: what only a teacher was shown is gone."""
    return {
        name: [view(record, STUDENT, template=template) for record in records]
        for name, records in earlier.items()
    }


def gather(
    line: Line,
    chain: Sequence[str],
    examples: Examples,
    records: Sequence[Record],
    config: EvolveConfig,
    *,
    foreign: Mapping[str, Examples],
) -> GenerationData:
    """Tokenize and split new data, and draw from those of the generations before.

    Args:
        line: For what they kept.
        chain: The parent, its parent, and so on.
        examples: Of the line's base.
        records: New ones.
        config: Shares, sizes, split and seed.
        foreign: What makes the examples of teachers with another tokenizer, by their role; what
            one of them cannot be given is left out.

    Raises:
        ConchError: Earlier generations kept nothing to be measured on, or to replay.
    """
    seed = config.training.seed
    template = examples.student.tokenizer.has_chat_template
    earlier = _as_learned(earlier_records(line, chain, HELDOUT_FILE), template)
    recall = create_replay_buffer(earlier, config.measured, seed=seed)
    aligned: dict[str, dict[str, AlignedExample]] = {role: {} for role in foreign}
    kept, new = _examples(examples, foreign, records, aligned)
    records = [records[index] for index in kept]
    train, heldout = split_heldout(records, config.training.val_fraction, seed=seed)
    replay: list[Record] = []
    if config.replay_share:
        earlier = _as_learned(earlier_records(line, chain, DATA_FILE), template)
        replay = create_replay_buffer(earlier, config.replay_size, seed=seed)
    return GenerationData(
        train=[new[index] for index in train],
        heldout=[new[index] for index in heldout],
        replay=_examples(examples, foreign, replay, aligned)[1] if replay else [],
        recall=examples.make(recall)[1],
        train_records=[records[index] for index in train],
        heldout_records=[records[index] for index in heldout],
        aligned=aligned,
    )


def _examples(
    examples: Examples,
    foreign: Mapping[str, Examples],
    records: Sequence[Record],
    aligned: Mapping[str, dict[str, AlignedExample]],
) -> tuple[list[int], list[Example]]:
    """Indices of the records that every teacher can be given, and their examples.

    What the foreign ones read is added to `aligned`.
    """
    kept, ours = examples.make(records)
    for role, theirs_of in foreign.items():
        places, theirs = theirs_of.make([records[index] for index in kept])
        kept = [kept[place] for place in places]
        ours = [ours[place] for place in places]
        pairs = zip(ours, theirs, strict=True)
        aligned[role].update((own.digest, other) for own, other in pairs)
    return kept, ours
