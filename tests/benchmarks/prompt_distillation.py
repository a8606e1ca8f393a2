"""A domain's prompt and demonstrations moved into an adapter of the same model.

    python tests/benchmarks/prompt_distillation.py --model FOLDER [--domains thinking task memory]
        [--steps 60] [--kinds off on] [--output FOLDER]

The teacher reads the system prompt and eight short demonstrations, the student neither. Five
conditions: the model bare, with the system prompt alone, distilled from the teacher's answers,
distilled with half of the batches its own answers, and the teacher itself. Each on prompts that no
training saw: valid JSON of greedy answers, KL to the teacher on the teacher's answers and on its
own, length, repetition. What is finished is not done again.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads a BLAS before mlx)

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _setting import print_setting
from rich.console import Console
from scipy.stats import binomtest

from conch_dna.checkpoints import read_json, write_json
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.metrics import paired_interval
from conch_dna.screen.presentation import text_table
from conch_dna.screen.progress import Progress
from conch_dna.training.chats.conversations import prompt_ids
from conch_dna.training.data.answers import answer_batch, generate_answers, teacher_prompt_ids
from conch_dna.training.data.examples import Examples
from conch_dna.training.data.records import read_records
from conch_dna.training.data.views import (
    asked_turns,
    demonstration_turns,
    prompt_text,
    with_context,
)
from conch_dna.training.distillation import domain_system
from conch_dna.training.runs.on_policy.own_answers import (
    answer_figures,
    answers_of,
    readable_answers,
    teacher_distances,
)
from conch_dna.training.runs.on_policy.questions import Question, questions_of
from conch_dna.training.settings import STUDENT, SYSTEMS, KDConfig, get_kd_adapter_path
from conch_dna.training.true_kd import TrueKnowledgeDistiller

PROMPTS = Path(__file__).parent / "prompts"
CONDITIONS = ("bare", "system", "off", "on", "teacher")
REPEATS = 12
CONFIG = KDConfig(
    teacher_system="domain",
    student_system="none",
    alpha=1.0,
    temperature=1.0,
    lora_keys="all",
    learning_rate=5e-4,
    batch_size=4,
    max_tokens=128,
    num_iters=60,
    steps_per_eval=30,
    steps_per_save=10,
)
KINDS: dict[str, dict[str, Any]] = {
    "off": {},
    "on": {"on_policy": 0.5, "rollout_tokens": 64, "rollouts": 32},
}
# Of so many test prompts also the distance to the teacher, which takes most of the time.
COMPARED = 24


class Domain:
    """Everything of one domain, in its own folder.

    Args:
        name: Of the domain.
        model: Teacher and student.
        steps: Of each training.
        output: Of all domains.
        test_prompts: Held out.
    """

    def __init__(self, name: str, model: str, steps: int, output: Path, test_prompts: int) -> None:
        self.name = name
        self.model_name = model
        self.model = ModelSource(model)
        self.folder = output / name / "measured"
        self.config = replace(CONFIG, output_dir=str(output), num_iters=steps)
        self.greedy = replace(self.config, sampling_temperature=0.0, samples_per_prompt=1)
        with open(PROMPTS / f"{name}.jsonl", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        turns = demonstration_turns(read_records(PROMPTS / "demonstrations" / f"{name}.jsonl"))
        self.train, self.test = (
            [with_context(row["prompt"], turns) for row in rows if row["part"] == part]
            for part in ("train", "test")
        )
        self.test = self.test[:test_prompts]

    def distil(self, kind: str) -> None:
        """Train one kind of adapter, or go on with it."""
        config = replace(self.config, run=kind, **KINDS[kind])
        with Progress(plain=True) as report:
            distiller = TrueKnowledgeDistiller(
                self.model_name, self.model_name, config, report=report
            )
            distiller.distill_domain(self.name, prompts=self.train, resume=True)

    def measured(self, condition: str) -> dict[str, Any]:
        """Figures of a condition by test prompt, read back where they are there."""
        path = self.folder / f"{condition}.json"
        if path.is_file():
            return read_json(path, needs={"figures": list})
        figures = self._figures(condition)
        found = {"condition": condition, "figures": figures, **self._first_token(condition)}
        write_json(path, found)
        return found

    def _teacher_answers(self) -> list[dict[str, Any]]:
        return generate_answers(
            self.model,
            self.test,
            system=domain_system(self.name),
            student_system="",
            config=self.greedy,
            folder=self.folder / "answers",
        )

    def _figures(self, condition: str) -> list[dict[str, float | None]]:
        student_system = "domain" if condition == "system" else "none"
        config = replace(self.greedy, student_system=student_system)
        examples = Examples(self.model, self.model, config, domain=self.name)
        answers = self._teacher_answers()
        if condition == "system":
            # A record says what each side reads.
            own = domain_system(self.name)
            answers = [{**record, SYSTEMS[STUDENT]: own} for record in answers]
        questions = questions_of(answers, self._names(answers), self.model.tokenizer)
        assert len(questions) == len(answers)
        if condition == "teacher":
            said = [
                record["tokens"]["ids"][record["tokens"]["prompt_length"] :] for record in answers
            ]
            return [
                {"kl_given": 0.0, "kl_own": 0.0, **self._figures_of(question, answer)}
                for question, answer in zip(questions, said, strict=True)
            ]
        kept, given = examples.make(answers[:COMPARED])
        assert len(kept) == COMPARED
        targets = examples.targets(self.folder / "soft_targets")
        targets.fill(self.model, given, batch_size=config.batch_size)
        self.model.release()
        student = self._student(condition)
        said = answers_of(student, questions, config)
        on_given = teacher_distances(student, dict(enumerate(given)), targets, config)
        student.release()
        read = readable_answers(examples, questions[:COMPARED], said[:COMPARED])
        targets.fill(self.model, list(read.values()), batch_size=config.batch_size)
        self.model.release()
        student = self._student(condition)
        on_own = teacher_distances(student, read, targets, config)
        student.release()
        return [
            {
                "kl_given": on_given.get(number),
                "kl_own": on_own.get(number),
                **self._figures_of(question, answer),
            }
            for number, (question, answer) in enumerate(zip(questions, said, strict=True))
        ]

    def _names(self, answers: Sequence[Any]) -> list[str]:
        return [f"prompt {number}" for number in range(1, len(answers) + 1)]

    def _figures_of(self, question: Question, answer: Sequence[int]) -> dict[str, float]:
        return answer_figures(question, answer, self.model.tokenizer, self.name)

    def _student(self, condition: str) -> LanguageModel:
        adapter = None
        if condition in KINDS:
            adapter = get_kd_adapter_path(self.name, replace(self.config, run=condition))
        return self.model.load(adapter_path=adapter)

    def _first_token(self, condition: str) -> dict[str, float]:
        """Tokens of a request's prompt (mean), and seconds to its first token (median)."""
        tokenizer, system = self.model.tokenizer, domain_system(self.name)
        prompts = {
            "teacher": [teacher_prompt_ids(tokenizer, each, system) for each in self.test],
            "system": [
                prompt_ids(tokenizer, asked_turns(prompt_text(p), ""), system) for p in self.test
            ],
        }.get(condition) or [
            prompt_ids(tokenizer, asked_turns(prompt_text(each), ""), "") for each in self.test
        ]
        student = self._student(condition)
        seconds = []
        for ids in prompts[: REPEATS + 1]:
            began = time.perf_counter()
            answer_batch(student, [ids], max_tokens=1, temperature=0.0, seed=(0,))
            seconds.append(time.perf_counter() - began)
        student.release()
        return {
            "prompt_tokens": statistics.mean(map(len, prompts)),
            # The first is warm-up.
            "first_token_seconds": statistics.median(seconds[1:]),
        }


def share(values: Sequence[float]) -> str:
    """A share with its exact 95% interval."""
    good = round(sum(values))
    low, high = binomtest(good, len(values)).proportion_ci()
    return f"{good} of {len(values)} ({low:.2f} to {high:.2f})"


def mean(values: Sequence[float | None], seed: int = 0) -> str:
    """A mean with its bootstrapped 95% interval."""
    known = np.array([value for value in values if value is not None])
    low, high = paired_interval(known, np.zeros(len(known)), confidence=0.95, seed=seed)
    return f"{known.mean():.3f} ({low:.3f} to {high:.3f})"


def row_of(found: dict[str, Any]) -> tuple[str, ...]:
    """A condition's row in the table."""
    column = {name: [row[name] for row in found["figures"]] for name in found["figures"][0]}
    return (
        found["condition"],
        share(column["valid"]),
        mean(column["kl_given"]),
        mean(column["kl_own"]),
        mean(column["repetition"]),
        f"{statistics.mean(column['tokens']):.0f}",
        f"{statistics.mean(column['ended']):.2f}",
        f"{found['prompt_tokens']:.0f}",
        f"{found['first_token_seconds']:.2f}",
    )


def main() -> None:
    """Do what is not finished, and show all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id of an instruction model")
    parser.add_argument("--domains", nargs="+", default=["thinking", "task", "memory"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--steps", type=int, default=CONFIG.num_iters)
    parser.add_argument("--test-prompts", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path("models/prompt_distillation"))
    args = parser.parse_args()
    print_setting(f"{args.model} into itself, {args.steps} steps of {CONFIG.batch_size}")
    columns = ("", "valid JSON", "KL, teacher's", "KL, own", "repeated", "tokens", "ended")
    for name in args.domains:
        domain = Domain(name, args.model, args.steps, args.output, args.test_prompts)
        rows = []
        for condition in CONDITIONS:
            if condition in KINDS:
                if condition not in args.kinds:
                    continue
                domain.distil(condition)
            rows.append(row_of(domain.measured(condition)))
            print(name, *rows[-1], sep="  ", flush=True)
        table = text_table(name, (*columns, "prompt", "first token, s"), rows)
        Console(width=150).print(table)


if __name__ == "__main__":
    main()
