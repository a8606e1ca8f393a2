"""What a body may say, and the one line that every refusal is."""

import json
import time

import pytest

from conch_dna.cortex.answer import Answer
from conch_dna.cortex.options import ServerSettings
from conch_dna.cortex.server.openai_api import ChatRequest, CompletionRequest, parse_request
from conch_dna.cortex.server.replies import ChatReplies, TextReplies
from conch_dna.ego.settings import EgoConfig
from conch_dna.errors import ConchError
from conch_dna.web.door import ApiError

ASKED = {"model": "owls", "messages": [{"role": "user", "content": "hello"}]}


def parse_chat(body):
    return parse_request(body, ChatRequest)


def parsed(**more):
    return parse_chat(json.dumps(ASKED | more).encode())


def options_of(**more):
    """How the first answer is drawn."""
    return parsed(**more).questions[0][1]


def test_what_is_not_said_has_its_default():
    chat = parsed()
    assert (chat.model, chat.stream, chat.stream_options.include_usage) == ("owls", False, None)
    assert chat.turns == [{"role": "user", "content": "hello"}]
    [(turns, options)] = chat.questions
    assert turns == chat.turns
    assert (options.temperature, options.top_p, options.hand_over) == (0, 1, "auto")


def test_what_is_said_is_taken():
    chat = parsed(
        max_completion_tokens=7,
        temperature=1,
        top_p=0.5,
        seed=3,
        stream=True,
        stream_options={"include_usage": True},
        conch={"hand_over": "never", "structured": False, "system": "Be short."},
        messages=[
            {"role": "developer", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "refusal": None, "annotations": []},
            {"role": "user", "content": "d"},
        ],
    )
    [(_, options)] = chat.questions
    assert (options.max_tokens, options.temperature, options.top_p, options.seed) == (7, 1, 0.5, 3)
    assert (options.hand_over, options.structured, options.system) == ("never", False, "Be short.")
    assert chat.stream and chat.stream_options.include_usage
    assert [turn["role"] for turn in chat.turns] == ["system", "user", "assistant", "user"]
    assert [turn["content"] for turn in chat.turns] == ["a", "b", "c", "d"]


def test_who_draws_without_a_seed_gets_another_answer_each_time():
    assert len({options_of(temperature=1).seed for _ in range(5)}) > 1
    assert len({options_of().seed for _ in range(5)}) == 1


def test_what_changes_nothing_or_is_for_records_is_taken_and_dropped():
    assert options_of(
        n=1, stop=None, logprobs=False, tools=[], response_format={"type": "text"}, user="u"
    ) == options_of(metadata={"a": "b"}, store=True)


@pytest.mark.parametrize(
    "more",
    [
        {"top_logprobs": 0},
        {"safety_identifier": "s"},
        {"prompt_cache_key": "k", "prompt_cache_retention": "24h"},
        {"prediction": {"type": "content", "content": "a"}},
        {"verbosity": "medium", "service_tier": "flex", "function_call": "none"},
        {"messages": [{"role": "user", "content": "hello", "name": "Ann"}]},
    ],
)
def test_what_the_api_takes_and_changes_nothing_here_is_taken(more):
    assert (parsed(**more).turns, options_of(**more)) == (parsed().turns, options_of())
    assert parsed(**more).ignored == []


@pytest.mark.parametrize("seed", [0, 10**9, 10**9 + 1, -1, 2**40, 2**63 - 1, -(2**63)])
def test_every_seed_of_64_bits_draws_and_ego_takes_it_too(seed):
    options = options_of(seed=seed)
    assert options.seed == options_of(seed=seed).seed == seed % (10**9 + 1)
    assert EgoConfig(seed=options.seed)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"n": 0}, "n is 0: give a whole number from 1 to 128"),
        ({"n": True}, "n is True"),
        ({"stop": [""]}, r"stop\[0\] is '': give a text, or at most 16"),
        ({"stop": ["a"] * 17}, r"stop is \['a', 'a'.*: give a text, or at most 16"),
        ({"logprobs": 3}, "logprobs is 3: give true or false"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21: give .* from 0 to 20"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"top_k": -2}, "top_k is -2"),
        ({"logit_bias": {"a": 1}}, "logit_bias has 'a': give ids of tokens"),
        ({"logit_bias": {"1": 101}}, r"logit_bias.1 is 101: give an object of at most 1,024"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\].function is missing: give an object"),
        ({"tools": [{"type": "web"}]}, r"tools\[0\].type is 'web': give function"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 1}}}]},
            "parameters of a function: the schema's type is 1: answers are objects",
        ),
        ({"tool_choice": "maybe"}, "tool_choice.type is 'maybe': give none, auto, required"),
        ({"functions": [{}]}, "functions is not supported by this server: use tools"),
        ({"response_format": {"type": "xml"}}, "response_format.type is 'xml': give text"),
        ({"response_format": {"type": "json_schema"}}, "give both or neither"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "array"}},
                }
            },
            "answers are objects",
        ),
        ({"modalities": ["audio"]}, "modalities is not supported by this server: leave it out"),
        ({"model": None}, "model is missing"),
        ({"messages": None}, "messages is missing: give a list of objects"),
        ({"messages": []}, r"messages is \[\]: give a list of objects"),
        ({"messages": ["hello"]}, r"messages\[0\] is 'hello': give a list of objects"),
        ({"messages": [{"role": "robot", "content": "a"}]}, r"messages\[0\].role is 'robot'"),
        (
            {"messages": [{"role": "user"}]},
            r"messages\[0\].content is missing: give a text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"messages\[0\].content\[0\].type is 'image_url': give text",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]},
            r"messages\[0\].tool_calls\[0\] is 1: give a list of objects with id",
        ),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "differ: give one of them"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": 2.1}, "temperature is 2.1: give a number from 0 to 2"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"temperature": True}, "temperature is True"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"seed": 2**63}, "seed is 9223372036854775808: give a whole number of 64 bits"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs: set it to true"),
        ({"verbosity": "low"}, "verbosity is not supported"),
        ({"messages": [{"role": "user", "content": "a", "name": 1}]}, r"messages\[0\].name is 1"),
        ({"stream": "yes"}, "stream is 'yes'"),
        ({"stream_options": {"include_usage": True}}, "stream_options is for streams"),
        (
            {"stream": True, "stream_options": 1},
            "stream_options is 1: give an object",
        ),
        ({"conch": []}, r"conch is \[\]: give an object with hand_over"),
        (
            {"conch": {"ego": 1}},
            "conch.ego is not supported .*: give an object with",
        ),
        (
            {"conch": {"hand_over": "maybe"}},
            "conch.hand_over is 'maybe': give auto, never or always",
        ),
        ({"conch": {"hand_over": 1}}, "conch.hand_over is 1"),
        ({"conch": {"structured": 1}}, "conch.structured is 1"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(more, message):
    with pytest.raises(ApiError, match=message) as refused:
        parsed(**more)
    assert refused.value.status == 400
    assert "\n" not in str(refused.value)


def test_all_that_is_wrong_is_told_at_once_and_values_are_cut():
    with pytest.raises(ApiError) as refused:
        parsed(temperature=-1, messages=[{"role": "x" * 10**5, "content": 1}] * 9)
    message = str(refused.value)
    assert "messages[0].role is 'xxx" in message and "messages[2].content is 1" in message
    assert message.endswith("; and 11 more") and len(message) < 1000
    assert refused.value.param == "temperature"


def many(piece, count=2**20):
    """A body of about a megabyte, of many pieces."""
    return json.dumps(ASKED)[:-1] + ', "x": [' + ",".join([piece] * (count // len(piece))) + "]}"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{" + ",".join(f'"k{n}": 1, "k{n}": 2' for n in range(16_000)) + "}", "more than once"),
        (many("[]"), "more than 50,000 values"),
        (many('"m"').replace('"messages"', '"m"').replace('"x"', '"messages"'), "50,000 values"),
        (many("{}").replace('"messages"', '"m"').replace('"x"', '"messages"'), "50,000 values"),
        (many("0", 45_000).replace('"messages"', '"m"').replace('"x"', '"messages"'), "is 0"),
        (json.dumps(ASKED | {str(n): 1 for n in range(80_000)}), "more than 50,000 values"),
    ],
)
def test_what_is_wrong_with_a_large_body_is_told_in_no_time_and_few_words(body, message):
    began = time.process_time()
    with pytest.raises(ApiError, match=message) as refused:
        parse_chat(body.encode())
    # Far above what it takes, and far below a search that grows with the square.
    assert time.process_time() - began < 8
    assert len(str(refused.value)) < 2000


def test_what_is_not_known_is_ignored_and_named():
    began = time.process_time()
    chat = parsed(
        **{str(n): 1 for n in range(40_000)},
        messages=[{"role": "user", "content": "hello", "mood": 1}] * 2,
        stream=True,
        stream_options={"x": 1},
    )
    assert time.process_time() - began < 8
    assert len(chat.ignored) == 40_002
    assert {"0", "39999", "messages.mood", "stream_options.x"} <= set(chat.ignored)
    assert [turn["content"] for turn in chat.turns] == ["hello", "hello"]


def test_texts_are_asked_for_by_a_prompt_alone():
    body = {"model": "owls", "prompt": ["a", "b"], "n": 2, "seed": 4, "logprobs": 3, "stop": "."}
    asked = parse_request(json.dumps(body).encode(), CompletionRequest)
    assert [(prompt, options.seed) for prompt, options in asked.questions] == [
        ("a", 4),
        ("a", 5),
        ("b", 4),
        ("b", 5),
    ]
    options = asked.questions[0][1]
    assert options.plain and options.hand_over == "never"
    assert (options.top_logprobs, options.stop) == (3, (".",))
    for more, message in [
        ({"prompt": [1, 2]}, r"prompt\[0\] is 1: give .*; token ids are not taken"),
        ({"prompt": []}, r"prompt is \[\]"),
        ({"suffix": "end"}, "suffix is not supported"),
        ({"best_of": 3}, "best_of is not supported"),
        ({"echo": True}, "leave out echo or logprobs"),
    ]:
        with pytest.raises(ApiError, match=message):
            parse_request(json.dumps(body | more).encode(), CompletionRequest)


@pytest.mark.parametrize("text", [", " * 60_000, '","' * 60_000, "\\," * 60_000])
def test_commas_of_a_text_are_no_values(text):
    message = {"role": "user", "content": text}
    assert parsed(messages=[message]).turns == [message]


@pytest.mark.parametrize("body", ['"' + '\\"' * 250_000, '{"a' * 150_000, '",' * 300_000])
def test_strings_that_never_end_are_read_once(body):
    began = time.process_time()
    with pytest.raises(ApiError, match="the body"):
        parse_chat((body + "," * 60_000).encode())
    assert time.process_time() - began < 1


def test_a_body_may_be_64_deep_and_no_deeper():
    def nested(depth):
        return json.dumps(ASKED | {"metadata": json.loads("[" * depth + "]" * depth)}).encode()

    assert parse_chat(nested(63)).model == "owls"
    with pytest.raises(ApiError, match="nested more than 64 deep"):
        parse_chat(nested(64))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is no JSON"),
        (b"\xff", "the body is no JSON"),
        (b"[]", "the body is no JSON object"),
        (b'{"model": "a", "model": "b"}', 'the key "model" stands in it more than once'),
        (b'{"temperature": NaN}', "NaN is no JSON number"),
        (b"[" * 100_000, "the body is no JSON"),
    ],
)
def test_a_body_that_is_no_object_is_refused(body, message):
    with pytest.raises(ApiError, match=message):
        parse_chat(body)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (401, "authentication_error"), (503, "server_error")],
)
def test_an_error_has_the_shape_that_clients_know(status, kind):
    told = ApiError(status, "why", param="model", code="c").to_json()
    assert told == {"error": {"message": "why", "type": kind, "param": "model", "code": "c"}}


def test_a_reply_tells_who_answered_and_what_the_check_found():
    answer = Answer(
        domain="thinking",
        text='{"a": 1}',
        answered_by="neuron",
        reason="why",
        parsed={"a": 1},
        valid=True,
        confidence=0.5,
        prompt_tokens=3,
        completion_tokens=4,
    )
    told = ChatReplies("thinking", (), counts=False).whole([answer])
    conch = told["conch"]
    assert (conch["answered_by"], conch["reason"], conch["confidence"]) == ("neuron", "why", 0.5)
    assert (conch["parsed"], conch["valid"], conch["problems"]) == ({"a": 1}, True, ())
    assert told["choices"][0]["message"]["content"] == '{"a": 1}'
    assert told["usage"]["total_tokens"] == 7


def test_usage_is_only_told_where_it_is_known():
    counts = {
        "domain": "m",
        "text": "a",
        "answered_by": "ego",
        "reason": "",
        "completion_tokens": 4,
    }
    known, unknown = (Answer(**counts, prompt_tokens=count) for count in (3, None))
    replies = ChatReplies("m", (), counts=False)
    assert replies.whole([known])["usage"]["total_tokens"] == 7
    # The prompt counts once.
    assert replies.whole([known, known])["usage"]["total_tokens"] == 11
    two = TextReplies("m", (), ["", ""], asked=2, counts=False)
    assert two.whole([known, known])["usage"]["total_tokens"] == 14
    assert replies.whole([known, unknown])["usage"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 70000}, "port is 70000"),
        ({"host": "0.0.0.0"}, "name a variable with a key by --api-key-env"),
        ({"host": "example.org"}, "host is 'example.org'"),
        ({"api_key_env": "sk-123"}, "give the variable's name, not the key"),
        ({"max_queue": 0}, "max_queue is 0"),
        ({"grace_s": -1.0}, "grace_s is -1"),
        ({"max_body_bytes": 1.5}, "max_body_bytes is 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConchError, match=message):
        ServerSettings(**settings)


def test_the_key_comes_from_the_environment(monkeypatch):
    settings = ServerSettings(host="0.0.0.0", api_key_env="CONCH_DNA_TEST_KEY")
    monkeypatch.delenv("CONCH_DNA_TEST_KEY", raising=False)
    with pytest.raises(ConchError, match="CONCH_DNA_TEST_KEY is empty or not set"):
        settings.key()
    monkeypatch.setenv("CONCH_DNA_TEST_KEY", " secret\n")
    assert settings.key() == "secret"
    assert ServerSettings(host="::1").key() == ""
