"""Each field of OpenAI's chat and text completions, by the official client over loopback."""

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import openai
import pytest

from conch_dna.cortex.engine.batching import Piece
from conch_dna.cortex.engine.drawing import make_request_sampler
from conch_dna.cortex.neuron import CortexSuite, create_cortex_suite
from conch_dna.cortex.options import AskOptions, DrawOptions
from conch_dna.cortex.server.jobs import Job, Part, Question
from conch_dna.cortex.server.replies import TextReplies
from conch_dna.cortex.server.serving import CortexServer
from conch_dna.cortex.spoken import Spoken
from conch_dna.cortex.tools import Call, Tools, prompt_with_tools
from conch_dna.errors import ConchError
from conch_dna.language_model import ASSETS, load_tokenizer
from conch_dna.training.chats.conversations import prompt_ids
from conch_dna.training.cross_tokenizer.token_bytes import token_bytes
from conch_dna.training.structured_answers import parse_answer
from conch_dna.web.door import ApiError
from servers import OPENINGS, TALE, TEACHER, ask, client_of, raw, said, served

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time."}}


@pytest.fixture(scope="module")
def server(served_adapters: Path) -> Iterator[CortexServer]:
    with served(served_adapters, TEACHER, max_queue=40) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: CortexServer) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


@pytest.fixture(scope="module")
def alone(served_adapters: Path) -> Iterator[CortexSuite]:
    with create_cortex_suite(served_adapters) as suite:
        yield suite


def text_of(stream) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


# stop


def test_an_answer_ends_before_a_stop(client):
    whole = ask(client, "tales", TALE, max_tokens=30)
    text = whole.choices[0].message.content
    stop = text[len(text) // 2 :][:6]
    expected = text[: text.index(stop)]
    for stops in (stop, ["never said", stop]):
        cut = ask(client, "tales", TALE, max_tokens=30, stop=stops)
        assert cut.choices[0].message.content == expected
        assert cut.choices[0].finish_reason == "stop"
        assert cut.usage.completion_tokens < whole.usage.completion_tokens
    stream = ask(client, "tales", TALE, {"hand_over": "never"}, stop=stop, stream=True)
    assert text_of(stream) == expected
    # What only begins like a stop is said.
    begun = ask(client, "tales", TALE, max_tokens=30, stop=text[-3:] + "\x00")
    assert begun.choices[0].message.content == text


@pytest.mark.parametrize("hand_over", [None, "always"])
@pytest.mark.parametrize("stream", [False, True])
def test_ego_computes_nothing_behind_a_stop(client, hand_over, stream):
    """Silent failure: the reply is right and comes late, as EGO went on to the last token."""
    model = "tales" if hand_over else "ego"
    conch = {"hand_over": hand_over} if hand_over else None
    whole = ask(client, model, TALE, conch, max_tokens=60)
    text = whole.choices[0].message.content
    stop = text[10:14]
    more = {"stream_options": {"include_usage": True}} if stream else {}
    cut = ask(client, model, TALE, conch, max_tokens=60, stop=stop, stream=stream, **more)
    if stream:
        chunks = list(cut)
        got, usage = text_of(chunks), chunks[-1].usage
    else:
        got, usage = cut.choices[0].message.content, cut.usage
    assert got == text[: text.index(stop)]
    assert usage.completion_tokens < whole.usage.completion_tokens / 2


def test_a_stop_frees_its_place_in_the_engine(alone):
    text = alone.ask("tales", TALE, max_tokens=30).text
    cut = alone.ask("tales", TALE, max_tokens=30, stop=(text[9:12],))
    assert cut.text == text[: text.index(text[9:12])] and cut.finish_reason == "stop"
    assert alone.engine.pending == 0
    with pytest.raises(ConchError, match="a stop is an empty text"):
        alone.ask("tales", TALE, stop=("",))


def test_several_answers_share_what_was_tokenised(alone):
    turn = alone.turn("tales", TALE, AskOptions(temperature=1.0, seed=3))
    assert turn.drawn[0].seed == 3
    other = turn.with_seed(4)
    expected = alone.turn("tales", TALE, AskOptions(temperature=1.0, seed=4))
    assert other.request == expected.request and other.options == expected.options
    assert other.drawn == expected.drawn != turn.drawn
    assert other.request.tokens is turn.request.tokens
    # What the one is told, the other is not.
    turn.add(Piece(0, 5, -1.0, "length"))
    assert turn.answer is not None and other.answer is None and other.request is not None
    # The likeliest tokens are the same for every seed, so EGO can answer them together.
    assert (
        alone.turn("tales", TALE, AskOptions(seed=1)).drawn
        == alone.turn("tales", TALE, AskOptions(seed=2)).drawn
    )


# logprobs


def test_log_probabilities_are_told(client, alone):
    done = ask(client, "tales", TALE, max_tokens=6, logprobs=True, top_logprobs=3)
    [choice] = done.choices
    told = choice.logprobs.content
    assert "".join(each.token for each in told) == choice.message.content
    assert b"".join(bytes(each.bytes) for each in told).decode() == choice.message.content
    tokenizer = alone.base.tokenizer
    ids = tokenizer.encode(TALE)
    for each in told:
        logits = alone.bank.tree("tales")(mx.array([ids]))[0, -1].astype(mx.float32)
        expected = np.asarray(logits - mx.logsumexp(logits))
        best = np.argsort(-expected)[:3]
        names = [token_bytes(tokenizer).texts[token].decode(errors="replace") for token in best]
        assert [top.token for top in each.top_logprobs] == names
        assert each.logprob == pytest.approx(expected[best[0]], abs=1e-4)
        got = [top.logprob for top in each.top_logprobs]
        assert got == pytest.approx(expected[best].tolist(), abs=1e-4)
        ids.append(int(best[0]))
    assert ask(client, "tales", TALE, max_tokens=6).choices[0].logprobs is None
    bare = ask(client, "tales", TALE, max_tokens=2, logprobs=True).choices[0].logprobs.content
    assert [each.top_logprobs for each in bare] == [[], []]
    # A stop of several tokens is said no more than its text is.
    text = choice.message.content
    stop = "".join(each.token for each in told[2:5])
    [cut] = ask(client, "tales", TALE, max_tokens=9, logprobs=True, stop=stop).choices
    assert cut.message.content == text[: text.index(stop)]
    assert [each.token for each in cut.logprobs.content] == [each.token for each in told[:2]]


@pytest.mark.parametrize("word", ["é", "😀", "é😀é"])
def test_parts_of_a_character_before_a_stop_are_told(alone, word):
    texts = list(token_bytes(alone.base.tokenizer).texts)
    told = [texts.index(bytes([each])) for each in word.encode()]
    options = AskOptions(stop=(".",), top_logprobs=0, plain=True, hand_over="never")
    turn = alone.turn("tales", TALE, options)
    for token in [*told, texts.index(b".")]:
        turn.add(Piece(0, token, -1.0, None))
    assert turn.answer.text == word
    assert [piece.token for piece in turn.answer.tokens] == told


def test_a_stream_tells_each_log_probability_once(client):
    whole = ask(client, "owls", OPENINGS["owls"], max_tokens=60, logprobs=True)
    for hand_over in ("never", "auto"):
        stream = ask(
            client,
            "owls",
            OPENINGS["owls"],
            {"hand_over": hand_over},
            max_tokens=60,
            logprobs=True,
            stream=True,
        )
        told = [
            each
            for chunk in stream
            if chunk.choices[0].logprobs
            for each in chunk.choices[0].logprobs.content
        ]
        assert [each.token for each in told] == [
            each.token for each in whole.choices[0].logprobs.content
        ]


# Draws


def test_limits_and_penalties_of_a_draw():
    logits = mx.log(mx.array([[0.4, 0.3, 0.2, 0.07, 0.03]]))

    def drawn(count=400, **options):
        draw = make_request_sampler(DrawOptions(temperature=1.0, **options), 5)
        return [int(draw(logits)[0]) for _ in range(count)]

    assert set(drawn()) == {0, 1, 2, 3, 4}
    assert set(drawn(top_k=2)) == {0, 1}
    assert set(drawn(top_k=99)) == {0, 1, 2, 3, 4}
    # 0.2 is half of 0.4, and 0.07 is not.
    assert set(drawn(min_p=0.45)) == {0, 1, 2}
    assert set(drawn(top_p=0.5)) == {0, 1}
    assert set(drawn(min_p=0.45, top_k=1)) == {0}
    assert set(drawn(logit_bias=((0, -100.0), (4, 100.0)))) == {4}
    greedy = make_request_sampler(DrawOptions(presence_penalty=2.0), 5)
    # What was drawn has lost two nats, so that each comes once before any comes again.
    assert [int(greedy(logits)[0]) for _ in range(4)] == [0, 1, 2, 3]
    greedy = make_request_sampler(DrawOptions(frequency_penalty=0.5), 5)
    counts = np.zeros(5)
    for _ in range(30):
        expected = int(np.argmax(np.asarray(logits)[0] - 0.5 * counts))
        assert int(greedy(logits)[0]) == expected
        counts[expected] += 1


def test_draws_by_the_api_are_those_without_a_server(client, alone):
    drawn = {"temperature": 1.0, "seed": 7, "presence_penalty": 0.5, "frequency_penalty": 0.3}
    done = client.chat.completions.create(
        model="tales",
        messages=said(TALE),
        max_tokens=20,
        extra_body={"top_k": 9, "min_p": 0.01},
        **drawn,
    )
    expected = alone.ask("tales", TALE, max_tokens=20, top_k=9, min_p=0.01, **drawn)
    assert done.choices[0].message.content == expected.text
    [banned] = alone.base.tokenizer.encode(" the", add_special_tokens=False)[:1]
    free = ask(client, "tales", TALE, max_tokens=40)
    held = ask(client, "tales", TALE, max_tokens=40, logit_bias={str(banned): -100})
    assert " the" in free.choices[0].message.content
    assert " the " not in held.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="logit_bias has the token 99999"):
        ask(client, "tales", TALE, logit_bias={"99999": 1})
    for field in ({"frequency_penalty": 0.5}, {"logprobs": True}, {"tools": [CLOCK]}):
        with pytest.raises(openai.BadRequestError, match=f"{next(iter(field))} is not supported"):
            ask(client, "ego", TALE, **field)


def test_a_hand_over_tells_what_ego_leaves_out(client):
    done = ask(client, "tales", TALE, {"hand_over": "always"}, max_tokens=4, logprobs=True)
    assert done.conch["answered_by"] == "ego" and done.choices[0].logprobs is None
    assert done.conch["reason"].endswith("EGO answers without logprobs")


# n


def test_several_answers_are_those_of_the_next_seeds(client):
    drawn = {"temperature": 1.0, "max_tokens": 12}
    one = [
        ask(client, "tales", TALE, seed=5 + number, **drawn).choices[0].message.content
        for number in range(3)
    ]
    several = ask(client, "tales", TALE, seed=5, n=3, **drawn)
    assert [choice.message.content for choice in several.choices] == one
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert all(choice.conch["answered_by"] == "neuron" for choice in several.choices)
    assert several.usage.completion_tokens == 36
    texts = ["", "", ""]
    ends = []
    more = {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in ask(client, "tales", TALE, {"hand_over": "never"}, seed=5, n=3, **drawn, **more):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends += [choice.index] if choice.finish_reason else []
        usage = chunk.usage
    assert texts == one and sorted(ends) == [0, 1, 2]
    assert usage.completion_tokens == 36
    by_ego = ask(client, "ego", TALE, seed=5, n=2, **drawn)
    assert len({choice.message.content for choice in by_ego.choices}) == 2


def test_more_answers_than_are_waited_for_are_refused(client, server):
    with pytest.raises(openai.BadRequestError, match="wants 41 answers, and at most 40") as error:
        ask(client, "tales", TALE, n=41)
    assert error.value.param == "n"
    # Their places are free again.
    assert len(ask(client, "tales", TALE, n=40, max_tokens=1).choices) == 40


# tools


def test_a_call_that_must_be_made_is_made_and_valid(client):
    asked = {"tools": [WEATHER, CLOCK], "tool_choice": "required", "parallel_tool_calls": False}
    [choice] = ask(client, "tales", TALE, max_tokens=99, **asked).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    for call in choice.message.tool_calls:
        assert call.type == "function" and call.id.startswith("call_")
        arguments = json.loads(call.function.arguments)
        if call.function.name == "weather":
            assert arguments["city"] in ("Rome", "Oslo") and arguments["days"] <= 9
        else:
            assert (call.function.name, arguments) == ("clock", {})
    several = ask(client, "tales", TALE, max_tokens=60, **(asked | {"parallel_tool_calls": True}))
    assert several.choices[0].finish_reason == "length" or several.choices[0].message.tool_calls
    named = {"type": "function", "function": {"name": "weather"}}
    asked |= {"tool_choice": named}
    [choice] = ask(client, "tales", TALE, max_tokens=99, **asked).choices
    [call] = choice.message.tool_calls
    assert call.function.name == "weather"
    deltas = [
        part
        for chunk in ask(client, "tales", TALE, max_tokens=99, stream=True, **asked)
        for part in chunk.choices[0].delta.tool_calls or ()
    ]
    [part] = deltas
    assert part.function.arguments == call.function.arguments and part.index == 0


def test_a_conversation_with_calls_goes_on(client):
    [choice] = ask(
        client,
        "tales",
        TALE,
        tools=[CLOCK],
        tool_choice="required",
        max_tokens=99,
        parallel_tool_calls=False,
    ).choices
    call = choice.message.tool_calls[0]
    turns = [
        *said(TALE),
        choice.message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "noon"},
    ]
    done = client.chat.completions.create(
        model="tales", messages=turns, tools=[CLOCK], tool_choice="none", max_tokens=5
    )
    assert done.choices[0].message.content and not done.choices[0].message.tool_calls


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tools": [CLOCK, CLOCK]}, "two functions are called 'clock': rename one"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "a function is called 'a b': use 1 to 64 letters",
        ),
        (
            {
                "tools": [CLOCK],
                "tool_choice": {"type": "function", "function": {"name": "weather"}},
            },
            "tool_choice names 'weather', and there is clock",
        ),
        ({"tool_choice": "required"}, "tool_choice asks for a call, and there are no tools"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "parameters": {
                                "type": "object",
                                "properties": {"a": False},
                                "required": ["a"],
                            },
                        },
                    }
                ],
                "tool_choice": "required",
            },
            "nsatisfiable",
        ),
        (
            {"tools": [CLOCK], "conch": {"hand_over": "always"}},
            "EGO knows nothing: leave one of them out",
        ),
    ],
)
def test_tools_that_cannot_be_are_refused(client, more, message):
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, "tales", TALE, **more)


# As Qwen writes them: mlx_lm knows the form by these words.
KNOWS_TOOLS = """{%- if tools %}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}{% for message in messages %}<{{ message.role }}>{{ message.content }}
{%- for tool_call in message.tool_calls or [] %}<tool_call>
{"name": "{{ tool_call.name }}"}</tool_call>{% endfor %}{% endfor %}<assistant>"""


def test_a_template_that_knows_tools_writes_them(tmp_path):
    shutil.copytree(ASSETS / "student", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": KNOWS_TOOLS}))
    tokenizer = load_tokenizer(tmp_path / "model")
    tools = Tools(functions=json.dumps([WEATHER["function"]]))
    turns = [{"role": "user", "content": "Rain?"}]
    assert prompt_with_tools(tokenizer, turns, tools) == (turns, [WEATHER])
    text = tokenizer.decode(prompt_ids(tokenizer, turns, "", tools=[WEATHER]))
    assert '"Oslo"' in text and text.endswith("<assistant>")


def test_without_such_a_template_tools_stand_in_the_text(alone):
    tools = Tools(functions=json.dumps([WEATHER["function"]]))
    turns = [
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": {"days": 1}}}],
        },
        {"role": "tool", "content": "dry", "tool_call_id": "1"},
    ]
    [system, user, call, result], none = prompt_with_tools(alone.base.tokenizer, turns, tools)
    assert none is None and json.dumps(CITY) in system["content"] and user == turns[0]
    assert call == {
        "role": "assistant",
        "content": '<tool_call>\n{"name": "weather", "arguments": {"days": 1}}\n</tool_call>',
    }
    assert result == {"role": "user", "content": "<tool_response>\ndry\n</tool_response>"}


NO_OBJECT = '<tool_call>{"name": "f", "arguments": "x"}</tool_call>'
# Half a character, which no reply can hold.
HALF = '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>'
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "</x>"}}\n</tool_call>'


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("text", "said", "calls", "stopped"),
    [
        ("hello", "hello", 0, False),
        (CALL, "", 1, False),
        (f"\n{CALL}\n{CALL}\n", "", 2, False),
        (f"Sure.{CALL}", "Sure.", 1, False),
        (f"{CALL}Done. STOP more", "Done. ", 1, True),
        ("a <tool", "a <tool", 0, False),
        ("<tool_call>{", "<tool_call>{", 0, False),
        ("<tool_call>x</tool_call> y", "<tool_call>x</tool_call> y", 0, False),
        (NO_OBJECT, NO_OBJECT, 0, False),
        (HALF, HALF, 0, False),
        ("a STO b STOP c", "a STO b ", 0, True),
        ("  ", "  ", 0, False),
    ],
)
def test_parts_of_a_text_are_told_apart_however_it_comes(text, said, calls, stopped, size):
    spoken = Spoken(["STOP"], calls=True)
    parts = [spoken.add(text[start : start + size]) for start in range(0, len(text), size)]
    parts.append(spoken.end())
    assert "".join(parts) == spoken.text == said
    assert spoken.calls == (Call("f", '{"a": "</x>"}'),) * calls
    assert spoken.stopped == stopped


@pytest.mark.parametrize("stream", [False, True])
def test_only_what_was_shown_must_come_again(alone, stream):
    turn = alone.turn("tales", TALE, AskOptions(hand_over="never"))

    async def again() -> Part | None:
        job = Job(Question("tales", TALE, turn.options, turn, stream), asyncio.Queue())
        assert job.unsent(Piece(0, 5, -1.0, None), "abc")
        job.begin_again()
        return job.unsent(Piece(1, 6, -1.0, None), "abd")

    if stream:
        with pytest.raises(ApiError, match="broke off"):
            asyncio.run(again())
    else:
        assert asyncio.run(again()) == Part("abd")


def test_answers_with_the_same_stops_share_what_finds_them():
    stops = tuple(letter * 1000 for letter in "abcdefgh")
    assert Spoken(stops, calls=False)._machine is Spoken(list(stops), calls=False)._machine


# Texts


def test_a_text_is_gone_on_with(client, alone):
    done = client.completions.create(model="tales", prompt=TALE, max_tokens=12)
    answer = alone.ask("tales", TALE, max_tokens=12, plain=True)
    assert done.object == "text_completion" and done.id.startswith("cmpl-")
    assert done.choices[0].text == answer.text and done.choices[0].finish_reason == "length"
    two = client.completions.create(
        model="tales", prompt=[TALE, "The owl"], n=2, max_tokens=4, echo=True, temperature=0
    )
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert [choice.text.startswith(TALE) for choice in two.choices] == [True, True, False, False]
    assert (
        two.choices[0].text
        == two.choices[1].text
        == TALE + (alone.ask("tales", TALE, max_tokens=4, plain=True).text)
    )
    parts = client.completions.create(
        model="tales", prompt=TALE, max_tokens=12, stream=True, echo=True
    )
    assert "".join(part.choices[0].text for part in parts) == TALE + answer.text
    told = client.completions.create(model="tales", prompt=TALE, max_tokens=3, logprobs=2)
    log_probs = told.choices[0].logprobs
    assert "".join(log_probs.tokens) == told.choices[0].text
    assert log_probs.text_offset == [0, *np.cumsum([len(t) for t in log_probs.tokens])[:-1]]
    for token, log_prob, top in zip(
        log_probs.tokens, log_probs.token_logprobs, log_probs.top_logprobs, strict=True
    ):
        assert len(top) == 2 and top[token] == pytest.approx(log_prob) == max(top.values())
    with pytest.raises(openai.BadRequestError, match="ego does not go on with texts"):
        client.completions.create(model="ego", prompt=TALE)
    with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
        client.completions.create(model="task", prompt="")


def test_parts_of_a_character_begin_where_it_does():
    texts = [b"a", b"\xc3", b"\xa9", b"b"]
    replies = TextReplies("m", texts, ["", ""], asked=2, counts=False)

    def offsets(index: int, tokens: list[int]) -> list[int]:
        pieces = [Piece(0, token, -1.0, None) for token in tokens]
        event = replies.part(index, "", pieces).removeprefix(b"data: ")
        return json.loads(event)["choices"][0]["logprobs"]["text_offset"]

    assert offsets(0, [0, 1]) == [0, 1]
    assert offsets(1, [1, 2, 0]) == [0, 0, 1]
    assert offsets(0, [2, 3, 3]) == [1, 2, 3]


# What is not known


def test_what_is_not_known_is_told_in_a_header(server):
    body = {"model": "tales", "messages": said(TALE), "max_tokens": 1, "mirostat": 2, "ü\r\n": 1}
    for stream in (False, True):
        status, headers, _ = raw(server, "POST", "/v1/chat/completions", body | {"stream": stream})
        assert status == 200
        assert headers["x-conch-warning"] == (
            "not known here and ignored: mirostat, %27%C3%BC%5Cr%5Cn%27"
        )
    many = body | {str(number): 0 for number in range(20)}
    _, headers, _ = raw(server, "POST", "/v1/chat/completions", many)
    assert headers["x-conch-warning"].endswith(" and 14 more")
    plain = {"model": "tales", "messages": said(TALE), "max_tokens": 1, "user": "me"}
    assert "x-conch-warning" not in raw(server, "POST", "/v1/chat/completions", plain)[1]


def form_of(**properties: object) -> dict[str, object]:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"response_format": form_of(**{f"k{n}": {"type": "integer"} for n in range(1001)})},
            "the schema has 1,001 properties: use at most 1,000",
        ),
        (
            {"response_format": form_of(a={"type": "integer", "multipleOf": 9_999_991})},
            "the schema has multipleOf .*: use at most 10,000",
        ),
        (
            {"response_format": form_of(a={"type": "object", "patternProperties": {"(a+)+$": {}}})},
            "patternProperties, which are not supported: name the keys",
        ),
        (
            {"response_format": form_of(a={"type": "string", "pattern": "(?=a)b"})},
            "pattern .* is not supported: .*without look-around",
        ),
        ({"stop": ["a" * 501, "b" * 500]}, "stops have 1,001 characters: at most 1,000"),
        ({"n": 128}, "the request wants 128 answers, and at most 40"),
    ],
)
def test_what_would_take_too_long_is_refused_at_once(client, more, message):
    began = time.process_time()
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, "tales", TALE, **more)
    assert time.process_time() - began < 5


def test_a_pattern_takes_no_longer_than_its_text():
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a+)+$"}}}
    began = time.process_time()
    assert not parse_answer(json.dumps({"a": "a" * 5000 + "!"}), schema).valid
    assert parse_answer(json.dumps({"a": "a" * 5000}), schema).valid
    assert time.process_time() - began < 2
