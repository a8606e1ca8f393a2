"""Answers held to a schema: the tokens are those of a loop over whole texts, in any batch."""

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from conch_dna.cortex.engine.adapter_bank import AdapterBank
from conch_dna.cortex.engine.batching import AnswerEngine, Piece, Request
from conch_dna.cortex.options import AskOptions
from conch_dna.ego import grammars
from conch_dna.ego.grammars import Grammars
from conch_dna.errors import ConchError
from conch_dna.language_model import LanguageModel, ModelSource
from conch_dna.training.structured_answers import DOMAIN_SCHEMAS, parse_answer
from cortex_models import TEXTS, train_adapter

STUDENT = "embedded:student"
SHORT = {
    "type": "object",
    "properties": {
        "sure": {"enum": ["low", "high"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "parts": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["sure", "count", "parts"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return ModelSource(STUDENT).load()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adapters")
    return train_adapter(place / "thinking", STUDENT, TEXTS["thinking"], lora_rank=4)


@pytest.fixture(scope="module")
def engine(base, adapter):
    bank = AdapterBank(base)
    bank.add("thinking", adapter)
    with closing(AnswerEngine(bank)) as made:
        yield made


def request(base, domain, text="The owl", schema=SHORT, **more) -> Request:
    more = {"max_tokens": 60, **more}
    ids = tuple(base.tokenizer.encode(text))
    return Request(domain=domain, tokens=ids, form=schema and json.dumps(schema), **more)


def by_hand(model: LanguageModel, ids: Sequence[int], schema, steps: int):
    """The likeliest allowed token after the whole text, each time; log-probability and share."""
    matcher = Grammars(model.tokenizer).matcher(json.dumps(schema))
    text, found = list(ids), []
    for _ in range(steps):
        logits = np.array(model.logits(mx.array([text]))[0, -1], np.float64)
        log_probs = logits - np.logaddexp.reduce(logits)
        allowed = np.frombuffer(matcher.compute_logit_bias(), np.uint8) > 0
        token = int(np.where(allowed, log_probs[: len(allowed)], -np.inf).argmax())
        found.append(
            (token, log_probs[token], 1 - np.exp(log_probs[: len(allowed)][allowed]).sum())
        )
        if token in model.tokenizer.eos_token_ids:
            break
        assert matcher.consume_token(token)
        text.append(token)
    return found


def text_of(base, pieces: Sequence[Piece]) -> str:
    ended = pieces[-1].finish_reason == "stop"
    return base.tokenizer.decode([piece.token for piece in pieces[: -1 if ended else None]])


def test_a_mixed_batch_writes_what_each_would_alone(base, adapter, engine):
    asked = [
        request(base, "thinking"),
        request(base, None),
        request(base, "thinking", schema=None, max_tokens=9),
        request(base, None, schema=DOMAIN_SCHEMAS["memory"], max_tokens=25),
    ]
    answers = engine.run(asked)
    adapted = ModelSource(STUDENT).load(adapter_path=adapter)
    for pieces, each, model in zip(answers, asked, [adapted, base, None, base], strict=True):
        if model is None:
            assert [piece.removed for piece in pieces] == [None] * len(pieces)
            free = engine.run([each])[0]
            assert [piece.token for piece in pieces] == [piece.token for piece in free]
            continue
        expected = by_hand(model, each.tokens, json.loads(each.form), each.max_tokens)
        assert [piece.token for piece in pieces] == [token for token, _, _ in expected]
        for piece, (_, log_prob, removed) in zip(pieces, expected, strict=True):
            assert piece.log_prob == pytest.approx(log_prob, abs=2e-4)
            assert piece.removed == pytest.approx(removed, abs=1e-4)
    assert parse_answer(text_of(base, answers[0]), SHORT).valid
    assert max(piece.removed for piece in answers[1]) > 0.5


def test_whatever_is_drawn_keeps_to_it_or_is_cut(base, engine):
    asked = [
        request(
            base,
            [None, "thinking"][seed % 2],
            temperature=1.5,
            top_p=0.95,
            seed=seed,
            max_tokens=140,
        )
        for seed in range(24)
    ]
    answers = engine.run(asked)
    texts = [text_of(base, pieces) for pieces in answers]
    ended = [pieces[-1].finish_reason == "stop" for pieces in answers]
    assert sum(ended) > 12 and len(set(texts)) > 12
    for text, whole in zip(texts, ended, strict=True):
        assert not whole or parse_answer(text, SHORT).valid, text
    again = engine.run(asked[:3])
    assert [text_of(base, pieces) for pieces in again] == texts[:3]


def test_who_leaves_takes_its_grammar_along(base, engine):
    first, second = (engine.submit(request(base, None)) for _ in range(2))
    for _ in range(6):
        engine.step()
    engine.cancel(first)
    pieces = []
    while engine.pending:
        pieces += engine.step()
    assert {piece.uid for piece in pieces} == {second}
    assert not engine._rows


@pytest.mark.parametrize("domain", DOMAIN_SCHEMAS)
@pytest.mark.parametrize("model", ["embedded:student", "stories260K"])
def test_every_domains_schema_becomes_a_grammar(domain, model, shared_data):
    folder = model if ":" in model else str(shared_data / "models" / model)
    matcher = Grammars(ModelSource(folder).tokenizer).matcher(json.dumps(DOMAIN_SCHEMAS[domain]))
    assert not matcher.is_error() and not matcher.is_accepting()


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "nope"}, "nope"),
        ({"type": "object", "properties": {"a": {"$ref": "#/x"}}}, "'/x' does not exist"),
        (
            {"type": "object", "properties": {"a": {"pattern": "(?=x)y"}}, "required": ["a"]},
            "look-around",
        ),
        (
            {
                "type": "object",
                "properties": {"a": {"type": "string", "minLength": 5, "maxLength": 2}},
                "required": ["a"],
            },
            "unsatisfiable",
        ),
        (
            {"type": "object", "properties": {f"k{n}": {"type": "null"} for n in range(9000)}},
            "bytes: at most 100,000 are taken",
        ),
    ],
)
def test_what_cannot_be_kept_to_is_one_line(base, engine, schema, message):
    with pytest.raises(ConchError, match=message) as refused:
        engine.submit(request(base, None, schema=schema))
    assert "\n" not in str(refused.value)
    assert not engine.pending


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "the schema is no JSON"),
        ("[" * 100_000, "the schema is no JSON"),
        ("[]", r"the schema's type is \[\]: answers are objects"),
        ('{"type": "array"}', "the schema's type is 'array': answers are objects"),
    ],
)
def test_what_is_no_schema_of_an_object_is_refused(schema, message):
    with pytest.raises(ConchError, match=message):
        AskOptions(schema=schema)


def test_a_schema_that_refers_to_itself(base, engine):
    tree = {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["next"],
        "additionalProperties": False,
    }
    pieces = engine.run([request(base, None, schema=tree)])[0]
    if pieces[-1].finish_reason == "stop":
        assert parse_answer(text_of(base, pieces), tree).valid
    assert text_of(base, pieces).startswith("{")


def test_grammars_are_made_once_and_the_oldest_goes(base, monkeypatch):
    made = Grammars(base.tokenizer)
    compiled = []
    inner = made._compiled
    monkeypatch.setattr(made, "_compiled", lambda schema: compiled.append(1) or inner(schema))
    monkeypatch.setattr(grammars, "KEPT", 2)
    texts = [json.dumps({"type": "object", "maxProperties": n}) for n in range(3)]
    for text in [texts[0], texts[0], texts[1], texts[2], texts[0]]:
        made.matcher(text)
    assert len(compiled) == 4


OPEN = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


@pytest.mark.parametrize(
    ("schema", "other"),
    [
        (OPEN, False),
        ({**OPEN, "additionalProperties": {"type": "integer"}}, True),
        ({**OPEN, "additionalProperties": True}, True),
        ({"type": "object"}, True),
        ({"type": "object", "properties": {"in": OPEN}, "required": ["in"]}, False),
        ({**OPEN, "anyOf": [{"required": ["other"]}, {}]}, True),
        ({"allOf": [OPEN], "type": "object"}, True),
        ({"$ref": "#/$defs/open", "$defs": {"open": OPEN}}, False),
    ],
)
def test_objects_get_no_keys_that_nobody_named(base, schema, other):
    matcher = Grammars(base.tokenizer).matcher(json.dumps(schema))
    inner = '{"name": "a", "other": 1}'
    nested = "in" in schema.get("properties", {})
    text = f'{{"in": {inner}}}' if nested else inner
    ids = base.tokenizer.encode(text, add_special_tokens=False)
    assert (matcher.validate_tokens(ids) == len(ids)) == other


A_NUMBER = {"properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", **A_NUMBER, "required": ["a", "b"]},
        {"type": "object", "anyOf": [A_NUMBER], "required": ["b"]},
    ],
)
def test_keys_that_an_object_must_have_need_no_name(base, schema):
    matcher = Grammars(base.tokenizer).matcher(json.dumps(schema))
    ids = base.tokenizer.encode('{"a": 1, "b": 2}', add_special_tokens=False)
    assert matcher.validate_tokens(ids) == len(ids)


def test_a_grammar_that_is_there_does_not_wait_for_one_that_is_made(base, monkeypatch):
    grammars_of, made, go = Grammars(base.tokenizer), threading.Event(), threading.Event()
    grammars_of.matcher(json.dumps(SHORT))
    compiled = grammars_of._compiled

    def slow(form):
        made.set()
        assert go.wait(20)
        return compiled(form)

    monkeypatch.setattr(grammars_of, "_compiled", slow)
    with ThreadPoolExecutor(1) as pool:
        making = pool.submit(grammars_of.matcher, '{"type": "object"}')
        assert made.wait(20)
        try:
            grammars_of.matcher(json.dumps(SHORT))
            assert not making.done()
        finally:
            go.set()
        making.result(timeout=20)
