"""Files of records in, token ids and marks out; what counts is read back by decoding it.

Chat templates and tokenizers are real ones from ../shared/data; templates that drop, change or
move turns are written here.
"""

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conch_dna.errors import ConchError
from conch_dna.language_model import load_tokenizer
from conch_dna.training.batches import Example
from conch_dna.training.chats.conversations import plain_prompt, prompt_ids, prompt_messages
from conch_dna.training.cross_tokenizer.vocabulary import vocabulary_digest
from conch_dna.training.data.records import (
    fitting,
    plain_text,
    read_prompts,
    read_records,
    record_texts,
    record_tokens,
    split_heldout,
    tokenize_record,
    tokenize_records,
)
from models import ASSETS

PHI = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.fixture(scope="session")
def tokenizers(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Load a shared tokenizer by name, with the end tokens of its model and, if given, a template.

    The model's config.json and generation_config.json are written as the real ones have them.
    """
    loaded: dict[tuple[str, str | None], Any] = {}
    ends = {"qwen2.5": [151645, 151643], "smollm2": [2], "phi-3-mini": [32000, 32001, 32007]}

    def load(name: str, chat_template: str | None = None) -> Any:
        key = (name, chat_template)
        if key not in loaded:
            folder = tmp_path_factory.mktemp("tokenizers") / name
            shutil.copytree(shared_data / "tokenizers" / name, folder)
            if name == "phi-3-mini" and chat_template is None:
                chat_template = PHI
            if chat_template is not None:
                path = folder / "tokenizer_config.json"
                path.chmod(0o644)
                described = {**json.loads(path.read_text()), "chat_template": chat_template}
                path.write_text(json.dumps(described))
            folder.chmod(0o755)
            (folder / "config.json").write_text(json.dumps({"eos_token_id": ends[name][0]}))
            generation = json.dumps({"eos_token_id": ends[name]})
            (folder / "generation_config.json").write_text(generation)
            loaded[key] = load_tokenizer(folder)
        return loaded[key]

    return load


@pytest.fixture(scope="session")
def plain() -> Any:
    """The embedded tokenizer: byte-level, no template, nothing in front, <|endoftext|> is 0."""
    return load_tokenizer(ASSETS / "student")


@pytest.fixture(scope="session")
def sentencepiece(shared_data: Path) -> Any:
    """stories260K's tokenizer: ▁ for spaces, <s> in front, both <s> and </s> end a text."""
    return load_tokenizer(shared_data / "models" / "stories260K")


def runs(example: Example, tokenizer: Any) -> list[str]:
    """The text of every unbroken run of counted tokens."""
    found: list[list[int]] = []
    for place, counts in enumerate(example.counted):
        if counts:
            if not example.counted[place - 1]:
                found.append([])
            found[-1].append(int(example.ids[place]))
    return [tokenizer.decode(ids) for ids in found]


def chat(*answers: str, system: str = "", user: str = "And then?") -> dict[str, Any]:
    turns = [{"role": "system", "content": system}] if system else []
    for answer in answers:
        turns += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


# Reading JSONL


def write(tmp_path: Path, text: str | bytes, name: str = "data.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_three_forms_are_read_and_blank_lines_skipped(tmp_path):
    records = [
        {"text": "Once."},
        {"prompt": "", "completion": "Yes."},
        {"messages": [{"role": "assistant", "content": "Hi."}]},
    ]
    lines = "\n\n  \n".join(json.dumps(record) for record in records)
    assert read_records(write(tmp_path, lines)) == records
    assert read_records(write(tmp_path, lines.replace("\n", "\r\n") + "\r\n")) == records


def test_characters_that_end_lines_elsewhere_stay_inside_strings(tmp_path):
    text = "one\u2028two\u2029three\x85four\x0bfive"
    line = json.dumps({"text": text}, ensure_ascii=False).replace("\\u000b", "\x0b")
    assert "\u2028" in line
    line = line.replace("\x0b", "\\u000b")
    assert read_records(write(tmp_path, line + "\n")) == [{"text": text}]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    assert read_records(write(tmp_path, '\ufeff{"text": "a"}\n')) == [{"text": "a"}]
    assert read_prompts(write(tmp_path, "\ufeffTell me.\n", "prompts.txt")) == ["Tell me."]


def chat_line(*between):
    """A conversation as JSON with turns between a question and its answer."""
    ask, answer = '{"role": "user", "content": "a"}', '{"role": "assistant", "content": "b"}'
    return f'{{"messages": [{ask}, {"".join(between)}{answer}]}}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "not JSON"),
        ("a,b", r"not JSON \(Expecting value: column 1\); give a line as .*texts .* as --prompts$"),
        ('{"text": "a", "more": ' + "[" * 65 + "]" * 65 + "}", "nested deeper than 64 levels"),
        ('{"text": "a"} {"text": "b"}', r"not JSON \(Extra data: column 15\)$"),
        ("[1, 2]", "a record is a JSON object"),
        ('"text"', "a record is a JSON object"),
        ("null", "a record is a JSON object"),
        ("{}", "a record needs messages, prompt and completion, or text"),
        ('{"prompt": "a"}', "a record needs .*; it has prompt"),
        ('{"completion": "a"}', "a record needs .*; it has completion"),
        ('{"text": 3}', "text is not text"),
        ('{"text": null}', "text is not text"),
        ('{"prompt": 3, "completion": "a"}', "prompt is not text"),
        ('{"prompt": "a", "completion": ["b"]}', "completion is not text"),
        ('{"text": ""}', "text is empty"),
        ('{"prompt": "a", "completion": ""}', "completion is empty"),
        ('{"messages": "hello"}', "messages is a list"),
        ('{"messages": ["hello"]}', "a turn is an object with a role"),
        ('{"messages": [{"role": "user"}]}', "user has no content"),
        ('{"messages": [{"role": 1, "content": "a"}]}', "a turn is an object with a role"),
        ('{"messages": [{"role": "assistant", "content": null}]}', "assistant has no content"),
        (
            chat_line('{"role": "assistant", "content": ""}, '),
            r"turn \d of messages: an assistant turn is empty",
        ),
        (
            chat_line('{"role": "assistant", "content": " \\n"}, '),
            "an assistant turn is empty, nothing",
        ),
        (
            chat_line('{"role": "assistant", "content": [{"type": "text", "text": ""}]}, '),
            "an assistant turn is empty",
        ),
        (
            chat_line('{"role": "assistant", "content": "", "tool_calls": []}, '),
            "an assistant turn is empty",
        ),
        ('{"messages": []}', "no assistant turn"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"),
        (r'{"text": "half \ud83d"}', "surrogate"),
        (r'{"messages": [{"role": "assistant", "content": "\udc00"}]}', "surrogate"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path, line, message):
    path = write(tmp_path, f'{{"text": "good"}}\n\n{line}\n')
    with pytest.raises(ConchError, match=rf"data\.jsonl, line 3: .*{message}"):
        read_records(path)


def test_an_empty_turn_that_calls_or_does_not_count_is_kept(tmp_path):
    call = '{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}, '
    unlearned = '{"role": "assistant", "content": "", "weight": 0}, '
    assert len(read_records(write(tmp_path, f"{chat_line(call)}\n{chat_line(unlearned)}\n"))) == 2


@pytest.mark.parametrize(
    "answer",
    [
        '"prompt": "a", "completion": ""',
        '"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]',
    ],
)
def test_an_answer_that_its_teacher_ended_at_once_is_read_again(tmp_path, answer):
    tokens = '"tokens": {"ids": [5, 0], "prompt_length": 1, "vocabulary": "v"}'
    [record] = read_records(write(tmp_path, f"{{{answer}, {tokens}}}\n"))
    assert record["tokens"]["ids"] == [5, 0]


@pytest.mark.parametrize("text", ["", "\n\n", "  \n\t\n"])
def test_an_empty_file_is_refused(tmp_path, text):
    for read in (read_records, read_prompts):
        with pytest.raises(ConchError, match=r"data\.jsonl is empty"):
            read(write(tmp_path, text))


def test_a_file_that_cannot_be_read_names_the_option(tmp_path):
    latin = write(tmp_path, '{"text": "größe"}'.encode("latin-1"))
    for read, option in ((read_records, "--data"), (read_prompts, "--prompts")):
        for path in (tmp_path / "absent.jsonl", tmp_path, latin):
            with pytest.raises(ConchError, match=f"cannot read {option} {path}"):
                read(path)


def test_other_encodings_are_read_or_refused_with_line_and_remedy(tmp_path):
    lines = '{"text": "a"}\n{"text": "größe"}\n'
    for coding in ("utf-16", "utf-32", "utf-8-sig"):
        path = write(tmp_path, lines.encode(coding))
        assert read_records(path) == [{"text": "a"}, {"text": "größe"}]
    for content, said in (
        (lines.encode("latin-1"), "line 2: byte 0xf6 is not UTF-8; it is ö if .*: iconv -f LATIN1"),
        (lines.encode("utf-16-le"), "line 1: zero bytes, as in UTF-16 .*: iconv -f UTF-16LE"),
        (lines.encode("utf-16")[:-1], r"not the UTF-16 that it says it is \(truncated data\)"),
    ):
        with pytest.raises(ConchError, match=rf"data\.jsonl, .*{said}"):
            read_records(write(tmp_path, content))


def test_prompts_come_one_a_line_or_as_jsonl(tmp_path):
    text = "Tell me a story.\n\n  Two spaces, and {braces}\r\nOne\u2028line\n"
    assert read_prompts(write(tmp_path, text, "prompts.txt")) == [
        "Tell me a story.",
        "  Two spaces, and {braces}",
        "One\u2028line",
    ]
    lines = '"A string"\n\n{"prompt": "An object", "more": 1}\n'
    assert read_prompts(write(tmp_path, lines, "p.jsonl")) == ["A string", "An object"]


@pytest.mark.parametrize("line", ["{", "3", "null", '""', '{"prompt": ""}', '{"text": "a"}', "[]"])
def test_a_bad_prompt_line_is_refused_with_its_number(tmp_path, line):
    path = write(tmp_path, f'"good"\n{line}\n')
    with pytest.raises(ConchError, match=r"data\.jsonl, line 2"):
        read_prompts(path)


# Plain texts and completions


def test_a_text_counts_all_but_its_first_token_and_ends(plain, sentencepiece):
    for tokenizer, end in ((plain, 0), (sentencepiece, 2)):
        text = "Once upon a time there was a dog."
        example = tokenize_record({"text": text}, tokenizer, name="example 1")
        assert example.ids.tolist() == [*tokenizer.encode(text), end]
        assert example.counted.tolist() == [False] + [True] * (len(example.ids) - 1)
        assert example.ids.dtype == np.int32 and example.name == "example 1"


def test_a_text_that_spells_its_end_gets_no_second_one(plain, sentencepiece, tmp_path):
    for tokenizer, end in ((plain, "<|endoftext|>"), (sentencepiece, "</s>")):
        without = tokenize_record({"text": "The dog ran."}, tokenizer, name="a")
        spelled = tokenize_record({"text": "The dog ran." + end}, tokenizer, name="a")
        assert spelled.ids.tolist() == without.ids.tolist()
        assert spelled.counted.tolist() == without.counted.tolist()


@pytest.fixture(scope="session")
def ending(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """stories260K's tokenizer, made to put </s> behind every text by itself."""
    folder = tmp_path_factory.mktemp("ending") / "stories"
    shutil.copytree(shared_data / "models" / "stories260K", folder)
    path = folder / "tokenizer.json"
    path.chmod(0o644)
    described = json.loads(path.read_text())
    processor = described["post_processor"]
    processor["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    processor["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    path.write_text(json.dumps(described))
    return load_tokenizer(folder)


@pytest.mark.parametrize("text", ["The dog ran.", "The dog ran.</s>"])
def test_a_tokenizer_that_ends_texts_itself_gives_one_end(ending, text):
    assert ending.encode("dog")[-1] == 2
    example = tokenize_record({"text": text}, ending, name="a")
    assert example.ids.tolist().count(2) == 1 and example.ids[-1] == 2
    record = {"prompt": "The dog", "completion": text.removeprefix("The dog")}
    example = tokenize_record(record, ending, name="a")
    assert example.ids.tolist() == tokenize_record({"text": text}, ending, name="a").ids.tolist()
    assert runs(example, ending) == ["ran.</s>"]
    assert prompt_ids(ending, "The dog", "") == ending.encode("The dog")[:-1]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Once upon a time", ", there was a big dog."),
        ("Tell me:", " Yes"),
        ("Tell me: ", "Yes"),
        ("", "All of it."),
        ("Größe 🐚", " ist 🐚🐚.\nZwei Zeilen."),
    ],
)
def test_a_completion_counts_with_its_end_and_the_prompt_does_not(
    plain, sentencepiece, prompt, completion
):
    for tokenizer, end in ((plain, "<|endoftext|>"), (sentencepiece, "</s>")):
        record = {"prompt": prompt, "completion": completion}
        example = tokenize_record(record, tokenizer, name="a")
        assert example.ids.tolist()[:-1] == tokenizer.encode(prompt + completion)
        (counted,) = runs(example, tokenizer)
        # A token that straddles the border belongs to the completion.
        assert counted.endswith(end)
        assert (prompt + completion).endswith(counted.removesuffix(end))
        uncounted = tokenizer.decode(example.ids[~example.counted].tolist())
        assert prompt.startswith(uncounted.removeprefix("<s>").strip()) or not prompt
        assert len(counted) - len(end) <= len(completion) + 1


def test_the_first_token_never_counts_even_without_a_prompt(plain):
    example = tokenize_record({"prompt": "", "completion": "Hello there."}, plain, name="a")
    assert example.counted.tolist() == [False] + [True] * (len(example.ids) - 1)


def test_a_cut_off_answer_gets_no_end(plain):
    record = {"prompt": "Once", "completion": " upon a", "finish_reason": "length"}
    example = tokenize_record(record, plain, name="a")
    assert example.ids.tolist() == plain.encode("Once upon a")
    stopped = tokenize_record({**record, "finish_reason": "stop"}, plain, name="a")
    assert stopped.ids.tolist() == [*plain.encode("Once upon a"), 0]


def test_the_prompt_counts_if_asked_but_not_its_first_token(plain, tokenizers):
    record = {"prompt": "Once upon a", "completion": " time."}
    example = tokenize_record(record, plain, name="a", train_on_prompt=True)
    assert example.counted.tolist() == [False] + [True] * (len(example.ids) - 1)
    example = tokenize_record(
        chat("Yes", "No"), tokenizers("smollm2"), name="a", train_on_prompt=True
    )
    assert example.counted.tolist() == [False] + [True] * (len(example.ids) - 1)


def test_a_single_token_with_an_end_counts_only_the_end_and_nothing_is_refused(plain):
    record = {"prompt": "", "completion": "a", "finish_reason": "length"}
    assert len(plain.encode("a")) == 1
    with pytest.raises(ConchError, match="example 7: no token counts"):
        tokenize_record(record, plain, name="example 7")
    assert tokenize_record({"text": "a"}, plain, name="a").counted.tolist() == [False, True]


def test_records_are_numbered_from_1(plain):
    examples = tokenize_records([{"text": "One."}, {"text": "Two."}], plain)
    assert [example.name for example in examples] == ["example 1", "example 2"]


# Exact tokens of a teacher's answer


def exact(vocabulary: str) -> dict[str, Any]:
    return {
        "prompt": "Once",
        "completion": " upon",
        "tokens": {"ids": [9, 8, 7, 6], "prompt_length": 2, "vocabulary": vocabulary},
    }


def test_exact_tokens_are_used_with_the_same_vocabulary_only(plain, sentencepiece):
    digest = vocabulary_digest(plain)
    assert digest != vocabulary_digest(sentencepiece)
    used = tokenize_record(exact(digest), plain, name="a", vocabulary=digest)
    assert used.ids.tolist() == [9, 8, 7, 6]
    assert used.counted.tolist() == [False, False, True, True]
    for vocabulary in (vocabulary_digest(sentencepiece), ""):
        anew = tokenize_record(exact(digest), plain, name="a", vocabulary=vocabulary)
        assert anew.ids.tolist() == [*plain.encode("Once upon"), 0]


@pytest.mark.parametrize("value", [12, [1, 2], "many", {}, {"ids": [1]}, None])
def test_a_users_own_column_called_tokens_does_no_harm(plain, value):
    digest = vocabulary_digest(plain)
    record = {"text": "Once.", "tokens": value}
    example = tokenize_record(record, plain, name="a", vocabulary=digest)
    assert example.ids.tolist() == [*plain.encode("Once."), 0]


# Conversations

CODE = "Sure:\n\n```python\nprint('größe')  # 🐚\n```\n\nThat is *all*."
LONG = chat()
LONG["messages"] = [
    {"role": "system", "content": "Answer briefly.\nAlways."},
    {"role": "user", "content": "Write a program."},
    {"role": "assistant", "content": CODE},
    {"role": "user", "content": f"You said:\n{CODE}\nIs 42 right?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "42"},
    {"role": "assistant", "content": "  日本語 – naïve\tcafé 👩‍👩‍👧\n"},
]
REAL = {"qwen2.5": "<|im_end|>", "smollm2": "<|im_end|>", "phi-3-mini": "<|end|>"}


def squeezed(text: str) -> str:
    """Without white space, which SentencePiece tokenizers do not give back exactly."""
    return "".join(text.split())


@pytest.mark.parametrize("name", REAL)
def test_every_assistant_turn_counts_with_its_end_and_nothing_else_does(tokenizers, name):
    tokenizer = tokenizers(name)
    example = tokenize_record(LONG, tokenizer, name="a")
    answers = [t["content"] + REAL[name] for t in LONG["messages"] if t["role"] == "assistant"]
    counted = runs(example, tokenizer)
    # Before the last answer one token holds the template's newline and the answer's spaces.
    counted[-1] = counted[-1].removeprefix("\n")
    if name == "phi-3-mini":
        counted, answers = [[squeezed(text) for text in texts] for texts in (counted, answers)]
    assert counted == answers
    end = tokenizer.convert_tokens_to_ids(REAL[name])
    assert int((example.ids[example.counted] == end).sum()) == 3
    rendered = tokenizer.apply_chat_template(LONG["messages"], tokenize=False)
    whole = tokenizer.decode(example.ids.tolist())
    if name == "phi-3-mini":
        rendered, whole = squeezed(rendered), squeezed(whole)
    assert whole == rendered


@pytest.mark.parametrize("name", REAL)
def test_what_follows_the_last_answer_is_left_out(tokenizers, name):
    tokenizer = tokenizers(name)
    longer = {"messages": [*LONG["messages"], {"role": "user", "content": "Thanks!"}]}
    example = tokenize_record(longer, tokenizer, name="a")
    assert "Thanks" not in tokenizer.decode(example.ids.tolist())
    assert example.digest == tokenize_record(LONG, tokenizer, name="a").digest


@pytest.mark.parametrize("name", REAL)
def test_prompt_and_completion_go_through_the_template(tokenizers, name):
    tokenizer = tokenizers(name)
    record = {"prompt": "What is 6 × 7?", "completion": "It is 42."}
    example = tokenize_record(record, tokenizer, name="a")
    same = tokenize_record(chat("It is 42.", user="What is 6 × 7?"), tokenizer, name="a")
    assert example.digest == same.digest
    assert [squeezed(text) for text in runs(example, tokenizer)] == [f"Itis42.{REAL[name]}"]
    prompt = prompt_ids(tokenizer, "What is 6 × 7?", "")
    assert example.ids[: len(prompt)].tolist() == prompt
    assert not example.counted[: len(prompt)].any() and example.counted[len(prompt)]


@pytest.mark.parametrize("name", REAL)
def test_a_cut_off_turn_gets_no_end(tokenizers, name):
    tokenizer = tokenizers(name)
    record = {**chat("It is 42, because"), "finish_reason": "length"}
    example = tokenize_record(record, tokenizer, name="a")
    assert [squeezed(text) for text in runs(example, tokenizer)] == ["Itis42,because"]
    assert example.counted[-1]
    pair = {"prompt": "And then?", "completion": "It is 42, because", "finish_reason": "length"}
    assert tokenize_record(pair, tokenizer, name="a").digest == example.digest


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=3), st.text(max_size=10))
def test_any_text_is_marked_exactly(tokenizers, answers, user):
    for name in ("smollm2", "qwen2.5"):
        tokenizer = tokenizers(name)
        example = tokenize_record(chat(*answers, user=user), tokenizer, name="a")
        # What the tokenizer gives back: Qwen's composes, SmolLM2's lacks some rare bytes.
        given_back = [
            tokenizer.decode(tokenizer.encode(f"{a}<|im_end|>", add_special_tokens=False))
            for a in answers
        ]
        found = runs(example, tokenizer)
        # A line break in front may be one token with the template's, which then counts.
        assert [text.lstrip("\n") for text in found] == [text.lstrip("\n") for text in given_back]


def test_text_that_the_tokenizer_composes_is_not_taken_for_a_change(tokenizers):
    """Qwen's tokenizer turns e + combining accent into é."""
    decomposed = unicodedata.normalize("NFD", "Ein Café in Größenwörth, été à Đà Nẵng")
    assert decomposed != unicodedata.normalize("NFC", decomposed)
    example = tokenize_record(chat(decomposed), tokenizers("qwen2.5"), name="a")
    (counted,) = runs(example, tokenizers("qwen2.5"))
    assert counted == unicodedata.normalize("NFC", decomposed) + "<|im_end|>"


def test_an_answer_that_spells_an_end_token_counts_to_its_true_end(tokenizers):
    answer = "The token <|im_end|> ends a turn."
    example = tokenize_record(chat(answer, "Yes."), tokenizers("smollm2"), name="a")
    assert runs(example, tokenizers("smollm2")) == [f"{answer}<|im_end|>", "Yes.<|im_end|>"]


def test_a_template_without_end_tokens_gets_one_after_the_last_turn(tokenizers):
    template = (
        "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '\n' }}{% endfor %}"
    )
    template += "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
    tokenizer = tokenizers("smollm2", template)
    example = tokenize_record(chat("Yes, it is.", "No, never."), tokenizer, name="a")
    first, second = runs(example, tokenizer)
    assert first.strip() == "Yes, it is."
    assert "".join(second.split()) == "No,never.<|im_end|>"
    assert example.ids.tolist().count(tokenizer.eos_token_id) == 1


def test_without_a_template_several_answers_are_refused_with_the_remedy(plain):
    with pytest.raises(ConchError, match=r"example 3 has messages, .* give prompt and completion"):
        tokenize_record(chat("Yes.", "No."), plain, name="example 3")


def test_without_a_template_a_single_answer_follows_its_prompt(plain):
    """Turns stand a blank line apart, and the rest of the record stays."""
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Is it?"},
        {"role": "assistant", "content": "Yes."},
    ]
    example = tokenize_record({"messages": messages}, plain, name="a")
    pair = {"prompt": "Be kind.\n\nIs it?\n\n", "completion": "Yes."}
    assert example.digest == tokenize_record(pair, plain, name="a").digest
    cut = {"messages": messages, "finish_reason": "length"}
    assert len(tokenize_record(cut, plain, name="a").ids) == len(example.ids) - 1


@pytest.mark.parametrize(
    ("record", "texts", "whole"),
    [
        ({"text": "Once."}, ["Once."], "Once."),
        ({"prompt": "A", "completion": " b."}, [" b."], "A b."),
        (chat("Yes."), ["Yes."], None),
    ],
)
def test_the_texts_of_a_record(plain, tokenizers, record, texts, whole):
    """The whole text is told only where no template is put around it."""
    assert record_texts(record) == texts
    if whole is not None:
        assert plain_text(record, plain, plain) == whole
    with_template = tokenizers("smollm2")
    assert plain_text(record, plain, with_template) == (whole if "text" in record else None)


def test_ranges_of_a_record_are_those_of_its_texts(tokenizers):
    tokenizer = tokenizers("smollm2")
    record = chat("Yes, it is.", "No, never.")
    ids, ranges = record_tokens(record, tokenizer, name="a")
    said = [tokenizer.decode(ids[a:b], skip_special_tokens=True).strip() for a, b in ranges]
    assert said == record_texts(record)
    example = tokenize_record(record, tokenizer, name="a")
    assert example.counted.sum() == sum(b - a for a, b in ranges)
    assert example.text_bytes == len("Yes, it is.No, never.")


def test_text_bytes_are_utf8(plain):
    assert tokenize_record({"text": "Café"}, plain, name="a").text_bytes == 5


@pytest.mark.parametrize(
    ("record", "answers", "everything"),
    [
        ({"text": "Café"}, 5, 5),
        ({"prompt": "Née", "completion": " oui."}, 5, 9),
        (chat("Yes.", "No.", user="Is it?"), 7, 7 + 2 * len("Is it?")),
    ],
)
def test_the_bytes_are_those_of_the_text_whose_tokens_count(
    tokenizers, record, answers, everything
):
    """Bits per byte divide the nats of trained prompts by the prompts' bytes too."""
    tokenizer = tokenizers("smollm2")
    assert tokenize_record(record, tokenizer, name="a").text_bytes == answers
    whole = tokenize_record(record, tokenizer, name="a", train_on_prompt=True)
    assert whole.text_bytes == everything


STRIPS_THOUGHTS = (
    "{% for m in messages %}"
    "{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last %}{% set c = c.split('</think>')[-1] %}"
    "{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endfor %}" + ASK
)
IGNORES_EARLIER = (
    "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}" + TURN + "{% endif %}"
    "{% endfor %}" + ASK
)
SHOUTS = "{% for m in messages %}" + TURN.replace("m['content']", "m['content'] | upper")
SHOUTS += "{% endfor %}" + ASK
CUTS = "{% for m in messages %}" + TURN.replace("m['content']", "m['content'][:40]")
CUTS += "{% endfor %}" + ASK
COUNTS_TURNS = (
    "{{ '<|im_start|>system\nturn ' ~ messages | length ~ '<|im_end|>\n' }}"
    "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
)
THOUGHTS = "<think>Seven times six is forty-two, surely.</think>It is 42."


@pytest.mark.parametrize(
    ("template", "answers", "turn"),
    [
        (STRIPS_THOUGHTS, (THOUGHTS, "Yes."), 2),
        (IGNORES_EARLIER, ("It is 42.", "Yes."), 2),
        (IGNORES_EARLIER, ("And then?", "Yes."), 2),
        (CUTS, ("It is forty-two, and that is the answer to everything.", "Yes."), 2),
    ],
    ids=["thoughts", "dropped", "dropped but repeated", "cut"],
)
def test_a_template_that_does_not_keep_a_turn_is_refused(tokenizers, template, answers, turn):
    tokenizer = tokenizers("smollm2", template)
    with pytest.raises(
        ConchError, match=rf"example 4: the chat template changes or drops assistant turn {turn}, "
    ):
        tokenize_record(chat(*answers), tokenizer, name="example 4")


def test_a_question_that_a_template_changes_is_refused(tokenizers):
    with pytest.raises(ConchError, match="changes or drops user turn 1, so that it would be lost"):
        tokenize_record(chat("Yes."), tokenizers("smollm2", SHOUTS), name="a")


@pytest.mark.parametrize("template", [CUTS, COUNTS_TURNS], ids=["cut", "header"])
def test_a_last_answer_that_a_template_changes_follows_what_was_asked(tokenizers, template):
    """A model is asked the question, and answers without the template."""
    tokenizer = tokenizers("smollm2", template)
    answer = "It is forty-two, and that is the answer to everything."
    example = tokenize_record(chat(answer), tokenizer, name="a")
    assert runs(example, tokenizer) == [f"{answer}<|im_end|>"]
    prompt = prompt_ids(tokenizer, "And then?", "")
    assert example.ids[: len(prompt)].tolist() == prompt


def test_thoughts_in_the_last_turn_are_kept_and_count(tokenizers):
    tokenizer = tokenizers("smollm2", STRIPS_THOUGHTS)
    example = tokenize_record(chat("Yes.", THOUGHTS), tokenizer, name="a")
    assert runs(example, tokenizer) == ["Yes.<|im_end|>", f"{THOUGHTS}<|im_end|>"]


def test_a_generation_prompt_that_opens_a_thought_does_not_hide_the_answer(tokenizers):
    template = "{% for m in messages %}" + TURN + "{% endfor %}"
    template += ASK.replace("assistant\n", "assistant\n<think>\n")
    tokenizer = tokenizers("smollm2", template)
    example = tokenize_record(chat("It is 42.", "Yes."), tokenizer, name="a")
    closed = "\n</think>\n\nYes.<|im_end|>"
    assert runs(example, tokenizer) == ["It is 42.<|im_end|>", closed]


def test_no_user_token_counts_where_a_generation_prompt_changes_what_stands_before(tokenizers):
    """Such a template renders another system turn when it asks for an answer."""
    template = (
        "{{ '<|im_start|>system\n' + ('Think.' if add_generation_prompt else 'Talk.') + "
        "'<|im_end|>\n' }}{% for m in messages %}" + TURN + "{% endfor %}" + ASK
    )
    tokenizer = tokenizers("smollm2", template)
    example = tokenize_record(chat("It is 42."), tokenizer, name="a")
    assert runs(example, tokenizer) == ["It is 42.<|im_end|>"]
    assert "Think." in tokenizer.decode(example.ids.tolist())


def test_a_conversation_that_the_template_refuses_is_one_message(tokenizers):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConchError, match=r"refuses a conversation of user.*roles must alternate"):
        tokenize_record(chat("Yes."), tokenizers("smollm2", template), name="a")


def test_a_conversation_that_begins_with_the_assistant_is_refused(tokenizers):
    record = {"messages": [{"role": "assistant", "content": "Hello, I am here."}]}
    with pytest.raises(ConchError, match="example 2 begins with an assistant turn"):
        tokenize_record(record, tokenizers("qwen2.5"), name="example 2")


# Prompts


def test_a_prompt_asks_through_the_template_or_plainly(tokenizers, plain):
    tokenizer = tokenizers("smollm2")
    assert tokenizer.decode(prompt_ids(tokenizer, "Why?", "Be brief.")) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert prompt_ids(plain, "Why?", "Be brief.") == plain.encode("Be brief.\n\nWhy?")
    assert prompt_ids(plain, "Why?", "") == plain.encode("Why?")
    assert plain_prompt("Why?", "") == "Why?"


@pytest.mark.parametrize("refuses", [True, False])
def test_a_system_prompt_stands_above_the_prompt_where_the_template_has_no_place(
    tokenizers, refuses
):
    first = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    skip = "{% if m['role'] != 'system' %}" + TURN + "{% endif %}"
    template = (first if refuses else "") + "{% for m in messages %}" + skip + "{% endfor %}" + ASK
    tokenizer = tokenizers("smollm2", template)
    assert prompt_messages(tokenizer, "Why?", "Be brief.") == [
        {"role": "user", "content": "Be brief.\n\nWhy?"}
    ]
    assert "Be brief.\n\nWhy?" in tokenizer.decode(prompt_ids(tokenizer, "Why?", "Be brief."))


# Fitting and splitting


def of_lengths(*lengths: int) -> list[Example]:
    made = []
    for number, length in enumerate(lengths, 1):
        counted = np.ones(length, bool)
        counted[0] = False
        made.append(Example(np.zeros(length, np.int32), counted, f"example {number}"))
    return made


def test_examples_that_are_too_long_are_named_and_refused():
    with pytest.raises(ConchError) as caught:
        fitting(of_lengths(5, 11, 10, 12), 10)
    assert "2 of 4 examples are longer than 10 tokens" in str(caught.value)
    assert "example 2 (11), example 4 (12)" in str(caught.value)
    assert "--too-long skip" in str(caught.value)
    with pytest.raises(ConchError, match=r"example 5 \(11\) and 2 more\."):
        fitting(of_lengths(*[11] * 7), 10)


def test_examples_that_are_too_long_are_left_out_if_asked():
    assert fitting(of_lengths(5, 11, 10, 12), 10, skip=True) == [0, 2]
    assert fitting(of_lengths(5, 10), 10) == [0, 1]
    with pytest.raises(ConchError, match="2 of 2 examples are longer"):
        fitting(of_lengths(11, 12), 10, skip=True)


def pairs(*prompts: str) -> list[dict[str, str]]:
    return [{"prompt": p, "completion": str(i)} for i, p in enumerate(prompts)]


RECORDS = {
    "completions": lambda prompts: pairs(*prompts),
    "texts": lambda prompts: [{"text": prompt} for prompt in prompts],
    "messages": lambda prompts: [
        {"messages": [*chat(str(i), "Yes.", user=p)["messages"]]} for i, p in enumerate(prompts)
    ],
}


@given(
    prompts=st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=30),
    fraction=st.floats(0.01, 0.5),
    seed=st.integers(0, 1000),
    form=st.sampled_from(sorted(RECORDS)),
)
def test_no_prompt_is_on_both_sides_and_both_have_one(prompts, fraction, seed, form):
    if len(set(prompts)) < 2:
        prompts = [*prompts, "z"]
        prompts += ["y"] if len(set(prompts)) < 2 else []
    records = RECORDS[form](prompts)
    train, heldout = split_heldout(records, fraction, seed=seed)
    assert train and heldout
    assert sorted(train + heldout) == list(range(len(records)))
    assert train == sorted(train) and heldout == sorted(heldout)
    assert not {prompts[i] for i in train} & {prompts[i] for i in heldout}
    assert split_heldout(records, fraction, seed=seed) == (train, heldout)


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(2, 0.1, 1), (2, 0.5, 1), (3, 0.5, 2), (10, 0.1, 1), (60, 0.1, 6), (100, 0.25, 25)],
)
def test_the_share_held_out_is_the_one_asked_for(count, fraction, expected):
    records = pairs(*map(str, range(count)))
    assert len(split_heldout(records, fraction, seed=0)[1]) == expected
    chosen = {tuple(split_heldout(records, fraction, seed=seed)[1]) for seed in range(20)}
    assert len(chosen) > 1


def test_answers_to_one_prompt_stay_together():
    """Only the prompt decides, however the conversation goes on."""
    records = [chat("Yes.", user="A"), chat("No.", "Never.", user="A"), chat("Yes.", user="B")]
    for seed in range(10):
        train, heldout = split_heldout(records, 0.5, seed=seed)
        assert {tuple(train), tuple(heldout)} == {(0, 1), (2,)}


@pytest.mark.parametrize("records", [[], pairs("a"), pairs("a", "a", "a")])
def test_one_prompt_alone_cannot_be_split(records):
    with pytest.raises(ConchError, match="give at least two"):
        split_heldout(records, 0.1, seed=0)


def test_an_array_of_a_json_file_is_read_item_by_item(tmp_path):
    records = [{"text": "One."}, {"text": "Two."}]
    path = write(tmp_path, json.dumps(records, indent=1), "data.json")
    assert read_records(path) == records
    assert read_prompts(write(tmp_path, '["A?",\n {"prompt": "B?"}]', "p.json")) == ["A?", "B?"]
    with pytest.raises(ConchError, match=r"p\.json, item 2: no prompt"):
        read_prompts(write(tmp_path, '["A?", 3]', "p.json"))
    with pytest.raises(ConchError, match=r"p\.json is no array"):
        read_prompts(write(tmp_path, '{"prompt": "B?"}', "p.json"))


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_json_that_is_nested_too_deeply_is_one_line(tmp_path, name):
    with pytest.raises(ConchError, match="not JSON") as error:
        read_records(write(tmp_path, "[" * 200_000, name))
    assert len(str(error.value)) < 300


def test_a_text_that_spells_its_beginning_gets_no_second_one(shared_data):
    tokenizer = load_tokenizer(shared_data / "models" / "stories260K")
    example = tokenize_record({"text": "<s>Once upon</s>"}, tokenizer, name="a")
    assert example.ids.tolist() == [1, 403, 407, 2]
    assert example.counted.tolist() == [False, True, True, True]
