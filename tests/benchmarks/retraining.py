"""Retraining from recorded corrections of a real domain: its gain on them, its cost on the old.

    python tests/benchmarks/retraining.py [--steps 200] [--corrections 150] [--place KIND ...]

EGO is stories260K; the student, its layers 0, 2 and 4, has an adapter of beginnings of TinyStories.
Then it is asked the openings of questions of gsm8k, and EGO's answers are recorded as what should
have been said. Held-out KL to EGO and share of EGO's likeliest tokens, of the corrections and of
the old domain, before and after. `--place` sets where EGO teaches; see PLACES.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads OpenBLAS before mlx)

import argparse
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from _setting import print_setting, shared_data, short_stories

from conch_dna.generations.data import HELDOUT_FILE
from conch_dna.generations.line import Line
from conch_dna.generations.settings import EvolveConfig
from conch_dna.language_model import ModelSource
from conch_dna.retraining.domain import Retraining
from conch_dna.retraining.pipeline import TrainingPipeline
from conch_dna.training.batches import sequential_batches
from conch_dna.training.chats.conversations import prompt_ids
from conch_dna.training.data.answers import answer_batch, generate_answers
from conch_dna.training.data.answers import texts_of as answers_of
from conch_dna.training.data.examples import Examples
from conch_dna.training.data.records import read_records
from conch_dna.training.evaluation import heldout_metrics
from conch_dna.training.settings import KDConfig
from conch_dna.training.true_kd import TrueKnowledgeDistiller
from generations import settings_of, texts_of
from models import keep_layers

OLD = 400
DOMAIN = "stories"
PLACES: dict[str, dict[str, Any]] = {
    "EGO first": {},
    "EGO first at temperature 1": {"temperature": 1.0},
    "EGO first, half replayed": {"replay_share": 0.5},
    "no EGO, half replayed": {"first_teacher": "", "second_teacher": "", "replay_share": 0.5},
    "EGO second": {"first_teacher": "", "second_teacher": "EGO"},
    "no EGO": {"first_teacher": "", "second_teacher": ""},
}


class Placed(Retraining):
    """A retraining whose EGO teaches in another place."""

    place: ClassVar[dict[str, Any]] = {}

    @property
    def settings(self) -> EvolveConfig:
        """Those of a retraining, changed."""
        found = super().settings
        changes = {n: self.ego if v == "EGO" else v for n, v in self.place.items()}
        if (temperature := changes.pop("temperature", None)) is not None:
            changes["training"] = replace(found.training, temperature=temperature)
        return replace(found, **changes)


class PlacedPipeline(TrainingPipeline):
    """A pipeline of such retrainings."""

    def _retraining(self, domain: str) -> Retraining:
        return Placed(
            self.adapters_dir, domain, lambda: self._base, ego=self.ego, config=self.config
        )


def openings_of_questions(count: int) -> list[str]:
    """The first six words of questions, no two the same."""
    texts = [row["text"] for row in texts_of("gsm8k", "question", "train.jsonl")]
    return list(dict.fromkeys(" ".join(text.split()[:6]) for text in texts))[:count]


def figures(
    folder: Path,
    ego: ModelSource,
    student: ModelSource,
    config: KDConfig,
    line: Line,
    version: str,
    of: str,
) -> str:
    """Held-out figures of a version's adapter on what a version held out."""
    records = read_records(line.path(of) / HELDOUT_FILE)
    examples = Examples(ego, student, config)
    _, made = examples.make(records)
    targets = examples.targets(folder / "targets")
    targets.fill(ego, made, batch_size=8)
    ego.release()
    model = student.load(adapter_path=line.path(version))
    batches = (
        targets.evaluation_batch([made[i] for i in indices])
        for indices in sequential_batches(made, 8)
    )
    found = heldout_metrics(model, batches).to_json()
    model.release()
    return (
        f"KL {found['kl_nats']:.4f}, agreement {found['top1_agreement']:.4f}, cross-entropy "
        f"{found['cross_entropy']:.4f} ({len(made)} texts)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Retraining from recorded corrections.")
    parser.add_argument("--old-steps", type=int, default=200, help="of the distillation before")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--corrections", type=int, default=150)
    parser.add_argument("--place", action="append", choices=list(PLACES))
    arguments = parser.parse_args()
    shared_data()
    print_setting(f"retraining from {arguments.corrections} corrections, {arguments.steps} steps")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        whole = str(shared_data() / "models" / "stories260K")
        cut = str(keep_layers(Path(whole), folder / "cut", [0, 2, 4]))
        config = replace(
            settings_of(0, arguments.old_steps, folder / "adapters"),
            learning_rate=1e-3,
            max_tokens=48,
        )
        old = short_stories(OLD)
        TrueKnowledgeDistiller(whole, cut, config).distill_domain(DOMAIN, data=old)
        ego, student = ModelSource(whole), ModelSource(cut)
        prompts = openings_of_questions(arguments.corrections)
        better = generate_answers(ego, prompts, system="", config=config, folder=folder / "answers")
        ego.release()
        model = student.load(adapter_path=folder / "adapters" / DOMAIN / "adapters_kd")
        ids = [prompt_ids(student.tokenizer, prompt, "") for prompt in prompts]
        said = answer_batch(model, ids, max_tokens=48, temperature=0.7, seed=(0,))
        model.release()
        answers = answers_of(student.tokenizer, ids, said)
        for place in arguments.place or list(PLACES):
            adapters = folder / place.replace(" ", "-")
            shutil.copytree(folder / "adapters", adapters)
            training = replace(config, num_iters=arguments.steps, steps_per_eval=10)
            pipeline = PlacedPipeline(
                adapters, cut, ego=whole, config=EvolveConfig(training=training, measured=40)
            )
            Placed.place = PLACES[place]
            start = time.monotonic()
            for prompt, answer, record in zip(prompts, answers, better, strict=True):
                pipeline.record_correction(
                    DOMAIN,
                    prompt,
                    answer,
                    record["completion"],
                    finish_reason=record["finish_reason"],
                )
            recorded = time.monotonic() - start
            print(
                f"{place}: {pipeline.should_retrain(DOMAIN).reason}; recorded in {recorded:.2f} s"
            )
            start = time.monotonic()
            result = pipeline.retrain(DOMAIN, old_data=old)
            print(
                f"  {result.version} {'promoted' if result.promoted else 'refused'} after "
                f"{time.monotonic() - start:.0f} s, best step {result.metrics['best_step']}; "
                f"taught by {result.taught_by}"
            )
            for verdict in result.verdicts:
                print(f"    {'passed' if verdict.passed else 'FAILED'}: {verdict.reason}")
            line = pipeline.line(DOMAIN)
            for name, of in (("corrections", result.version), ("old domain", "G000")):
                for version in ("G000", result.version):
                    found = figures(folder, ego, student, config, line, version, of)
                    print(f"    {name}, {version.split('-')[0]}: {found}", flush=True)


if __name__ == "__main__":
    main()
