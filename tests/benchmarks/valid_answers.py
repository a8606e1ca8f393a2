"""Valid JSON of held-out prompts: written freely, asked for once more, and held to the schema.

    python tests/benchmarks/valid_answers.py --model FOLDER [--distilled FOLDER] [--prompts 50]
        [--domains thinking task memory] [--tokens 160] [--output FOLDER]

The model bare, without a system prompt, and with the adapters that prompt_distillation.py left in
--distilled. EGO is the model with the domain's system prompt and demonstrations: agreement is the
share of an answer's tokens that it would have taken too. What is finished is not done again.
"""

import conch_dna  # noqa: F401  # isort: skip  (loads a BLAS before mlx)

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _setting import print_setting
from rich.console import Console
from scipy.stats import binomtest

from conch_dna.checkpoints import read_json, write_json
from conch_dna.cortex.engine.adapter_bank import AdapterBank
from conch_dna.cortex.engine.batching import AnswerEngine, Piece, Request
from conch_dna.errors import ConchError
from conch_dna.generations.promotion import text_scores
from conch_dna.language_model import ModelSource
from conch_dna.screen.presentation import text_table
from conch_dna.training.chats.conversations import prompt_ids
from conch_dna.training.data.answers import continuation_text
from conch_dna.training.data.records import read_records, tokenize_record
from conch_dna.training.data.views import demonstration_turns
from conch_dna.training.distillation import domain_system
from conch_dna.training.settings import KDConfig, get_kd_adapter_path
from conch_dna.training.structured_answers import DOMAIN_SCHEMAS, parse_answer, repair_messages

PROMPTS = Path(__file__).parent / "prompts"
DOMAINS = ("thinking", "task", "memory")
KINDS = ("off", "on")
WAYS = ("free", "repaired", "held")


class Answers:
    """Answers of one adapter, or of none, to one domain's prompts.

    Args:
        engine: With the adapter.
        adapter: Its name; None for the bare model.
        domain: Whose schema and demonstrations.
        prompts: What users ask.
        tokens: Longest answer.
    """

    def __init__(
        self,
        engine: AnswerEngine,
        adapter: str | None,
        domain: str,
        prompts: Sequence[str],
        tokens: int,
    ) -> None:
        self.engine = engine
        self.adapter = adapter
        self.domain = domain
        self.schema = DOMAIN_SCHEMAS[domain]
        self.asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
        self.tokens = tokens

    def measure(self) -> dict[str, list[dict[str, Any]]]:
        """Rows by way: text, whether valid, whether ended, seconds a token, share removed."""
        free = self._answers(self.asked, form=None)
        again = [place for place, row in enumerate(free) if not row["valid"]]
        repairs = []
        for place in again:
            problems = parse_answer(free[place]["text"], self.schema).problems
            turns = self.asked[place]
            repairs.append(repair_messages(turns, free[place]["text"], problems, self.schema))
        repaired = list(free)
        for place, row in zip(again, self._answers(repairs, form=None), strict=True):
            repaired[place] = row
        held = self._answers(self.asked, form=json.dumps(self.schema))
        return {"free": free, "repaired": repaired, "held": held}

    def _answers(
        self, conversations: Sequence[Sequence[dict[str, str]]], *, form: str | None
    ) -> list[dict[str, Any]]:
        tokenizer = self.engine.bank.base.tokenizer
        rows = []
        for start in range(0, len(conversations), self.engine.max_batch):
            requests = [
                Request(
                    domain=self.adapter,
                    tokens=tuple(prompt_ids(tokenizer, list(turns), "")),
                    max_tokens=self.tokens,
                    form=form,
                )
                for turns in conversations[start : start + self.engine.max_batch]
            ]
            began = time.process_time()
            answers = self.engine.run(requests)
            each = (time.process_time() - began) / sum(map(len, answers))
            rows += [self._row(*pair, each) for pair in zip(requests, answers, strict=True)]
        return rows

    def _row(self, request: Request, pieces: Sequence[Piece], seconds: float) -> dict[str, Any]:
        ids = [piece.token for piece in pieces if piece.finish_reason != "stop"]
        text = continuation_text(self.engine.bank.base.tokenizer, request.tokens, ids)
        removed = [piece.removed for piece in pieces if piece.removed is not None]
        return {
            "text": text,
            "valid": parse_answer(text, self.schema).valid,
            "ended": pieces[-1].finish_reason == "stop",
            "seconds": seconds,
            "removed": float(np.mean(removed)) if removed else None,
        }

    def agreement(self, source: ModelSource, rows: Sequence[dict[str, Any]]) -> list[float | None]:
        """Of each answer the share of tokens that EGO would take too."""
        before = demonstration_turns(
            read_records(PROMPTS / "demonstrations" / f"{self.domain}.jsonl")
        )
        system = {"role": "system", "content": domain_system(self.domain)}
        examples, places = [], []
        for place, (turns, row) in enumerate(zip(self.asked, rows, strict=False)):
            answer = {"role": "assistant", "content": row["text"]}
            told = [{**turn, "weight": 0} for turn in before]
            record = {"messages": [system, *told, *turns, answer]}
            try:
                examples.append(tokenize_record(record, source.tokenizer, name=f"answer {place}"))
            except ConchError:
                continue
            places.append(place)
        scores = text_scores(source.resident(), examples, batch_size=1)
        shares: list[float | None] = [None] * len(rows)
        for place, share in zip(places, scores.top1.tolist(), strict=True):
            shares[place] = share
        return shares


def share_of(flags: Sequence[bool]) -> str:
    """A share with its 95% interval."""
    low, high = binomtest(sum(flags), len(flags)).proportion_ci(method="exact")
    return f"{sum(flags)} of {len(flags)} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Measure what is missing, and print a table of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--distilled", help="what prompt_distillation.py left")
    parser.add_argument("--domains", nargs="+", default=DOMAINS, choices=DOMAINS)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--compared", type=int, default=16, help="answers that EGO reads")
    parser.add_argument("--output", default="models/valid_answers")
    args = parser.parse_args()
    print_setting(f"{args.model}, answers of at most {args.tokens} tokens")
    source = ModelSource(args.model)
    bank = AdapterBank(source.load())
    table = []
    for domain in args.domains:
        with open(PROMPTS / f"{domain}.jsonl", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        prompts = [row["prompt"] for row in rows if row["part"] == "test"][: args.prompts]
        adapters: dict[str, str | None] = {"bare": None}
        for kind in KINDS if args.distilled else ():
            config = KDConfig(output_dir=args.distilled, run=kind)
            folder = get_kd_adapter_path(domain, config)
            if folder.is_dir():
                adapters[kind] = f"{domain}-{kind}"
                bank.add(f"{domain}-{kind}", folder)
        for kind, adapter in adapters.items():
            engine = AnswerEngine(bank, max_batch=args.batch)
            answers = Answers(engine, adapter, domain, prompts, args.tokens)
            path = Path(args.output) / f"{domain}-{kind}.json"
            if path.is_file():
                found = read_json(path, needs={})
            else:
                found = answers.measure()
                for way in WAYS:
                    shares = answers.agreement(source, found[way][: args.compared])
                    for row, share in zip(found[way], shares, strict=False):
                        row["agreement"] = share
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, found)
            engine.close()
            for way in WAYS:
                table.append((domain, kind, way, *figures(found[way])))
                print("  ".join(table[-1]), flush=True)
    head = ("domain", "model", "way", "valid", "of those that end", "ms a token", "removed", "EGO")
    Console(width=140).print(text_table("Valid JSON", head, table))


def figures(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """What a table says of answers written in one way."""
    ended = [row["valid"] for row in rows if row["ended"]]
    removed = [row["removed"] for row in rows if row["removed"] is not None]
    agreed = [row["agreement"] for row in rows if row.get("agreement") is not None]
    return (
        share_of([row["valid"] for row in rows]),
        share_of(ended) if ended else "none ends",
        f"{1000 * np.median([row['seconds'] for row in rows]):.1f}",
        f"{np.mean(removed):.3f}" if removed else "",
        f"{np.mean(agreed):.3f} (n = {len(agreed)})" if agreed else "",
    )


if __name__ == "__main__":
    main()
