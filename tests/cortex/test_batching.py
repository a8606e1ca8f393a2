"""An answer in a mixed batch is the answer alone, whoever joins and leaves meanwhile.

The reference is mlx_lm's own generation from a model that mlx_lm loaded anew with that adapter, one
prompt at a time. The base is the embedded student; its adapters are trained to say one text each.
"""

import itertools
import random
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from conch_dna.cortex.engine.adapter_bank import AdapterBank
from conch_dna.cortex.engine.batching import (
    PREFILL_TOKENS,
    AnswerEngine,
    Piece,
    Request,
    _likeliest,
)
from conch_dna.cortex.engine.drawing import make_request_sampler
from conch_dna.errors import ConchError
from conch_dna.language_model import ModelSource
from cortex_models import TEXTS, FlatMLP, train_adapter, write_adapter
from models import make_gemma2_folder, make_model_folder

STUDENT = "embedded:student"
RANKS = {"thinking": 8, "task": 4, "debug": 8}
KEYS = {"thinking": "all", "task": "attention", "debug": "all,model.embed_tokens"}
PROMPTS = [
    "Once upon a time, there was a little frog named Tim. He",
    "The owl",
    "First, get a big",
    "Mom said",
    "The toy car did not go. A wheel",
    "A small gray mouse found a piece of cheese under the bed. It was the biggest cheese that she "
    "had ever seen, and",
]
LONGEST = 24


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    made = {
        domain: train_adapter(
            place / domain, STUDENT, text, lora_rank=RANKS[domain], lora_keys=KEYS[domain]
        )
        for domain, text in TEXTS.items()
    }
    made["dora"] = train_adapter(place / "dora", STUDENT, TEXTS["task"], dora=True, lora_rank=4)
    made["full"] = train_adapter(place / "full", STUDENT, TEXTS["thinking"], full=True)
    return made


@pytest.fixture(scope="module")
def base():
    return ModelSource(STUDENT).load()


def bank_of(base, adapters: dict[str, Path], names: Sequence[str]) -> AdapterBank:
    bank = AdapterBank(base)
    for name in names:
        bank.add(name, adapters[name])
    return bank


@pytest.fixture
def bank(base, adapters) -> AdapterBank:
    return bank_of(base, adapters, list(TEXTS))


class Alone:
    """Answers of freshly loaded models to one prompt at a time."""

    def __init__(self, folder: Path, adapters: dict[str, Path]) -> None:
        self.folder = folder
        self.adapters: dict[str | None, Path] = dict(adapters)
        self.models: dict[str | None, object] = {}
        self.kept: dict[tuple, list[int]] = {}

    def __call__(self, request: Request, stops: Sequence[int] = (0,)) -> list[int]:
        from mlx_lm import load
        from mlx_lm.generate import generate_step

        if request.domain not in self.models:
            path = self.adapters.get(request.domain)
            model, _ = load(str(self.folder), adapter_path=str(path) if path else None)
            self.models[request.domain] = model
        key = (request.domain, request.tokens, request.max_tokens)
        if key not in self.kept:
            answer: list[int] = []
            tokens = mx.array(request.tokens)
            steps = generate_step(
                tokens, self.models[request.domain], max_tokens=request.max_tokens
            )
            for token, _ in steps:
                answer.append(token)
                if token in stops:
                    break
            self.kept[key] = answer
        return self.kept[key]


@pytest.fixture(scope="module")
def alone(base, adapters) -> Alone:
    return Alone(base.source.folder, adapters)


def ids(base, text: str) -> tuple[int, ...]:
    return tuple(base.tokenizer.encode(text))


def make(base, domain: str | None, text: str, **changes) -> Request:
    return Request(
        **{"domain": domain, "tokens": ids(base, text), "max_tokens": LONGEST, **changes}
    )


def tokens_of(pieces: Sequence[Piece]) -> list[int]:
    return [piece.token for piece in pieces]


def finish(engine: AnswerEngine) -> dict[int, list[Piece]]:
    answers: dict[int, list[Piece]] = {}
    while engine.pending:
        for piece in engine.step():
            answers.setdefault(piece.uid, []).append(piece)
    return answers


# Equal to each request alone


@pytest.mark.parametrize(
    "names",
    [["thinking", "task", "debug"], ["thinking", "dora", "full"]],
    ids=["one batch", "a batch each"],
)
@pytest.mark.parametrize("prefixed", [False, True], ids=["whole", "prefixed"])
def test_a_mixed_batch_answers_as_each_alone(names, prefixed, base, adapters, alone):
    bank = bank_of(base, adapters, names)
    requests = []
    for number, (text, domain) in enumerate(itertools.product(PROMPTS, [*names, None])):
        tokens = ids(base, text)
        prefix = tokens[: 1 + number % len(tokens)] if prefixed else ()
        requests.append(make(base, domain, text, prefix=prefix))
    with closing(AnswerEngine(bank)) as engine:
        assert engine.shares_batches == ("dora" not in names)
        answers = engine.run(requests)
        kept = {(r.domain, r.prefix[: len(r.tokens) - 1]) for r in requests if r.prefix}
        assert engine.prefixes.computed == len(kept)
    for request, pieces in zip(requests, answers, strict=True):
        assert tokens_of(pieces) == alone(request)
    assert len({tuple(tokens_of(pieces)) for pieces in answers}) >= 15
    assert {answer[-1].finish_reason for answer in answers} == {"stop", "length"}
    assert bank.active is None


@pytest.mark.parametrize("names", [["thinking", "task", "debug"], ["debug", "dora"]])
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_joining_leaving_and_cancelling(names, seed, base, adapters, alone):
    """Requests join at any step, some are cancelled in the queue, the prompt or the answer."""
    chance = random.Random(seed)
    bank = bank_of(base, adapters, names)
    engine = AnswerEngine(bank, max_batch=4)
    asked: dict[int, Request] = {}
    answers: dict[int, list[Piece]] = {}
    cancelled: set[int] = set()
    for _ in range(60):
        for _ in range(chance.choice([0, 0, 1, 3]) if len(asked) < 24 else 0):
            text = chance.choice(PROMPTS)
            tokens = ids(base, text)
            request = make(
                base,
                chance.choice([*names, None]),
                text,
                max_tokens=chance.choice([1, 5, LONGEST]),
                prefix=tokens[: chance.choice([0, 1, 4])],
            )
            asked[engine.submit(request)] = request
        if asked and chance.random() < 0.15:
            uid = chance.choice(list(asked))
            engine.cancel(uid)
            cancelled.add(uid)
        bank.activate(chance.choice([*names, None]))
        for piece in engine.step():
            assert piece.uid not in cancelled
            answers.setdefault(piece.uid, []).append(piece)
    for uid, pieces in finish(engine).items():
        answers.setdefault(uid, []).extend(pieces)
    engine.close()
    whole = [uid for uid in asked if uid in answers and answers[uid][-1].finish_reason]
    assert set(asked) - set(whole) <= cancelled
    assert len(whole) > 12 and len(cancelled) > 2
    for uid in whole:
        assert tokens_of(answers[uid]) == alone(asked[uid])
    for uid in cancelled - set(whole):
        pieces = tokens_of(answers.get(uid, []))
        assert pieces == alone(asked[uid])[: len(pieces)]
    bank.activate(None)


def test_one_domain_alone_is_the_adapters_own_modules(base, adapters, bank):
    """No mixed layers are made; `test_routing` shows that the modules are its own to the bit."""
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    request = make(base, "debug", PROMPTS[4], max_tokens=8)
    with closing(AnswerEngine(bank)) as engine:
        [pieces] = engine.run([request])
        [lane] = engine._lanes
        assert "_mixed" not in vars(lane.model)
    model, _ = load(str(base.source.folder), adapter_path=str(adapters["debug"]))
    steps = generate_step(mx.array(request.tokens), model, max_tokens=8)
    expected = [float(log_probs[token]) for token, log_probs in steps][: len(pieces)]
    # Not to the bit everywhere: mlx_lm's batches mask otherwise than its single answers.
    np.testing.assert_allclose([piece.log_prob for piece in pieces], expected, atol=1e-4)


def test_a_model_that_mixes_its_rows_gets_a_batch_for_each_domain(tmp_path):
    folder = make_model_folder(tmp_path / "base", seed=4)
    paths = {
        name: write_adapter(tmp_path / name, str(folder), seed=seed, lora_keys="all")
        for seed, name in enumerate(["a", "b"])
    }
    base = ModelSource(str(folder)).load()
    for layer in base.model.layers:
        layer.mlp.__class__ = FlatMLP
    requests = [
        Request(domain=name, tokens=(5, 6, number), max_tokens=6)
        for number, name in enumerate(["a", "b", None, "a"], 7)
    ]
    reference = Alone(folder, paths)
    with closing(AnswerEngine(bank_of(base, paths, ["a", "b"]))) as engine:
        assert not engine.shares_batches
        for request, pieces in zip(requests, engine.run(requests), strict=True):
            assert tokens_of(pieces) == reference(request)


def test_a_model_with_a_sliding_window(tmp_path):
    """Its prompt cache is a ring, which the beginnings and the answers run over."""
    folder = make_model_folder(
        tmp_path / "base",
        seed=4,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
    )
    paths = {
        name: write_adapter(tmp_path / name, str(folder), seed=seed, strength=0.2)
        for seed, name in enumerate(["a", "b"])
    }
    chance = random.Random(0)
    requests = []
    for number in range(9):
        tokens = tuple(chance.randrange(1, 1500) for _ in range(3 + 2 * number))
        prefix = tokens[: number % 3 * 6]
        requests.append(
            Request(
                domain=["a", "b", None][number % 3], tokens=tokens, prefix=prefix, max_tokens=12
            )
        )
    reference = Alone(folder, paths)
    with closing(
        AnswerEngine(bank_of(ModelSource(str(folder)).load(), paths, ["a", "b"]))
    ) as engine:
        for request, pieces in zip(requests, engine.run(requests), strict=True):
            assert tokens_of(pieces) == reference(request)


# Log-probabilities and sampling


def test_log_probabilities_are_those_of_the_whole_text_at_once(base, bank):
    """Read in one pass in float64, whatever temperature drew them."""
    requests = [
        make(base, domain, text, temperature=temperature, seed=number, max_tokens=10)
        for number, (domain, text, temperature) in enumerate(
            zip([*TEXTS, None], PROMPTS, [0.0, 1.0, 0.7, 1.5], strict=False)
        )
    ]
    with closing(AnswerEngine(bank)) as engine:
        answers = engine.run(requests)
    for request, pieces in zip(requests, answers, strict=True):
        whole = mx.array([[*request.tokens, *tokens_of(pieces)]])
        logits = np.array(bank.tree(request.domain)(whole))[0].astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        start = len(request.tokens) - 1
        expected = [log_probs[start + i, piece.token] for i, piece in enumerate(pieces)]
        np.testing.assert_allclose([p.log_prob for p in pieces], expected, atol=2e-4)
        assert all(piece.log_prob <= 0 for piece in pieces)


def test_a_draw_follows_from_its_seed_alone(base, bank):
    requests = [
        make(base, domain, PROMPTS[0], temperature=1.0, seed=seed, max_tokens=12, top_p=top_p)
        for domain in ["thinking", None]
        for seed in [0, 1]
        for top_p in [1.0, 0.9]
    ]
    with closing(AnswerEngine(bank)) as engine:
        together = [tokens_of(pieces) for pieces in engine.run(requests)]
        single = [tokens_of(engine.run([request])[0]) for request in requests]
    assert together == single
    assert together[4] != together[6]


@pytest.mark.parametrize("count", [1, 3, 20, 200])
def test_the_likeliest_are_those_of_a_whole_sort(count):
    values = np.random.default_rng(0).integers(-9, 0, 100).astype(np.float32)
    expected = np.argsort(-values, kind="stable")[:count].tolist()
    assert [token for token, _ in _likeliest(mx.array(values), count)] == expected


def test_top_p_draws_from_the_likeliest_only(base):
    log_probs = mx.log(mx.array([[0.1, 0.5, 0.3, 0.06, 0.04]]))
    request = make(base, None, "a", temperature=5.0, top_p=0.75)
    draw = make_request_sampler(request, 5)
    drawn = {int(draw(log_probs)[0]) for _ in range(60)}
    assert drawn == {1, 2}
    nearly_greedy = make_request_sampler(make(base, None, "a", temperature=5.0, top_p=0.01), 5)
    assert {int(nearly_greedy(log_probs)[0]) for _ in range(20)} == {1}


def test_padding_rows_of_the_head_are_never_drawn(tmp_path):
    folder = make_model_folder(tmp_path / "base", seed=4, vocab_size=3072)
    path = write_adapter(tmp_path / "a", str(folder))
    base = ModelSource(str(folder)).load()
    requests = [
        Request(
            domain=[None, "a"][seed % 2], tokens=(5, 6), max_tokens=20, temperature=50.0, seed=seed
        )
        for seed in range(8)
    ]
    with closing(AnswerEngine(bank_of(base, {"a": path}, ["a"]))) as engine:
        drawn = [piece.token for pieces in engine.run(requests) for piece in pieces]
    assert len(set(drawn)) > 60
    assert max(drawn) < base.source.token_count < 3072


# Ends of answers


def test_the_context_ends_an_answer(base, bank):
    context = base.source.context_length
    tokens = (ids(base, PROMPTS[0]) * 60)[: context - 3]
    with closing(AnswerEngine(bank)) as engine:
        [pieces] = engine.run([Request(domain=None, tokens=tokens, max_tokens=50)])
        assert len(pieces) <= 3
        assert pieces[-1].finish_reason == ("length" if pieces[-1].token != 0 else "stop")
        full = (*tokens, *tokens[:3])
        with pytest.raises(ConchError, match=f"has {context} tokens, and the context.*{context}"):
            engine.submit(Request(domain="task", tokens=full, max_tokens=1, prefix=full[:9]))
        assert engine.pending == 0
        assert engine.prefixes.computed == 0


def test_max_tokens_ends_an_answer(base, bank):
    request = make(base, "thinking", TEXTS["thinking"][:15], max_tokens=3)
    with closing(AnswerEngine(bank)) as engine:
        [pieces] = engine.run([request])
    assert [piece.finish_reason for piece in pieces] == [None, None, "length"]


# Adapters that change, and kept beginnings


def test_requests_under_way_finish_with_the_adapter_they_came_with(base, adapters, alone):
    bank = bank_of(base, adapters, ["thinking", "task"])
    engine = AnswerEngine(bank)
    text, prefix = PROMPTS[0], ids(base, PROMPTS[0])[:5]
    request = make(base, "thinking", text, prefix=prefix)
    old = [engine.submit(request) for _ in range(2)]
    other = engine.submit(make(base, "task", text))
    answers: dict[int, list[Piece]] = {}
    for _ in range(3):
        for piece in engine.step():
            answers.setdefault(piece.uid, []).append(piece)
    bank.replace("thinking", adapters["debug"])
    engine.prefixes.forget("thinking")
    new = engine.submit(request)
    bank.replace("task", adapters["debug"])
    assert len(engine._lanes) == 2
    for uid, pieces in finish(engine).items():
        answers.setdefault(uid, []).extend(pieces)
    as_debug = make(base, "debug", text)
    assert alone(request) != alone(as_debug)
    assert [tokens_of(answers[uid]) for uid in old] == [alone(request)] * 2
    assert tokens_of(answers[new]) == alone(as_debug)
    assert tokens_of(answers[other]) == alone(make(base, "task", text))
    assert engine.prefixes.computed == 2
    assert len(engine._lanes) <= 1
    engine.close()


def test_a_replaced_adapters_beginning_is_not_used_again_though_nobody_forgot_it(
    base, adapters, alone
):
    bank = bank_of(base, adapters, ["thinking"])
    request = make(base, "thinking", PROMPTS[0], prefix=ids(base, PROMPTS[0])[:8])
    with closing(AnswerEngine(bank)) as engine:
        engine.run([request, request])
        assert engine.prefixes.computed == 1
        one = engine.prefixes.nbytes
        bank.replace("thinking", adapters["debug"])
        [pieces] = engine.run([request])
        assert engine.prefixes.computed == 2 and engine.prefixes.nbytes == one
    assert tokens_of(pieces) == alone(make(base, "debug", PROMPTS[0]))


def test_kept_beginnings_are_bounded_and_the_oldest_goes_first(base, bank, alone):
    prefixes = [ids(base, text)[:6] for text in (PROMPTS[0], PROMPTS[4], PROMPTS[5])]
    requests = [
        make(base, "task", text, prefix=prefix)
        for text, prefix in zip((PROMPTS[0], PROMPTS[4], PROMPTS[5]), prefixes, strict=True)
    ]
    with closing(AnswerEngine(bank)) as probe:
        probe.run(requests[:1])
        one = probe.prefixes.nbytes
    with closing(AnswerEngine(bank, max_prefix_bytes=2 * one)) as engine:
        first, second, third = requests
        answers = [engine.run([r])[0] for r in (first, second, first, third, first, second)]
        # The second made room for the third; the first was used in between and stayed.
        assert engine.prefixes.computed == 4
        assert engine.prefixes.nbytes <= 2 * one
    for request, pieces in zip((first, second, first, third), answers, strict=False):
        assert tokens_of(pieces) == alone(request)
    with closing(AnswerEngine(bank, max_prefix_bytes=0)) as engine:
        assert tokens_of(engine.run([first])[0]) == alone(first)
        assert engine.prefixes.nbytes == 0


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": ()}, "no tokens"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"prefix": (9,)}, "the prefix is not the beginning"),
        ({"prefix": (5, 6, 7, 8)}, "the prefix is not the beginning"),
    ],
)
def test_a_request_out_of_range(changes, message):
    fine = {"domain": None, "tokens": (5, 6, 7), "max_tokens": 3}
    with pytest.raises(ConchError, match=message):
        Request(**{**fine, **changes})


def test_refused_requests_leave_nothing_queued(base, bank):
    good = make(base, "task", PROMPTS[0])
    with closing(AnswerEngine(bank)) as engine:
        for bad, message in [
            (Request(domain="none", tokens=(1,), max_tokens=1), "no adapter 'none'"),
            (Request(domain="task", tokens=(1, 99999), max_tokens=1), "has the token 99999"),
            (Request(domain="task", tokens=(-1,), max_tokens=1), "has the token -1"),
        ]:
            with pytest.raises(ConchError, match=message):
                engine.run([good, bad])
            assert engine.pending == 0
        engine.submit(good)
        with pytest.raises(ValueError, match="1 requests are under way"):
            engine.run([good])
    assert engine.pending == 0
    with pytest.raises(ConchError, match="max_batch is 0"):
        AnswerEngine(bank, max_batch=0)


def test_cancelling_twice_or_what_is_finished_does_nothing(base, bank, alone):
    request = make(base, "task", PROMPTS[1], max_tokens=4)
    with closing(AnswerEngine(bank)) as engine:
        uid = engine.submit(request)
        assert [tokens_of(pieces) for pieces in finish(engine).values()] == [alone(request)]
        engine.cancel(uid)
        engine.cancel(12345)
        queued = engine.submit(request)
        engine.cancel(queued)
        engine.cancel(queued)
        assert engine.pending == 0 and engine.step() == []


def test_a_model_whose_cache_cannot_be_batched_is_refused(base, bank, monkeypatch):
    from mlx_lm.models.cache import ChunkedKVCache

    tree = bank.tree(None)
    monkeypatch.setattr(type(tree), "make_cache", lambda self: [ChunkedKVCache(8)] * 3)
    with pytest.raises(ConchError, match=r"cannot batch embedded:student.*ChunkedKVCache"):
        AnswerEngine(bank)


def test_a_model_whose_masks_are_not_made_for_unequal_rows_answers_one_by_one(tmp_path):
    source = ModelSource(str(make_gemma2_folder(tmp_path / "gemma2")))
    prompts = [(7, 8, 9, 300, 400, 500, 600, 700), (20,), (5, 6, 1000)]
    requests = [Request(domain=None, tokens=each, max_tokens=6) for each in prompts]
    with closing(AnswerEngine(AdapterBank(source.load()))) as engine:
        alone = [engine.run([request])[0] for request in requests]
        for count in (2, 3):
            for expected, pieces in zip(alone, engine.run(requests[:count]), strict=False):
                assert [piece.token for piece in pieces] == [piece.token for piece in expected]
                assert [piece.log_prob for piece in pieces] == pytest.approx(
                    [piece.log_prob for piece in expected], abs=1e-5
                )


def test_a_long_prompt_is_read_in_parts_while_others_are_answered(bank, base):
    engine = AnswerEngine(bank)
    long = make(base, None, "Once upon a time " * 40, max_tokens=2)
    [alone] = engine.run([long])
    first = engine.submit(make(base, None, "The owl", max_tokens=200))
    while not engine.step():
        pass
    asked = engine.submit(long)
    before, pieces = 0, []
    while not any(piece.uid == asked for piece in pieces):
        pieces = engine.step()
        before += any(piece.uid == first for piece in pieces)
    # As many parts as it has, each between two tokens of the first one.
    assert before >= len(long.tokens) // PREFILL_TOKENS
    rest = [piece for piece in pieces if piece.uid == asked]
    while engine.pending:
        rest += [piece for piece in engine.step() if piece.uid == asked]
    assert [piece.token for piece in rest] == [piece.token for piece in alone]
