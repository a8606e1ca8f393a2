"""Speed of answers in batches of 16 against one by one.

python tests/benchmarks/generation_speed.py [--model FOLDER] [--tokens 128]
"""

import conch_dna  # noqa: F401  # isort: skip  (loads OpenBLAS before mlx)

import argparse
import json
import time
from pathlib import Path

from _setting import print_setting, spread

from conch_dna.language_model import ASSETS, ModelSource
from conch_dna.training.chats.conversations import prompt_ids
from conch_dna.training.data.answers import answer_batch
from conch_dna.training.data.records import read_prompts

ROUNDS = 3
PROMPTS = 16
OWN = "embedded:teacher"
QUESTIONS = Path(__file__).parent / "prompts" / "thinking.jsonl"


def main() -> None:
    """Answer the same prompts in both ways, in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=OWN)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer, at most")
    args = parser.parse_args()
    print_setting(f"{PROMPTS} answers of at most {args.tokens} tokens by {args.model}")
    model = ModelSource(args.model).load()
    lines = read_prompts(ASSETS / "story_openings.txt")
    if args.model != OWN:
        with open(QUESTIONS, encoding="utf-8") as file:
            lines = [json.loads(line)["prompt"] for line in file]
    prompts = [prompt_ids(model.tokenizer, str(line), "") for line in lines[:PROMPTS]]
    draw = {"max_tokens": args.tokens, "temperature": 0.7}
    batched, single = [], []
    answer_batch(model, prompts[:2], seed=(99,), **draw)
    for number in range(ROUNDS):
        began = time.perf_counter()
        answers = answer_batch(model, prompts, seed=(number,), **draw)
        batched.append(sum(map(len, answers)) / (time.perf_counter() - began))
        began = time.perf_counter()
        tokens = 0
        for index, prompt in enumerate(prompts):
            tokens += len(answer_batch(model, [prompt], seed=(number, index), **draw)[0])
        single.append(tokens / (time.perf_counter() - began))
        print(f"  {batched[-1]:.0f} together, {single[-1]:.0f} one by one", flush=True)
    print(f"  together, tokens a second:   {spread(batched, 0)}")
    print(f"  one by one, tokens a second: {spread(single, 0)}")
    ratios = [a / b for a, b in zip(batched, single, strict=True)]
    print(f"  ratio: {spread(ratios, 2)}; wanted at least 3")


if __name__ == "__main__":
    main()
