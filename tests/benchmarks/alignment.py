"""How much of 200 gsm8k answers each pair of tokenizers aligns, how fast, and what they share."""

import conch_dna  # noqa: F401  # isort: skip  (loads OpenBLAS before mlx)

import json
import time

from _setting import print_setting, shared_data

from conch_dna.language_model import open_tokenizer
from conch_dna.training.cross_tokenizer.alignments import align_spans
from conch_dna.training.cross_tokenizer.records import text_coverage
from conch_dna.training.cross_tokenizer.token_bytes import encode_all, token_bytes, token_spans
from conch_dna.training.cross_tokenizer.vocabulary import compare_tokenizers

TOKENIZERS = ("qwen2.5", "smollm2", "gpt2", "phi-3-mini", "tinystories2k")
MODELS = ("babyllama105", "babyllama361", "stories260K")
ANSWERS = 200
ROUNDS = 10


def main() -> None:
    data = shared_data()
    print_setting(f"alignment of {ANSWERS} gsm8k answers")
    with open(data / "text" / "gsm8k" / "test.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["answer"] for _, line in zip(range(ANSWERS), file, strict=False)]
    size = sum(len(text.encode()) for text in texts)
    folders = {name: data / "tokenizers" / name for name in TOKENIZERS}
    folders |= {name: data / "models" / name for name in MODELS}
    tokenizers = {name: open_tokenizer(str(folder))[0] for name, folder in folders.items()}
    tables = {name: token_bytes(tokenizer) for name, tokenizer in tokenizers.items()}
    ids = {name: encode_all(tokenizer, texts) for name, tokenizer in tokenizers.items()}
    print("  teacher, student: shared tokens (of teacher's, of student's); student's tokens")
    print("  one to one, in chunks, uncovered; MB of text per second, tokenizing not included")
    for group in (TOKENIZERS, MODELS):
        for teacher in group:
            for student in group:
                if teacher == student:
                    continue
                c = compare_tokenizers(tokenizers[teacher], tokenizers[student])
                covered = text_coverage(texts, tokenizers[teacher], tokenizers[student]).to_json()
                best = min(
                    _seconds(texts, ids[teacher], ids[student], tables[teacher], tables[student])
                    for _ in range(ROUNDS)
                )
                print(
                    f"  {teacher}, {student}: {c.shared_tokens:,} of {c.teacher_tokens:,} and "
                    f"{c.student_tokens:,}; {covered['one_to_one']:.1%}, "
                    f"{covered['in_chunks']:.1%}, {covered['uncovered']:.1%}; "
                    f"{size / best / 1e6:.2f} MB/s",
                    flush=True,
                )


def _seconds(texts, teacher_ids, student_ids, teacher, student) -> float:  # type: ignore[no-untyped-def]
    began = time.perf_counter()
    for text, first, second in zip(texts, teacher_ids, student_ids, strict=True):
        data = text.encode()
        align_spans(token_spans(data, first, teacher), token_spans(data, second, student))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
