"""Speed of the teacher's answers in batches of 16 against one by one."""

import conch_dna  # noqa: F401  # isort: skip  (loads OpenBLAS before mlx)

import time

from _setting import print_setting, spread

from conch_dna.language_model import ASSETS, ModelSource
from conch_dna.training.chats.conversations import prompt_ids
from conch_dna.training.data.answers import answer_batch
from conch_dna.training.data.records import read_prompts

ROUNDS = 3
PROMPTS = 16
DRAW = {"max_tokens": 128, "temperature": 0.7}


def main() -> None:
    print_setting(f"{PROMPTS} answers of at most {DRAW['max_tokens']} tokens by embedded:teacher")
    teacher = ModelSource("embedded:teacher").load()
    lines = read_prompts(ASSETS / "story_openings.txt")[:PROMPTS]
    prompts = [prompt_ids(teacher.tokenizer, line, "") for line in lines]
    batched, single = [], []
    answer_batch(teacher, prompts, seed=(99,), **DRAW)
    for number in range(ROUNDS):
        began = time.perf_counter()
        answers = answer_batch(teacher, prompts, seed=(number,), **DRAW)
        batched.append(sum(map(len, answers)) / (time.perf_counter() - began))
        began = time.perf_counter()
        tokens = 0
        for index, prompt in enumerate(prompts):
            tokens += len(answer_batch(teacher, [prompt], seed=(number, index), **DRAW)[0])
        single.append(tokens / (time.perf_counter() - began))
    print(f"  together, tokens a second:   {spread(batched, 0)}")
    print(f"  one by one, tokens a second: {spread(single, 0)}")
    ratios = [a / b for a, b in zip(batched, single, strict=True)]
    print(f"  ratio: {spread(ratios, 2)}; wanted at least 3")


if __name__ == "__main__":
    main()
