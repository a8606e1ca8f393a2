"""Records become examples and targets, whether or not the models share a tokenizer.

The second tokenizers are made here; what they say is told from their tokens' names, not from the
bytes that the code under test reads.
"""

from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from conch_dna.errors import ConchError
from conch_dna.language_model import ModelSource
from conch_dna.training.cross_tokenizer.alignments import ALIGNMENTS
from conch_dna.training.cross_tokenizer.records import AlignedExample
from conch_dna.training.cross_tokenizer.targets import ChunkTargets
from conch_dna.training.data.examples import Examples, resolve_alignment
from conch_dna.training.data.records import Record
from conch_dna.training.data.soft_targets import SoftTargetCache
from conch_dna.training.settings import KDConfig
from models import make_model_folder
from tokenizers_made import byte_level_tokenizer, character_tokenizer, wordpiece_tokenizer

MARKS = {
    "characters": ("</s>", "[{}]"),
    "letters": ("</s>", "[{}]"),
    "bpe": ("<|endoftext|>", "{}:\n"),
}
RECORDS: list[Record] = [
    {"prompt": "Once upon a time", "completion": " there was a little cat."},
    {"text": "The big dog ran to the park, and then it went home."},
    {"prompt": "Who is there?", "completion": " It is a small bird.", "finish_reason": "length"},
]
TURNS = [
    {"role": "user", "content": "Who is there?"},
    {"role": "assistant", "content": "It is a little cat."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Now it is a very big dog!"},
]
ANSWERS = "It is a little cat.Now it is a very big dog!"


class Reports(list[tuple[str, str]]):
    """Collects the messages and warnings."""

    def __call__(self, event: str, row: dict[str, Any]) -> None:
        self.append((event, row["message"]))


def template(kind: str) -> str:
    """A chat template whose marks no other tokenizer's has."""
    end, role = MARKS[kind]
    before, after = role.split("{}")
    return (
        f"{{% for m in messages %}}{before}{{{{ m['role'] }}}}{after}{{{{ m['content'] }}}}"
        f"{{% if m['role'] == 'assistant' %}}{end}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{before}assistant{after}{{% endif %}}"
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelSource]:
    """Makes a tiny model with a tokenizer of some kind, once for the same arguments."""
    folder = tmp_path_factory.mktemp("sources")
    made: dict[str, ModelSource] = {}
    builders: dict[str, Callable[[Path], Path]] = {
        "characters": character_tokenizer,
        "letters": lambda path: character_tokenizer(path, byte_fallback=False),
        "bpe": byte_level_tokenizer,
        "words": wordpiece_tokenizer,
    }

    def make(kind: str, *, chat: bool = False, **changes: Any) -> ModelSource:
        name = f"{kind}{chat}{changes}".translate({ord(c): "_" for c in "{}': ,"})
        if name not in made:
            tokenizer = folder / kind
            if not tokenizer.is_dir():
                builders[kind](tokenizer)
            path = make_model_folder(
                folder / name,
                tokenizer=tokenizer,
                chat_template=template(kind) if chat else None,
                **{"hidden_size": 32, "num_hidden_layers": 1, **changes},
            )
            made[name] = ModelSource(str(path))
        return made[name]

    return make


def spelled(model: ModelSource, ids: Any) -> str:
    """What tokens say, without special ones; a space that is put in front stays."""
    kept = [i for i in map(int, ids) if i not in model.tokenizer.all_special_ids]
    tokens = model.tokenizer.convert_ids_to_tokens(kept)
    if "▁" in model.tokenizer.get_vocab():
        return "".join(tokens).replace("▁", " ").replace("<0x0A>", "\n")
    return str(model.tokenizer.decode(kept))


def aligned_text(side: ModelSource, ids: np.ndarray, ranges: np.ndarray) -> str:
    """What the chunks of one side say together."""
    return "".join(spelled(side, ids[start:end]) for start, end in ranges)


def settings(**changes: Any) -> KDConfig:
    return KDConfig(**{"top_k": 8, "batch_size": 2, **changes})


# Which alignment


@pytest.mark.parametrize("alignment", ["auto", *ALIGNMENTS])
def test_one_tokenizer_is_compared_by_index_and_two_as_asked(alignment: str) -> None:
    assert resolve_alignment(alignment, same=True) == "index"
    different = "roots" if alignment == "auto" else alignment
    assert resolve_alignment(alignment, same=False) == different


@pytest.mark.parametrize("alignment", ["auto", *ALIGNMENTS])
def test_that_an_alignment_is_not_needed_is_said_where_it_was_asked_for(
    alignment: str, source: Any
) -> None:
    reports = Reports()
    bpe = source("bpe")
    pair = Examples(
        bpe, source("bpe", hidden_size=16), settings(alignment=alignment), report=reports
    )
    if alignment == "auto":
        assert reports == []
    else:
        ((event, message),) = reports
        assert event == "message"
        assert message.startswith("both tokenizers are the same: tokens are compared by index")
        assert f"--alignment {alignment} " in message
    assert pair.alignment == "index"


def test_one_tokenizer_gives_plain_examples_and_a_plain_cache(source: Any, tmp_path: Path) -> None:
    bpe = source("bpe")
    pair = Examples(bpe, bpe, settings())
    kept, examples = pair.make(RECORDS)
    assert kept == [0, 1, 2]
    assert not any(isinstance(example, AlignedExample) for example in examples)
    ids = bpe.tokenizer.encode("Once upon a time there was a little cat.")
    assert examples[0].ids.tolist() == [*ids, bpe.tokenizer.eos_token_id]
    assert isinstance(pair.targets(tmp_path), SoftTargetCache)
    assert pair.described(examples) == {"alignment": "index"}


def test_two_tokenizers_give_both_sides_and_targets_laid_over(source: Any, tmp_path: Path) -> None:
    teacher, student = source("characters"), source("bpe")
    pair = Examples(teacher, student, settings(alignment="alm"))
    _, examples = pair.make(RECORDS)
    text = "The big dog ran to the park, and then it went home."
    assert spelled(teacher, examples[1].teacher.ids) == f" {text}"
    assert spelled(student, examples[1].ids) == text
    targets = pair.targets(tmp_path)
    assert isinstance(targets, ChunkTargets)
    assert pair.described(examples)["alignment"] == "alm"


# What is too long


@pytest.mark.parametrize("longer", ["teacher", "student"])
def test_the_longer_side_decides_and_is_refused_by_name(longer: str, source: Any) -> None:
    """Silent failure: a teacher that reads beyond its context, where its targets mean nothing."""
    characters = source("characters", max_position_embeddings=60)
    bpe = source("bpe")
    teacher, student = (characters, bpe) if longer == "teacher" else (bpe, characters)
    data = [RECORDS[0], {"text": "The cat and the dog. " * 4}, RECORDS[2]]
    tokens = len(characters.tokenizer.encode(data[1]["text"])) + 1
    assert len(bpe.tokenizer.encode(data[1]["text"])) + 1 < 60 < tokens
    with pytest.raises(ConchError) as refusal:
        Examples(teacher, student, settings()).make(data)
    message = str(refusal.value)
    assert message.startswith("1 of 3 examples are longer than 60 tokens")
    assert f"example 2 ({tokens})" in message
    assert "--too-long skip" in message


@pytest.mark.parametrize("longer", ["teacher", "student"])
def test_on_request_they_are_left_out_and_counted(longer: str, source: Any) -> None:
    characters = source("characters", max_position_embeddings=60)
    bpe = source("bpe")
    teacher, student = (characters, bpe) if longer == "teacher" else (bpe, characters)
    data = [RECORDS[0], {"text": "The cat and the dog. " * 4}, RECORDS[2]]
    reports = Reports()
    pair = Examples(teacher, student, settings(too_long="skip"), report=reports)
    kept, examples = pair.make(data)
    assert kept == [0, 2]
    assert [example.name for example in examples] == ["example 1", "example 3"]
    assert ("warning", "1 of 3 examples exceed 60 tokens: left out") in reports


def test_max_seq_length_holds_for_both_sides(source: Any) -> None:
    pair = (source("characters"), source("bpe"))
    for models in (pair, pair[::-1]):
        with pytest.raises(ConchError, match=r"longer than 40 tokens.*example 2 \(5\d\)"):
            Examples(*models, settings(max_seq_length=40)).make(RECORDS[:2])


# What is covered


def boundaries(model: ModelSource, text: str) -> list[int]:
    """Where the tokens of a text end, in characters, the space in front not among them."""
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    ends = accumulate(len(spelled(model, [i])) for i in ids)
    extra = len(spelled(model, ids)) - len(text)
    return [end - extra for end in ends if end > extra]


def test_the_message_says_how_much_is_covered_and_how(source: Any) -> None:
    teacher, student = source("characters"), source("bpe")
    data = [
        {"prompt": "", "completion": f"{r.get('prompt', '')}{r.get('completion', r.get('text'))}"}
        for r in RECORDS
    ]
    reports = Reports()
    pair = Examples(teacher, student, settings(alignment="alm"), report=reports)
    _, examples = pair.make(data)
    single = chunked = 0
    for record in data:
        text = record["completion"]
        both = sorted({0, *boundaries(teacher, text)} & {0, *boundaries(student, text)})
        # The student's first token counts for nobody, and its end is one token for both.
        single += 1
        for start, end in pairwise(both):
            tokens = [
                sum(start < e <= end for e in boundaries(model, text))
                for model in (teacher, student)
            ]
            if start:
                single += tokens == [1, 1]
                chunked += 0 if tokens == [1, 1] else tokens[1]
    counted = sum(example.count for example in examples)
    shares = {"one_to_one": single / counted, "in_chunks": chunked / counted}
    told = pair.described(examples)["coverage"]
    assert told == pytest.approx({**shares, "uncovered": 0}, abs=1e-12)
    assert reports == [
        (
            "message",
            f"the tokenizers differ, alignment alm: {single / counted:.1%} of the student's "
            f"tokens are one token of the teacher too, {chunked / counted:.1%} are in chunks of "
            "several, 0.0% are not covered",
        )
    ]


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_classes_of_tokens_have_no_temperature_and_it_is_said(alignment: str, source: Any) -> None:
    """Silent failure: a setting that is not used, or used where it means nothing."""
    for temperature in (1.0, 2.0):
        reports = Reports()
        config = settings(alignment=alignment, temperature=temperature)
        pair = Examples(source("characters"), source("bpe"), config, report=reports)
        pair.make(RECORDS)
        unused = alignment == "roots" and temperature != 1
        assert pair.temperature == (1 if unused else temperature)
        assert len(reports) == 1 + unused
        if unused:
            assert reports[-1][1].startswith("classes of tokens are compared at temperature 1")
            assert reports[-1][1].endswith("2 is not used")


def test_one_tokenizer_keeps_its_temperature(source: Any) -> None:
    bpe = source("bpe")
    config = settings(alignment="roots", temperature=3.0)
    assert Examples(bpe, bpe, config).temperature == 3


def test_less_than_half_covered_is_refused_with_the_share(source: Any) -> None:
    """Of 10 tokens (the space in front, a, b, six bytes and the end) four have a partner."""
    teacher, student = source("letters"), source("characters")
    with pytest.raises(ConchError) as refusal:
        Examples(teacher, student, settings()).make([{"text": "ab猫猫"}])
    message = str(refusal.value)
    assert message.startswith("only 40.0% of the student's tokens could be aligned")
    assert teacher.model_id in message and student.model_id in message
    assert "conch-dna vocab" in message


def test_half_covered_is_enough(source: Any) -> None:
    _, examples = Examples(source("letters"), source("characters"), settings()).make(
        [{"text": "ab cd猫猫"}]
    )
    assert len(examples[0].chunks) == 7


@pytest.mark.parametrize("count", [1, 7])
def test_examples_without_a_common_boundary_are_left_out_and_counted(
    count: int, source: Any
) -> None:
    """Silent failure: rows without any target train towards nothing."""
    lost = [
        {"prompt": f"Cat {number}", "completion": "猫", "finish_reason": "length"}
        for number in range(count)
    ]
    data = [RECORDS[0], *lost, RECORDS[1]]
    reports = Reports()
    pair = Examples(source("letters"), source("characters"), settings(), report=reports)
    kept, examples = pair.make(data)
    assert kept == [0, count + 1]
    assert [example.name for example in examples] == ["example 1", f"example {count + 2}"]
    shown = ", ".join(f"example {number}" for number in range(2, min(count, 5) + 2))
    assert reports[-1] == (
        "warning",
        f"{count} of {count + 2} examples have no boundary that both tokenizers share: left out "
        f"({shown}{' …' if count > 5 else ''})",
    )


# Prompts for the samples


PROMPTED: dict[str, Record] = {
    "a prompt": {"prompt": "Once upon a time", "completion": " there was a little cat."},
    "a border within a token": {"prompt": "Once upon a ti", "completion": "me there was a cat."},
    "a short prompt": {"prompt": "Hi", "completion": " there, said the little cat."},
    "a text": {"text": "They played with the red ball, and then they went home."},
    "a text that begins otherwise": {
        "text": "Once upon a time 猫 was there, and it was very happy."
    },
}


@pytest.mark.parametrize("train_on_prompt", [False, True])
@pytest.mark.parametrize("record", PROMPTED.values(), ids=PROMPTED.keys())
@pytest.mark.parametrize(
    "kinds",
    [("characters", "bpe"), ("bpe", "characters"), ("words", "bpe"), ("bpe", "words")],
    ids="-".join,
)
def test_both_models_continue_the_same_text(
    kinds: tuple[str, str], record: Record, train_on_prompt: bool, source: Any
) -> None:
    """Silent failure: samples.md compares continuations of different beginnings."""
    models = teacher, student = source(kinds[0]), source(kinds[1])
    pair = Examples(teacher, student, settings(train_on_prompt=train_on_prompt))
    _, examples = pair.make([record])
    texts = [
        model.tokenizer.decode(ids).replace("<s> ", "").replace("[CLS] ", "")
        for model, (ids,) in zip(models, pair.prompts(examples), strict=True)
    ]
    shown = [text.replace("猫", "[UNK]") for text in texts]
    assert shown[0] == shown[1]
    whole = record["prompt"] + record["completion"] if "prompt" in record else record["text"]
    assert len(shown[0]) >= 2 and whole.replace("猫", "[UNK]").startswith(shown[0])


def test_with_templates_both_continue_the_same_conversation(source: Any) -> None:
    models = source("characters", chat=True), source("bpe", chat=True)
    pair = Examples(*models, settings())
    _, examples = pair.make([{"messages": TURNS[:2]}])
    (teacher,), (student,) = pair.prompts(examples)
    assert spelled(models[0], teacher) == " [user]Who is there?[assistant]"
    assert spelled(models[1], student) == "user:\nWho is there?assistant:\n"


def test_with_one_tokenizer_both_get_the_same_ids(source: Any) -> None:
    bpe = source("bpe")
    pair = Examples(bpe, bpe, settings())
    _, examples = pair.make(RECORDS)
    teacher, student = pair.prompts(examples)
    assert teacher == student
    assert teacher[0] == bpe.tokenizer.encode("Once upon a time")


# What is stored


def test_alm_stores_four_bytes_a_token_and_nothing_else(source: Any, tmp_path: Path) -> None:
    teacher = source("characters")
    pair = Examples(teacher, source("bpe"), settings(alignment="alm"))
    assert pair.identity().bytes_per_token == 4
    _, examples = pair.make(RECORDS)
    assert pair.targets(tmp_path).fill(teacher, examples, batch_size=2) == 3
    teacher.release()
    (shard,) = tmp_path.rglob("*.safetensors")
    tokens = sum(example.teacher.count for example in examples)
    with safe_open(str(shard), framework="numpy") as stored:
        assert [*stored.keys()] == ["gold_log_prob"]
        assert stored.get_tensor("gold_log_prob").nbytes == 4 * tokens


def test_all_other_alignments_store_the_same(source: Any) -> None:
    """So one computation by the teacher serves all of them, and comparison by index too."""
    teacher, student = source("characters"), source("bpe")
    stored = {
        name: Examples(teacher, student, settings(alignment=name)).identity()
        for name in ("auto", *ALIGNMENTS)
    }
    alm = stored.pop("alm")
    (common,) = {identity.digest for identity in stored.values()}
    assert Examples(teacher, teacher, settings()).identity().digest == common != alm.digest
    # Eight kept tokens in about 12 bits each, the rest at two temperatures, the text's own token.
    assert stored["roots"].bytes_per_token == 8 * (7 + 5) // 8 + 2 * 4 + 8


def test_without_digests_the_identity_needs_no_weights(source: Any, tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", tokenizer=source("characters").folder)
    (folder / "model.safetensors").unlink()
    pair = Examples(ModelSource(str(folder)), source("bpe"), settings())
    assert pair.identity(with_digests=False).bytes_per_token > 4


def test_as_many_tokens_as_alm_needs_are_always_there(source: Any) -> None:
    """top_k, which alm does not use, may be more than the teacher has."""
    teacher, student = source("letters"), source("bpe")
    Examples(teacher, student, settings(alignment="alm", top_k=500)).identity()
    with pytest.raises(ConchError, match=rf"top_k is 500, .* has {teacher.token_count} tokens"):
        Examples(teacher, student, settings(top_k=500)).identity()


# Templates


@pytest.mark.parametrize(
    ("kinds", "chats"),
    [
        (("characters", "bpe"), (True, True)),
        (("bpe", "characters"), (True, True)),
        (("characters", "bpe"), (True, False)),
        (("characters", "bpe"), (False, True)),
    ],
)
def test_each_side_sees_its_own_template_and_only_the_answers_are_aligned(
    kinds: tuple[str, str], chats: tuple[bool, bool], source: Any
) -> None:
    """Several answers where both have a template, else one, since without it there is no form."""
    turns = TURNS if all(chats) else TURNS[:2]
    answers = ANSWERS if all(chats) else turns[1]["content"]
    models = teacher, student = [
        source(kind, chat=chat) for kind, chat in zip(kinds, chats, strict=True)
    ]
    _, (example,) = Examples(teacher, student, settings()).make([{"messages": turns}])
    sides = (example.teacher, example)
    for model, side, kind, chat in zip(models, sides, kinds, chats, strict=True):
        role = MARKS[kind][1]
        whole = "".join(f"{role.format(turn['role'])}{turn['content']}" for turn in turns)
        plain = "\n\n".join(turn["content"] for turn in turns)
        # Behind a special token, too, SentencePiece begins with a space.
        text = spelled(model, side.ids).lstrip().replace(" [", "[")
        assert text == (whole if chat else plain)
        assert spelled(model, side.ids[side.counted]) == answers
    chunks = example.chunks
    for model, side, ranges in zip(models, sides, (chunks.teacher, chunks.student), strict=True):
        assert aligned_text(model, side.ids, ranges) == answers
        ends = [int(i) for i in side.ids[ranges[:, 1] - 1]]
        assert ends.count(model.tokenizer.eos_token_id) == len(turns) // 2
    assert example.text_bytes == len(answers)


def test_chunks_say_the_same_on_both_sides(source: Any) -> None:
    models = source("characters", chat=True), source("bpe", chat=True)
    _, (example,) = Examples(*models, settings()).make([{"messages": TURNS}])
    several = 0
    for (a, b), (c, d) in zip(example.chunks.teacher, example.chunks.student, strict=True):
        assert spelled(models[0], example.teacher.ids[a:b]) == spelled(models[1], example.ids[c:d])
        several += b - a > 1
    assert several > 5


def test_several_answers_need_a_template_on_both_sides(source: Any) -> None:
    for chats in ((True, False), (False, True)):
        teacher, student = source("characters", chat=chats[0]), source("bpe", chat=chats[1])
        with pytest.raises(ConchError, match=r"example 1 has messages, but .* no chat template"):
            Examples(teacher, student, settings()).make([{"messages": TURNS}])


def test_a_trained_prompt_counts_but_templates_teach_nothing(source: Any) -> None:
    """The student's template is text that the teacher never read."""
    models = source("characters", chat=True), source("bpe", chat=True)
    turns = [TURNS[0], {"role": "assistant", "content": 3 * TURNS[1]["content"]}]
    _, (example,) = Examples(*models, settings(train_on_prompt=True)).make([{"messages": turns}])
    assert example.count == len(example.ids) - 1
    assert spelled(models[0], example.teacher.ids[example.teacher.counted]) == turns[1]["content"]
    said = aligned_text(models[1], example.ids, example.chunks.student)
    assert said == turns[1]["content"]
