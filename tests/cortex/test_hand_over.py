"""What is handed over is drafted and streamed: in a suite, and by a server under way."""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from conch_dna.cortex.commands.status import who_answered
from conch_dna.cortex.hand_over import Pace
from conch_dna.cortex.neuron import CortexSuite, create_cortex_suite
from conch_dna.cortex.options import DraftSettings, DrawOptions
from conch_dna.cortex.server.serving import CortexServer
from conch_dna.ego.model import EgoConfig, EgoModel
from conch_dna.ego.settings import EgoAnswer
from conch_dna.errors import ConchError, EgoUnavailableError
from conch_dna.retraining.pipeline import TrainingPipeline
from models import make_model_folder
from servers import OPENINGS, SAYS, TALE, ask, client_of, metric, served
from suites import answering
from tokenizers_made import byte_level_tokenizer

STUDENT, TEACHER = "embedded:student", "embedded:teacher"
ALWAYS = {"hand_over": "always"}


DRAW = DrawOptions()


@pytest.fixture(autouse=True)
def _always_faster(request, monkeypatch) -> None:
    """Nothing depends on how fast this machine is."""
    if "pace" not in request.node.name:
        monkeypatch.setattr(Pace, "wants_draft", lambda self: True)


@pytest.fixture(scope="module")
def ego() -> Iterator[EgoModel]:
    with EgoModel(EgoConfig(model=TEACHER)) as model:
        yield model


@pytest.fixture(scope="module")
def helped(served_adapters: Path, ego: EgoModel) -> CortexSuite:
    return create_cortex_suite(served_adapters, STUDENT, ego=ego)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of another tokenizer."""
    place = tmp_path_factory.mktemp("foreign")
    return str(make_model_folder(place / "m", tokenizer=byte_level_tokenizer(place / "tokens")))


# Who drafts


def test_the_neuron_that_was_asked_drafts_and_the_answer_is_egos(helped, ego):
    answer = helped.ask("tales", TALE, max_tokens=16, **ALWAYS)
    assert answer.text == ego.generate(TALE, max_tokens=16)
    assert (answer.answered_by, answer.draft) == ("ego", "tales")
    assert answer.ego_tokens == answer.completion_tokens == 16
    assert 1 <= answer.acceptance == answer.ego_tokens / answer.ego_steps <= 5
    assert answer.to_json()["acceptance"] == answer.acceptance
    assert f"tales drafted, {answer.acceptance:.1f} tokens a step" in who_answered(answer)
    own = helped.ask("owls", OPENINGS["owls"], max_tokens=4)
    assert (own.draft, own.ego_tokens, own.acceptance) == (None, None, None)


def test_several_hand_overs_are_answered_together_and_say_the_same(helped):
    asked = [("tales", TALE), ("owls", "The"), ("tales", "A cat sat on the")]
    together = helped.ask_many(asked, max_tokens=12, **ALWAYS)
    for (domain, prompt), answer in zip(asked, together, strict=True):
        assert answer.draft is None and answer.ego_tokens is not None
        alone = helped.ask(domain, prompt, max_tokens=12, **ALWAYS)
        assert (alone.text, alone.draft) == (answer.text, domain)


@pytest.mark.parametrize(
    ("draft", "told"),
    [("none", None), ("tales", "tales"), ("cars", "cars"), (STUDENT, STUDENT), (TEACHER, TEACHER)],
)
def test_another_one_may_draft(draft, told, served_adapters, ego):
    with create_cortex_suite(
        served_adapters,
        STUDENT,
        ego=ego,
        domains=["owls", "tales"],
        draft=DraftSettings(draft=draft, draft_tokens=3),
    ) as suite:
        answer = suite.ask("owls", TALE, max_tokens=13, **ALWAYS)
        assert answer.draft == told and answer.text == ego.generate(TALE, max_tokens=13)
        if draft == TEACHER:
            assert answer.ego_steps == 4
        if draft == STUDENT:
            assert suite.drafts.of("owls", DRAW, None).model is suite.bank.tree(None)


def test_drafts_that_are_none_are_refused_in_one_line(served_adapters, foreign, ego):
    with answering(lambda messages: "No.") as url:
        far = EgoConfig(model=url, remote_model="m")
        for who, draft, message in (
            (None, "owls", "the draft is owls and there is no EGO: drafts are for a local EGO"),
            (far, "owls", r"the draft is owls and EGO m at .* is an API"),
            (TEACHER, foreign, f"the draft is {foreign}: {foreign} has not the tokens of embedded"),
            (
                foreign,
                "owls",
                f"the draft is owls: embedded:student has not the tokens of {foreign}",
            ),
            (TEACHER, "nobody", "model folder nobody does not exist"),
        ):
            with pytest.raises(ConchError, match=message) as caught:
                create_cortex_suite(
                    served_adapters, STUDENT, ego=who, draft=DraftSettings(draft=draft)
                )
            assert "\n" not in str(caught.value)
        # By itself nobody drafts for an API, which needs no remark.
        with create_cortex_suite(served_adapters, STUDENT, ego=far) as suite:
            answer = suite.ask("owls", TALE, **ALWAYS)
            assert (answer.text, answer.draft) == ("No.", None)
            *parts, last = suite.stream("owls", TALE, **ALWAYS)
            assert [part.text for part in parts] == ["No."] and last.answer.text == "No."
            assert not any("drafts" in note for note in suite.notes)
    with pytest.raises(ConchError, match=r"draft_tokens is 33: it must be at least 1"):
        DraftSettings(draft_tokens=33)


def test_an_ego_of_another_tokenizer_answers_without_a_draft_and_that_is_said_once(
    served_adapters, foreign
):
    with create_cortex_suite(served_adapters, STUDENT, ego=foreign) as suite:
        for _ in range(2):
            answer = suite.ask("owls", TALE, max_tokens=4, **ALWAYS)
            assert answer.answered_by == "ego" and answer.draft is None
        why = f"embedded:student has not the tokens of {foreign}"
        told = f"nobody drafts EGO's answers for owls: {why}"
        assert [note for note in suite.notes if "drafts" in note] == [told]


def test_a_neuron_that_is_replaced_goes_on_drafting_what_it_began(served_adapters, tmp_path, ego):
    shutil.copytree(served_adapters / "tales", tmp_path / "tales")
    with create_cortex_suite(tmp_path, STUDENT, ego=ego) as suite:
        expected = ego.generate(TALE, max_tokens=16)
        stream = suite.stream("tales", TALE, max_tokens=16, **ALWAYS)
        text = next(stream).text
        before = suite.drafts.of("tales", DRAW, None).model
        for path in (served_adapters / "cars" / "adapters_kd").iterdir():
            shutil.copy(path, tmp_path / "tales" / "adapters_kd")
        assert suite.reload() == ["tales"]
        assert suite.drafts.of("tales", DRAW, None).model is not before
        assert text + "".join(delta.text for delta in stream) == expected


# Streams


def test_a_stream_of_ego_is_remembered_and_breaks_off_in_words(served_adapters, tmp_path, ego):
    with create_cortex_suite(served_adapters, STUDENT, ego=ego) as suite:
        suite.pipeline = TrainingPipeline(tmp_path, STUDENT, ego=ego)
        *parts, last = suite.stream("task", "First, get", max_tokens=12)
        assert len(parts) > 3 and last.answer.answered_by == "ego"
        [experience], _ = suite.pipeline.buffer.read("task")
        assert experience.better == "".join(part.text for part in parts) == last.answer.text
        stream = suite.ego.stream

        def broken(after: int):
            def pieces(*arguments, **how):
                for number, piece in enumerate(stream(*arguments, **how)):
                    if number == after:
                        raise MemoryError("no room")
                    yield piece

            return pieces

        suite.ego.stream = broken(0)
        try:
            [only] = suite.stream("task", "First, get", max_tokens=12)
            assert only.answer.answered_by == "neuron" and only.text == only.answer.text
            assert only.answer.reason.endswith("EGO embedded:teacher cannot answer: no room")
            suite.ego.stream = broken(2)
            got = suite.stream("task", "First, get", max_tokens=12)
            next(got), next(got)
            with pytest.raises(EgoUnavailableError, match="broke off its answer: no room"):
                next(got)
        finally:
            del suite.ego.stream


# A server


def slowly(suite: CortexSuite, seconds: float = 0.03) -> None:
    """Let EGO rest after each token."""
    for name in ("generate_many", "stream"):
        answer = getattr(suite.ego, name)

        def slow(*arguments, check, answer=answer, **how):
            def rest() -> None:
                time.sleep(seconds)
                check()

            return answer(*arguments, check=rest, **how)

        setattr(suite.ego, name, slow)


@pytest.fixture(scope="module")
def server(served_adapters: Path) -> Iterator[CortexServer]:
    with served(served_adapters, EgoModel(EgoConfig(model=TEACHER)), change=slowly) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: CortexServer) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


@pytest.mark.parametrize(("model", "how"), [("tales", ALWAYS), ("ego", None), ("task", None)])
def test_egos_answer_streams(model, how, server, client, ego):
    before = [metric(server, f"conch_dna_ego_{name}_total") for name in ("tokens", "steps")]
    whole = ask(client, model, TALE, how, max_tokens=16)
    *chunks, end = ask(client, model, TALE, how, max_tokens=16, stream=True)
    parts = [part for chunk in chunks if (part := chunk.choices[0].delta.content)]
    assert "".join(parts) == whole.choices[0].message.content and len(parts) > 5
    assert end.choices[0].finish_reason == whole.choices[0].finish_reason
    assert end.conch["answered_by"] == "ego"
    drafted = model if model == "tales" else None
    assert whole.conch["draft"] == end.conch["draft"] == drafted
    after = [metric(server, f"conch_dna_ego_{name}_total") for name in ("tokens", "steps")]
    gained = [now - then for now, then in zip(after, before, strict=True)]
    if drafted is None:
        assert gained == [0, 0]
    else:
        assert gained == [2 * end.conch["ego_tokens"], 2 * end.conch["ego_steps"]]
        assert end.conch["acceptance"] == end.conch["ego_tokens"] / end.conch["ego_steps"]


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_not_answered_further_by_ego(stream, server, client):
    """A whole answer would take 14 seconds and more."""
    if stream:
        pieces = ask(client, "tales", TALE, ALWAYS, max_tokens=450, stream=True)
        assert any(next(pieces).choices[0].delta.content for _ in range(4))
        pieces.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            ask(client, "ego", TALE, max_tokens=450, timeout=1)
    began = time.monotonic()
    assert ask(client, "ego", TALE, max_tokens=2).conch["answered_by"] == "ego"
    assert time.monotonic() - began < 8


def test_a_server_that_stops_does_not_wait_for_egos_long_answer(served_adapters):
    lines: list[str] = []
    with (
        served(
            served_adapters,
            EgoModel(EgoConfig(model=TEACHER)),
            change=slowly,
            report=lines.append,
        ) as server,
        client_of(server) as client,
    ):
        pieces = ask(client, "tales", TALE, ALWAYS, max_tokens=450, stream=True)
        assert any(next(pieces).choices[0].delta.content for _ in range(4))
        began = time.monotonic()
        server.stop(0)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(pieces)
        assert time.monotonic() - began < 8
    assert "EGO was left in the middle of an answer" not in lines


def test_ego_drafts_while_the_engine_computes_with_the_same_arrays(served_adapters, ego):
    expected = {model: ego.generate(TALE, max_tokens=24) for model in ("tales", "boxes")}
    wrong: list[str] = []
    with served(served_adapters, EgoModel(EgoConfig(model=TEACHER))) as server:

        def neurons(domain: str) -> None:
            with client_of(server) as client:
                for _ in range(4):
                    done = ask(
                        client, domain, OPENINGS[domain], {"hand_over": "never"}, max_tokens=40
                    )
                    if OPENINGS[domain] + done.choices[0].message.content != SAYS[domain]:
                        wrong.append(domain)

        def handed(domain: str) -> None:
            with client_of(server) as client:
                for number in range(3):
                    parts = ask(client, domain, TALE, ALWAYS, max_tokens=24, stream=True)
                    text = "".join(part.choices[0].delta.content or "" for part in parts)
                    if text != expected[domain]:
                        wrong.append(f"{domain} {number}")

        work = [threading.Thread(target=neurons, args=(name,)) for name in SAYS]
        work += [threading.Thread(target=handed, args=(name,)) for name in expected]
        for each in work:
            each.start()
        for each in work:
            each.join()
    assert wrong == []


def took(draft: str, tokens: int = 20) -> EgoAnswer:
    return EgoAnswer("a", "stop", tokens, draft=draft)


def test_the_pace_tells_whether_drafts_pay():
    pace = Pace()
    assert pace.wants_draft()
    # Too short to say how fast it was.
    pace.took(took("owls", 3), 0.0)
    assert pace.wants_draft()
    pace.took(took("owls"), 2.0)
    assert not pace.wants_draft()
    pace.took(took(""), 1.0)
    wanted = [pace.wants_draft() for _ in range(32)]
    assert wanted.count(True) == 2, "the slower way is tried again"
    # It has become the faster one.
    for _ in range(8):
        pace.took(took("owls"), 0.2)
    assert [pace.wants_draft() for _ in range(32)].count(True) == 30


def test_what_is_drawn_or_held_is_not_drafted(helped):
    assert helped.drafts.of("tales", DRAW, None) is not None
    assert helped.drafts.of("tales", DrawOptions(temperature=1.0), None) is None
    assert helped.drafts.of("tales", DRAW, "{}") is None
