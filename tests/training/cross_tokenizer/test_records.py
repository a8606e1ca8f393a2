"""Records as two models' tokens: which belong together, and how much of a text that covers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conch_dna.errors import ConchError
from conch_dna.language_model import ModelSource
from conch_dna.training.cross_tokenizer.records import (
    AlignedExample,
    Coverage,
    RecordAligner,
    coverage,
    require_coverage,
    text_coverage,
)
from conch_dna.training.cross_tokenizer.vocabulary import vocabulary_digest
from models import make_model_folder
from tokenizers_made import character_tokenizer

FIRST = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
SECOND = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|endoftext|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CONVERSATION = {
    "messages": [
        {"role": "user", "content": "Who is there?"},
        {"role": "assistant", "content": "It is a cat."},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Now it is a big dog!"},
    ]
}


def models(folder: Path, *, templates: tuple[bool, bool] = (False, False)) -> Any:
    tokenizer = character_tokenizer(folder / "tokenizer")
    teacher = make_model_folder(
        folder / "teacher", tokenizer=tokenizer, chat_template=FIRST if templates[0] else None
    )
    student = make_model_folder(folder / "student", chat_template=SECOND if templates[1] else None)
    return ModelSource(str(teacher)), ModelSource(str(student))


def covered_texts(example: AlignedExample, teacher: ModelSource, student: ModelSource) -> list[Any]:
    """What the aligned tokens say on both sides, runs of chunks joined."""
    found = []
    for (a, b), (c, d) in zip(example.chunks.teacher, example.chunks.student, strict=True):
        first = teacher.tokenizer.decode(example.teacher.ids[a:b].tolist())
        second = student.tokenizer.decode(example.ids[c:d].tolist())
        found.append((first, second))
    return found


def test_without_templates_the_answers_tokens_are_aligned(tmp_path: Path) -> None:
    teacher, student = models(tmp_path)
    record = {"prompt": "Once upon a time", "completion": " there was a cat.", "finish_reason": ""}
    example = RecordAligner(teacher, student).align(record, "example 1")
    assert coverage([example]).to_json()["uncovered"] == 0
    prompt = len(student.tokenizer.encode("Once upon a time"))
    assert example.chunks.student.min() == prompt
    assert example.text_bytes == len(" there was a cat.")
    end = (example.chunks.teacher[-1, 0], example.chunks.student[-1, 0])
    assert example.teacher.ids[end[0]] == teacher.tokenizer.eos_token_id
    assert example.ids[end[1]] == student.tokenizer.eos_token_id


def test_chunks_say_the_same_on_both_sides(tmp_path: Path) -> None:
    teacher, student = models(tmp_path)
    text = "Tom saw the big red ball. He ran and ran."
    example = RecordAligner(teacher, student).align({"text": text}, "example 1")
    for first, second in covered_texts(example, teacher, student)[:-1]:
        assert first.strip() == second.strip()


@pytest.mark.parametrize("templates", [(True, True), (True, False), (False, True)])
def test_each_model_gets_its_own_template_and_only_answers_are_aligned(
    templates: tuple[bool, bool], tmp_path: Path
) -> None:
    teacher, student = models(tmp_path, templates=templates)
    record = {"prompt": "Who is there?", "completion": "It is a cat."}
    example = RecordAligner(teacher, student).align(record, "example 1")
    sides = ((teacher, example.teacher, templates[0]), (student, example, templates[1]))
    for model, tokens, template in sides:
        marks = ("[user]", "user:")
        text = model.tokenizer.decode(tokens.ids.tolist())
        assert any(mark in text for mark in marks) == template
    said = "".join(second for _, second in covered_texts(example, teacher, student)[:-1])
    assert said.strip() == "It is a cat."


def test_the_second_turn_of_a_conversation_is_aligned_too(tmp_path: Path) -> None:
    teacher, student = models(tmp_path, templates=(True, True))
    example = RecordAligner(teacher, student).align(CONVERSATION, "example 1")
    pairs = covered_texts(example, teacher, student)
    said = "".join(second for _, second in pairs)
    assert "It is a cat." in said and "Now it is a big dog!" in said
    assert "Who" not in said and "And" not in said
    ends = [example.ids[last - 1] for _, last in example.chunks.student]
    assert ends.count(student.tokenizer.eos_token_id) == 2, "the end of each turn is aligned"
    assert coverage([example]).share == 1


def test_a_conversation_of_several_answers_needs_a_template_on_both_sides(tmp_path: Path) -> None:
    teacher, student = models(tmp_path, templates=(True, False))
    with pytest.raises(ConchError, match=r"example 7 has messages, .* no chat template"):
        RecordAligner(teacher, student).align(CONVERSATION, "example 7")


def test_a_single_answer_is_plain_text_for_a_model_without_a_template(tmp_path: Path) -> None:
    teacher, student = models(tmp_path, templates=(True, False))
    record = {"messages": CONVERSATION["messages"][:2]}
    example = RecordAligner(teacher, student).align(record, "example 1")
    text = student.tokenizer.decode(example.ids.tolist())
    assert text.startswith("Who is there?\n\nIt is a cat.")


def test_the_teachers_exact_tokens_are_kept(tmp_path: Path) -> None:
    """What it wrote need not be what its tokenizer would make of the text."""
    teacher, student = models(tmp_path)
    prompt = teacher.tokenizer.encode("A cat")
    answer = [teacher.tokenizer.get_vocab()[f"<0x{value:02X}>"] for value in b" sat"]
    record = {
        "prompt": "A cat",
        "completion": " sat",
        "finish_reason": "length",
        "tokens": {
            "ids": [*prompt, *answer],
            "prompt_length": len(prompt),
            "vocabulary": vocabulary_digest(teacher.tokenizer),
        },
    }
    example = RecordAligner(teacher, student).align(record, "example 1")
    assert example.teacher.ids[-4:].tolist() == answer
    assert coverage([example]).share == 1


def test_trained_prompts_count_for_both_where_the_whole_text_is_the_same(tmp_path: Path) -> None:
    teacher, student = models(tmp_path)
    record = {"prompt": "Once upon a time", "completion": " there was a cat."}
    aligner = RecordAligner(teacher, student, train_on_prompt=True)
    example = aligner.align(record, "example 1")
    assert example.chunks.student.min() == 1, "the first token counts for nobody"
    assert example.teacher.count == len(example.teacher.ids) - 1


def test_what_a_tokenizer_cannot_spell_is_not_covered(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(tmp_path / "tokenizer", byte_fallback=False)
    teacher = ModelSource(str(make_model_folder(tmp_path / "teacher", tokenizer=tokenizer)))
    student = ModelSource(str(make_model_folder(tmp_path / "student")))
    example = RecordAligner(teacher, student).align({"text": "It is a café in Paris."}, "example 1")
    shares = coverage([example]).to_json()
    assert 0 < shares["uncovered"] < 0.5
    said = "".join(second for _, second in covered_texts(example, teacher, student))
    assert "caf" in said and "in Paris." in said and "é" not in said


def test_less_than_half_is_refused_with_the_share() -> None:
    require_coverage(Coverage(one_to_one=30, in_chunks=20, counted=100), teacher="a", student="b")
    with pytest.raises(ConchError, match=r"only 49\.0% .* tokenizers of a and b"):
        require_coverage(
            Coverage(one_to_one=30, in_chunks=19, counted=100), teacher="a", student="b"
        )


def test_the_digest_tells_what_belongs_together(tmp_path: Path) -> None:
    teacher, student = models(tmp_path)
    aligner = RecordAligner(teacher, student)
    first = aligner.align({"text": "The cat sat."}, "example 1")
    again = aligner.align({"text": "The cat sat."}, "another name")
    turned = RecordAligner(student, teacher).align({"text": "The cat sat."}, "example 1")
    assert first.digest == again.digest
    assert first.digest not in (turned.digest, turned.teacher.digest, first.teacher.digest)


def test_coverage_of_texts_is_that_of_their_tokens(tmp_path: Path) -> None:
    teacher, student = models(tmp_path)
    texts = ["Once upon a time", "the end"]
    got = text_coverage(texts, teacher.tokenizer, student.tokenizer)
    ids = [student.tokenizer.encode(t, add_special_tokens=False) for t in texts]
    assert got.counted == sum(map(len, ids))
    single = sum(len(student.tokenizer.decode([i]).encode()) == 1 for i in np.concatenate(ids))
    assert abs(got.one_to_one - single) <= len(texts), "the space in front is a token of its own"
    assert got.share == 1


def test_no_text_at_all_covers_nothing(tmp_path: Path) -> None:
    teacher, student = models(tmp_path)
    assert text_coverage([], teacher.tokenizer, student.tokenizer).to_json() == {
        "one_to_one": 0,
        "in_chunks": 0,
        "uncovered": 1,
    }


def test_trained_prompts_in_templates_are_nothing_to_cover(tmp_path: Path) -> None:
    """Silent failure: a long template made a fully aligned conversation look rewritten."""
    teacher, student = models(tmp_path, templates=(True, True))
    aligner = RecordAligner(teacher, student, train_on_prompt=True)
    example = aligner.align(CONVERSATION, "example 1")
    assert example.count == len(example.ids) - 1
    assert coverage([example]).share == 1
    said = sum(len(turn["content"]) for turn in CONVERSATION["messages"])
    assert example.text_bytes == said
