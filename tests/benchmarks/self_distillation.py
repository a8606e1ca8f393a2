"""A new skill learned in three ways, and what is lost of old ones.

    python tests/benchmarks/self_distillation.py --model FOLDER [--domain task] [--steps 24]
        [--seeds 3] [--output FOLDER]

The skill is a domain's JSON; its demonstrations are valid answers of the model that reads system
prompt and eight examples. From the same ones learn: fine-tuning on their texts; on-policy KD from
the model that reads what made them; self-distillation (arXiv 2601.19897), where it reads each
record's own answer. Measured on the model without any prompt: valid JSON of held-out prompts
(greedy), and cross-entropy of TinyStories and of gsm8k. What is finished is not done again.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads a BLAS before mlx)

import argparse
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _setting import print_setting, shared_data, spread
from prompt_distillation import CONFIG, Domain, share
from rich.console import Console

from conch_dna.checkpoints import read_json, write_json
from conch_dna.metrics import paired_interval
from conch_dna.screen.presentation import text_table
from conch_dna.screen.progress import Progress
from conch_dna.training.batches import Example
from conch_dna.training.data.answers import generate_answers
from conch_dna.training.data.records import read_records, tokenize_record
from conch_dna.training.data.views import CONTEXT, with_own_answer
from conch_dna.training.distillation import domain_system
from conch_dna.training.evaluation import token_scores
from conch_dna.training.runs.on_policy.own_answers import answer_figures, answers_of
from conch_dna.training.runs.on_policy.questions import question_of_record
from conch_dna.training.settings import get_kd_adapter_path
from conch_dna.training.structured_answers import DOMAIN_SCHEMAS, parse_answer
from conch_dna.training.true_kd import TrueKnowledgeDistiller

OLD, OLD_TEXTS, OLD_CHARACTERS = ("tinystories", "gsm8k"), 24, 500
ON_POLICY: dict[str, Any] = {"on_policy": 1.0, "rollout_tokens": 112, "rollouts": 24}
METHODS: dict[str, dict[str, Any]] = {
    "fine-tuning": {"alpha": 0.0},
    "prompted": {**ON_POLICY, "teacher_system": "domain"},
    "sdft": {**ON_POLICY, "teacher_system": "none"},
}


class Skill(Domain):
    """A domain as a skill, its demonstrations and its figures."""

    def demonstrations(self) -> list[dict[str, Any]]:
        """The first valid answer to each training prompt, with what the teacher read."""
        answers = generate_answers(
            self.model,
            self.train,
            system=domain_system(self.name),
            student_system="",
            config=replace(self.config, samples_per_prompt=3),
            folder=self.folder / "answers",
        )
        found: dict[str, dict[str, Any]] = {}
        for answer in answers:
            if parse_answer(answer["completion"], DOMAIN_SCHEMAS[self.name]).valid:
                found.setdefault(answer["prompt"], answer)
        self.model.release()
        return list(found.values())

    def records_for(self, method: str, shown: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What a method learns from."""
        kept = [{name: each[name] for name in ("prompt", "completion", CONTEXT)} for each in shown]
        if method == "prompted":
            return kept
        bare = [{name: each[name] for name in ("prompt", "completion")} for each in kept]
        return list(map(with_own_answer, bare)) if method == "sdft" else bare

    def learned(self, method: str, seed: int, shown: Sequence[dict[str, Any]]) -> Path:
        """An adapter of a method."""
        settings = {"teacher_system": "none", **METHODS[method]}
        config = replace(self.config, run=f"{method}-{seed}", seed=seed, **settings)
        with Progress(plain=True) as report:
            distiller = TrueKnowledgeDistiller("self", self.model_name, config, report=report)
            distiller.distill_domain(self.name, data=self.records_for(method, shown), resume=True)
        return get_kd_adapter_path(self.name, config)

    def figures(self, name: str, adapter: Path | None) -> dict[str, Any]:
        """Of the model with an adapter or without, by prompt and by text; read back if there."""
        path = self.folder / f"{name}.json"
        if path.is_file():
            return read_json(path, needs={"valid": list})
        model = self.model.load(adapter_path=adapter)
        tokenizer = model.tokenizer
        questions = [
            question_of_record({"prompt": each["prompt"], "completion": "-"}, tokenizer, "a prompt")
            for each in self.test
        ]
        answers = answers_of(model, questions, self.greedy)
        rows = [
            answer_figures(question, answer, tokenizer, self.name)
            for question, answer in zip(questions, answers, strict=True)
        ]
        found: dict[str, Any] = {each: [row[each] for row in rows] for each in rows[0]}
        for old in OLD:
            scores = token_scores(model, old_texts(old, tokenizer), batch_size=4)
            found[old] = [float(-each.log_probs.mean()) for each in scores]
        model.release()
        write_json(path, found)
        return found


def old_texts(name: str, tokenizer: Any) -> list[Example]:
    """Beginnings of texts of a data set that no method reads."""
    path = shared_data() / "text" / name / "test.jsonl"
    if not path.is_file():
        path = path.with_name("train.jsonl")
    found = []
    for record in itertools.islice(read_records(path), OLD_TEXTS):
        text = record.get("text") or f"{record['prompt']}\n{record['completion']}"
        whole = {"text": text[:OLD_CHARACTERS]}
        found.append(tokenize_record(whole, tokenizer, name=name, train_on_prompt=True))
    return found


def row_of(name: str, runs: Sequence[dict[str, Any]], bare: dict[str, Any]) -> tuple[str, ...]:
    """A method's row: validity of all its runs, and what is lost of each old text, paired."""
    lost = []
    for old in OLD:
        after = np.mean([run[old] for run in runs], axis=0)
        low, high = paired_interval(after, np.array(bare[old]), confidence=0.95, seed=0)
        change = statistics.mean(after) - statistics.mean(bare[old])
        lost.append(f"{change:+.4f} ({low:+.4f} to {high:+.4f})")
    valid = [valid for run in runs for valid in run["valid"]]
    each = spread([statistics.mean(run["valid"]) for run in runs], 2)
    return name, share(valid), each, *lost


def main() -> None:
    """Do what is not finished, and show all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id of an instruction model")
    parser.add_argument("--domain", default="task")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--test-prompts", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("models/self_distillation"))
    args = parser.parse_args()
    print_setting(f"{args.model}: {args.steps} steps of {CONFIG.batch_size}")
    skill = Skill(args.domain, args.model, args.steps, args.output, args.test_prompts)
    shown = skill.demonstrations()
    print(f"{len(shown)} valid demonstrations of {len(skill.train)} prompts", flush=True)
    bare = skill.figures("bare", None)
    done: dict[str, list[dict[str, Any]]] = {method: [] for method in args.methods}
    for seed, method in itertools.product(range(args.seeds), args.methods):
        adapter = skill.learned(method, seed, shown)
        done[method].append(skill.figures(f"{method}-{seed}", adapter))
        print(*row_of(method, done[method], bare), sep="  ", flush=True)
    rows = [row_of(method, runs, bare) for method, runs in done.items()]
    rows.insert(0, ("bare", share(bare["valid"]), "", "", ""))
    columns = ("", "valid JSON", "by seed", "TinyStories, nats more", "gsm8k, nats more")
    Console(width=150).print(text_table(args.domain, columns, rows))


if __name__ == "__main__":
    main()
