"""A neuron of the embedded student calibrated on what it held out; EGO is the embedded teacher.

Agreement is computed anew, token by token, from the teacher's logits.
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from conch_dna.checkpoints import write_folder
from conch_dna.cortex.calibration.calibrating import (
    BY_TEXT,
    BY_TOKENS,
    PICTURE_FILE,
    NeuronAnswer,
    agreement_with_ego,
    answers_to,
    calibrate_domain,
    questions_of,
    read_by,
)
from conch_dna.cortex.calibration.confidence import CALIBRATION_FILE, halves
from conch_dna.cortex.calibration.heldout import chosen, heldout_prompts, heldout_records, prompt_of
from conch_dna.cortex.calibration.settings import CalibrationSettings
from conch_dna.cortex.neuron import CortexSuite
from conch_dna.ego.model import EgoConfig, EgoModel
from conch_dna.errors import ConchError, EgoUnavailableError
from conch_dna.generations.data import DATA_FILE, HELDOUT_FILE, init_line
from conch_dna.generations.evolve import EvolveConfig
from conch_dna.generations.line import MANIFEST_FILE
from conch_dna.language_model import ModelSource
from conch_dna.retraining.domain import line_of
from conch_dna.training.data.records import json_lines, split_heldout
from conch_dna.training.distillation import DOMAIN_PROMPTS
from cortex_models import write_adapter
from models import ASSETS, make_model_folder
from suites import STUDENT, TEACHER, answering, tales

DOMAIN = "tales"
SHORT = 12
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def adapters(distilled_tales: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distilled domain, and one of DOMAIN_PROMPTS that learned nothing."""
    folder = tmp_path_factory.mktemp("adapters") / "adapters"
    shutil.copytree(distilled_tales, folder)
    write_adapter(folder / "task" / "adapters_kd", STUDENT, strength=0.0)
    return folder


@pytest.fixture(scope="module")
def suite(adapters: Path) -> Iterator[CortexSuite]:
    with CortexSuite(adapters, STUDENT, ego=TEACHER) as suite:
        yield suite


def tale_prompts(count: int = 24) -> list[str]:
    return [record["prompt"] for record in tales(count)]


def said_to(suite: CortexSuite, prompts: list[Any], **options: Any) -> list[NeuronAnswer]:
    questions, left_out = questions_of(suite, DOMAIN, prompts, max_tokens=SHORT, **options)
    assert not left_out
    return answers_to(suite, questions)


def agreement_oracle(prompt: str, said: NeuronAnswer) -> float:
    """Share of the answer's tokens that have the teacher's largest logit."""
    source = ModelSource(TEACHER)
    tokenizer = source.tokenizer
    before = list(tokenizer.encode(prompt))
    ids = list(tokenizer.encode(prompt + said.text))
    if ids[-1] in tokenizer.eos_token_ids:
        ids.pop()
    if said.finish_reason == "stop":
        ids.append(tokenizer.eos_token_id)
    before = [token for token in before if token not in tokenizer.eos_token_ids or token == ids[0]]
    assert ids[: len(before)] == before
    logits = np.asarray(source.load().model(mx.array([ids])).astype(mx.float32))[0]
    likeliest = logits[:, : source.token_count].argmax(-1)
    own = range(len(before), len(ids))
    return float(np.mean([likeliest[at - 1] == ids[at] for at in own]))


class TestAgreement:
    def test_it_is_the_share_of_tokens_that_ego_holds_likeliest(self, suite: CortexSuite) -> None:
        prompts = tale_prompts(6)
        said = said_to(suite, prompts)
        found, how = agreement_with_ego(suite.ego, said)
        assert how == BY_TOKENS
        expected = [agreement_oracle(*pair) for pair in zip(prompts, said, strict=True)]
        assert found == pytest.approx(expected)
        assert 0 < found.mean() < 1

    def test_ego_agrees_wholly_with_its_own_answers(self, suite: CortexSuite) -> None:
        prompts = ["Once upon a time", "The dog was"]
        own = suite.ego.generate_many(prompts, max_tokens=SHORT, temperature=0)
        said = [
            NeuronAnswer(
                [{"role": "user", "content": prompt}], answer.text, answer.finish_reason, (-1.0,)
            )
            for prompt, answer in zip(prompts, own, strict=True)
        ]
        found, _ = agreement_with_ego(suite.ego, said)
        assert found == pytest.approx([1.0, 1.0])

    def test_another_tokenizer_and_chat_template_read_the_same_words(
        self, suite: CortexSuite, tmp_path: Path
    ) -> None:
        folder = make_model_folder(
            tmp_path / "ego", tokenizer=ASSETS / "teacher", chat_template=TEMPLATE
        )
        ego = EgoModel(EgoConfig(model=str(folder)))
        said = said_to(suite, tale_prompts(2))
        found, _ = agreement_with_ego(ego, said)
        assert ((found >= 0) & (found <= 1)).all()
        record = read_by(ego.source.tokenizer, said[0])
        assert [turn["role"] for turn in record["messages"]] == ["user", "assistant"]
        assert record["messages"][-1]["content"] == said[0].text
        plain = read_by(suite.source.tokenizer, said[0])
        assert plain["prompt"] == tale_prompts(1)[0] and plain["completion"] == said[0].text

    def test_what_ego_cannot_read_is_no_number(self, suite: CortexSuite) -> None:
        turns = [{"role": "user", "content": "Once"}]
        said = [
            NeuronAnswer(turns, "", "length", (-1.0,)),
            NeuronAnswer(turns, " word" * 2000, "length", (-1.0,)),
            NeuronAnswer(turns, " upon a time", "length", (-1.0,)),
        ]
        found, _ = agreement_with_ego(suite.ego, said)
        assert np.isnan(found).tolist() == [True, True, False]

    def test_an_api_agrees_as_far_as_its_own_answer_is_alike(self) -> None:
        def subsequence(a: str, b: str) -> int:
            rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
            for i, x in enumerate(a):
                for j, y in enumerate(b):
                    rows[i + 1][j + 1] = (
                        rows[i][j] + 1 if x == y else max(rows[i][j + 1], rows[i + 1][j])
                    )
            return rows[-1][-1]

        texts = ["a red ball", "nothing", "the red ball"]
        said = [
            NeuronAnswer([{"role": "user", "content": str(i)}], text, "stop", (-1.0,))
            for i, text in enumerate(texts)
        ]
        with (
            answering(lambda messages: "the red ball") as url,
            EgoModel(EgoConfig(model=url, remote_model="m", retries=0)) as ego,
        ):
            found, how = agreement_with_ego(ego, said)
        own = "the red ball"
        expected = [2 * subsequence(text, own) / (len(text) + len(own)) for text in texts]
        assert how == BY_TEXT
        assert found == pytest.approx(expected) and found[2] == 1


class TestAnswers:
    def test_they_are_those_of_the_suite(self, suite: CortexSuite) -> None:
        prompts = tale_prompts(3)
        for prompt, said in zip(prompts, said_to(suite, prompts), strict=True):
            answer = suite.ask(DOMAIN, prompt, max_tokens=SHORT, hand_over="never")
            assert (said.text, said.finish_reason) == (answer.raw, answer.finish_reason)
            raw = math.exp(np.mean(said.log_probs))
            assert said.confidence == pytest.approx(raw)

    def test_without_the_adapter_the_student_itself_answers(self, suite: CortexSuite) -> None:
        [said] = said_to(suite, tale_prompts(1), with_adapter=False)
        bare = suite.source.load()
        from mlx_lm import generate

        prompt = suite.source.tokenizer.encode(tale_prompts(1)[0])
        whole = generate(bare.model, bare.tokenizer, prompt, max_tokens=SHORT)
        assert said.text.strip() == whole.strip()
        assert said.text != said_to(suite, tale_prompts(1))[0].text

    def test_a_prompt_beyond_the_context_is_left_out_and_told(self, suite: CortexSuite) -> None:
        questions, left_out = questions_of(suite, DOMAIN, ["word " * 600, "Once"], max_tokens=4)
        assert len(questions) == 1
        assert left_out == {"longer than the student's context": 1}


class TestCalibrateDomain:
    @pytest.mark.slow
    def test_held_out_prompts_calibrate_and_the_suite_uses_it(
        self, suite: CortexSuite, adapters: Path
    ) -> None:
        events: list[str] = []
        calibration, details = calibrate_domain(
            suite,
            DOMAIN,
            CalibrationSettings(max_tokens=SHORT, max_risk=0.9),
            report=lambda event, row: events.append(event),
        )
        assert (calibration.n_fit, calibration.n_held) == (16, 16)
        assert calibration.adapter_digest == suite.bank.digest_of(DOMAIN)
        assert calibration.ego == TEACHER and calibration.threshold is not None
        assert details["prompts"] == details["answers"] == 32
        assert details["left_out"] == {} and details["agreement"]["means"] == BY_TOKENS
        assert {"phase", "advance"} <= set(events)
        prompts = heldout_prompts(
            heldout_records(adapters, DOMAIN),
            suite.source.tokenizer,
            "",
            most=200,
            seed=0,
        )
        said = said_to(suite, prompts)
        agreement, _ = agreement_with_ego(suite.ego, said)
        _, held = halves(32, seed=0)
        assert details["area"]["at_random"] == pytest.approx(1 - agreement[held].mean())
        assert details["agreement"]["mean"] == pytest.approx(agreement.mean())
        written = json.loads((adapters / DOMAIN / CALIBRATION_FILE).read_text())
        assert written == json.loads(json.dumps(calibration.to_json()))
        assert (adapters / DOMAIN / PICTURE_FILE).read_bytes().startswith(b"\x89PNG")
        assert details["files"] == [
            str(adapters / DOMAIN / name) for name in (CALIBRATION_FILE, PICTURE_FILE)
        ]
        answer = suite.ask(DOMAIN, tale_prompts(1)[0], max_tokens=SHORT, hand_over="never")
        assert answer.calibrated and answer.threshold == calibration.threshold
        again, _ = calibrate_domain(
            suite, DOMAIN, CalibrationSettings(max_tokens=SHORT, max_risk=0.9)
        )
        assert again == calibration

    def test_own_prompts_are_taken_as_they_are(self, suite: CortexSuite) -> None:
        prompts = [f"{name} ran to the" for name in map(chr, range(ord("A"), ord("Z") + 1))]
        calibration, details = calibrate_domain(
            suite,
            DOMAIN,
            CalibrationSettings(max_tokens=4, samples=20, method="temperature", confidence=0),
            prompts=prompts,
        )
        assert calibration.method == "temperature" and details["prompts"] == 20

    def test_answers_that_the_schema_refuses_do_not_count(self, suite: CortexSuite) -> None:
        told: list[str] = []

        def report(event: str, row: dict[str, Any]) -> None:
            if event == "warning":
                told.append(row["message"])

        with pytest.raises(ConchError, match="of 24 answers of task 0 can be judged, and 20 are"):
            calibrate_domain(
                suite,
                "task",
                CalibrationSettings(max_tokens=2),
                prompts=tale_prompts(24),
                report=report,
            )
        assert told == [
            "24 of 24 answers are left out: not valid for the domain's schema, so that EGO answers "
            "whatever the confidence is"
        ]

    @pytest.mark.parametrize(
        ("domain", "options", "words"),
        [
            (DOMAIN, {"prompts": ["Once"]}, "tales has 1 held-out prompts, too few"),
            ("memory", {}, "there is no neuron 'memory'"),
            ("task", {}, "what task held out is not known, .*heldout.jsonl: distil it"),
        ],
    )
    def test_refusals(
        self, suite: CortexSuite, domain: str, options: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(ConchError, match=words):
            calibrate_domain(suite, domain, **options)

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"samples": 3}, "samples is 3: it must be 20 or more"),
            ({"method": "magic"}, "method is 'magic': use one of isotonic, temperature, none"),
            ({"max_risk": 2.0, "seed": -1}, "max_risk is 2.0: .*; seed is -1"),
        ],
    )
    def test_settings_out_of_range(self, values: dict[str, Any], words: str) -> None:
        with pytest.raises(ConchError, match=words):
            CalibrationSettings(**values)

    def test_without_ego_there_is_nothing_to_agree_with(
        self, adapters: Path, tmp_path: Path
    ) -> None:
        with CortexSuite(adapters, domains=[DOMAIN]) as alone:
            with pytest.raises(ConchError, match="cannot be calibrated without EGO"):
                calibrate_domain(alone, DOMAIN, CalibrationSettings(max_tokens=1))
            alone.ego = EgoModel(EgoConfig(model=str(tmp_path / "gone")))
            with pytest.raises(EgoUnavailableError, match="is not available"):
                calibrate_domain(alone, DOMAIN, CalibrationSettings(max_tokens=1))


class TestHeldOut:
    def test_of_a_distillation_it_is_what_that_wrote(self, adapters: Path) -> None:
        found = heldout_records(adapters, DOMAIN)
        _, expected = split_heldout(tales(), 0.5, seed=0)
        assert found == [tales()[index] for index in expected]

    def test_a_distillation_that_kept_none_is_refused_and_data_stand_in(
        self, suite: CortexSuite, tmp_path: Path
    ) -> None:
        with pytest.raises(ConchError, match=r"distil it again, or give data .*\(--data FILE\)"):
            heldout_records(tmp_path, DOMAIN)
        settings = CalibrationSettings(max_tokens=1, samples=20, confidence=0)
        _, details = calibrate_domain(suite, DOMAIN, settings, data=tales(24))
        assert details["prompts"] == 20

    def test_of_a_line_what_no_version_learned(self, adapters: Path, tmp_path: Path) -> None:
        line = line_of(tmp_path, DOMAIN)
        adapter = tmp_path / "adapter"
        shutil.copytree(adapters / DOMAIN / "adapters_kd", adapter)
        # Else what the distillation held out stays held out.
        (adapter / HELDOUT_FILE).unlink()
        config = EvolveConfig()
        init_line(line, STUDENT, tales(20), config=config, adapter=adapter)
        found = heldout_records(tmp_path, DOMAIN)
        _, expected = split_heldout(tales(20), config.training.val_fraction, seed=0)
        assert found == [tales(20)[index] for index in expected]
        # Recorded once more, one of them was learned by the next version after all.
        documents = {
            MANIFEST_FILE: {"parent": "G000", "digests": {"parents": {}}},
            DATA_FILE: json_lines([{**found[0], "completion": " No."}]),
            HELDOUT_FILE: json_lines(tales(22)[21:]),
        }
        with line.lock():
            write_folder(line.candidate, documents=documents)
            assert line.promote(line.candidate) == "G001"
        later = heldout_records(tmp_path, DOMAIN)
        assert sorted(map(str, later)) == sorted(map(str, [*found[1:], tales(22)[21]]))

    def test_a_prompt_of_every_form(self) -> None:
        tokenizer = ModelSource(STUDENT).tokenizer
        system = DOMAIN_PROMPTS["task"]["system"]
        answer = {"role": "assistant", "content": "Yes."}
        asked = {"role": "user", "content": "Is it?"}
        for turns in (
            [{"role": "system", "content": system}, asked, answer],
            [{"role": "user", "content": f"{system}\n\nIs it?"}, answer],
            [asked, answer, asked, answer],
        ):
            assert prompt_of({"messages": turns}, tokenizer, system) == [asked]
        own = [{"role": "system", "content": "Be kind."}, asked]
        assert prompt_of({"messages": [*own, answer]}, tokenizer, system) == own
        assert prompt_of({"messages": [answer]}, tokenizer, system) is None
        record = {"prompt": f"{system}\n\nIs it?", "completion": " Yes."}
        assert prompt_of(record, tokenizer, system) == "Is it?"
        assert prompt_of(record, tokenizer, "") == record["prompt"]
        text = "Once upon a time there was a little girl who had a very big red ball at home."
        for record in ({"text": text}, {"prompt": " ", "completion": text}):
            opening = prompt_of(record, tokenizer, "")
            assert isinstance(opening, str) and text.startswith(opening.strip())
            assert 12 < len(opening) < len(text) - 12

    def test_no_prompt_twice_and_the_draw_is_the_seeds(self) -> None:
        tokenizer = ModelSource(STUDENT).tokenizer
        records = [*tales(30), *tales(30)]
        found = heldout_prompts(records, tokenizer, "", most=10, seed=1)
        assert len(set(found)) == 10
        assert found == heldout_prompts(records, tokenizer, "", most=10, seed=1)
        assert found != heldout_prompts(records, tokenizer, "", most=10, seed=2)
        assert len(heldout_prompts(records, tokenizer, "", most=99, seed=1)) == 30
        assert chosen([3, 1, 2], 9, seed=0) == [3, 1, 2]
