"""Learning from the student's own answers: which batches they are, and that a stop changes nothing.

The models are tiny and random; what the teacher says of an answer is told by full logits.
"""

import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from conch_dna.checkpoints import read_json
from conch_dna.errors import ConchError, Interrupted
from conch_dna.language_model import ModelSource, named_arrays
from conch_dna.training.adapters import make_trainable
from conch_dna.training.data.examples import Examples
from conch_dna.training.data.records import Record
from conch_dna.training.data.soft_targets import SoftTargetCache
from conch_dna.training.runs.html_report import write_report
from conch_dna.training.runs.on_policy import rounds as rounds_module
from conch_dna.training.runs.on_policy.own_answers import (
    answer_figures,
    compared,
    readable_answers,
    repetition,
    teacher_distances,
)
from conch_dna.training.runs.on_policy.questions import (
    question_of_record,
    questions_of,
    require_room_for_own,
)
from conch_dna.training.runs.on_policy.residency import (
    chosen_residency,
    parked,
    same_random_numbers,
)
from conch_dna.training.runs.on_policy.rounds import (
    Rounds,
    rollouts_of_a_round,
    round_figures,
)
from conch_dna.training.runs.on_policy.shares import own_batches
from conch_dna.training.runs.on_policy.stream import MixedBatches
from conch_dna.training.runs.report import own_answers_rows
from conch_dna.training.settings import KDConfig
from conch_dna.training.trainer import Trainer
from conch_dna.training.true_kd import TrueKnowledgeDistiller
from models import QUICK, make_model_folder
from tokenizers_made import byte_level_tokenizer
from watching import Said, stopped

WORDS = (
    "cat",
    "dog",
    "bird",
    "park",
    "home",
    "tree",
    "bell",
    "ball",
    "boat",
    "star",
    "cake",
    "hat",
)
RECORDS: list[Record] = [
    {"prompt": f"Who saw the {word}?", "completion": f" It was the big {word}."} for word in WORDS
]
ON_POLICY = {
    **QUICK,
    "batch_size": 2,
    "on_policy": 0.5,
    "rollouts": 4,
    "rollout_tokens": 6,
    "num_iters": 6,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return tuple(str(make_model_folder(folder / str(seed), seed=seed)) for seed in (1, 2))  # type: ignore[return-value]


def config_of(folder: Path, **changes: Any) -> KDConfig:
    return KDConfig(**{**ON_POLICY, "output_dir": str(folder), **changes})


def distil(models: Sequence[str], config: KDConfig, report: Any = None, **how: Any) -> Any:
    more = {"report": report} if report else {}
    distiller = TrueKnowledgeDistiller(*models, config, **more)
    return distiller.distill_domain("own", data=RECORDS, **how)


def adapter(result: Any) -> dict[str, mx.array]:
    tensors = mx.load(str(Path(result.adapter_path) / "adapters.safetensors"))
    assert isinstance(tensors, dict)
    return tensors


def same(one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    return one.keys() == other.keys() and all(mx.array_equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("share", [0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0])
def test_own_batches_are_spread_evenly(share: float):
    turns = [own_batches(share, index + 1) - own_batches(share, index) for index in range(60)]
    assert set(turns) <= {0, 1}
    assert sum(turns) == pytest.approx(60 * share, abs=1)
    places = np.flatnonzero(turns)
    assert np.ptp(np.diff(places)) <= 1
    stream = MixedBatches(None, None, share, 1)  # type: ignore[arg-type]
    assert [stream._index_of(place) for place in range(len(places))] == places.tolist()


class TestQuestions:
    def test_a_question_is_a_prompt_with_what_stands_beside_it(self, models):
        tokenizer = ModelSource(models[0]).tokenizer
        record = {**RECORDS[0], "context": "Read this.", "finish_reason": "stop"}
        question = question_of_record(record, tokenizer, "a")
        assert question.record == {"prompt": RECORDS[0]["prompt"], "context": "Read this."}
        answer = tokenizer.encode(" cat")[1:]
        answered = question.answered(tokenizer, answer)
        assert answered["context"] == "Read this."
        assert answered["finish_reason"] == "length"
        assert answered["tokens"]["ids"] == [*question.ids, *answer]

    def test_a_conversation_asks_its_last_question_only(self, tmp_path):
        template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
        template += "{% if add_generation_prompt %}assistant:{% endif %}"
        source = byte_level_tokenizer(tmp_path / "t", chat_template=template)
        tokenizer = ModelSource(str(make_model_folder(tmp_path / "m", tokenizer=source))).tokenizer
        turns = [{"role": r, "content": c} for r, c in zip("uaua", "1234", strict=True)]
        names = {"u": "user", "a": "assistant"}
        turns = [{**turn, "role": names[turn["role"]]} for turn in turns]
        question = question_of_record({"messages": turns}, tokenizer, "a")
        assert tokenizer.decode(question.ids) == "user:1\nassistant:2\nuser:3\nassistant:"
        answered = question.answered(tokenizer, [tokenizer.eos_token_id])
        assert answered["messages"][1]["weight"] == 0
        assert answered["messages"][3] == {"role": "assistant", "content": ""}
        assert answered["finish_reason"] == "stop"

    def test_a_text_asks_by_its_first_tokens(self, models):
        tokenizer = ModelSource(models[0]).tokenizer
        text = "The big dog ran to the park, and then it went home, where a cat was."
        question = question_of_record({"text": text}, tokenizer, "a")
        assert text.startswith(question.record["text"])
        assert len(question.ids) < 20

    def test_no_prompt_stands_twice(self, models):
        tokenizer = ModelSource(models[0]).tokenizer
        twice = [RECORDS[0], {**RECORDS[0], "completion": " Me."}, RECORDS[1]]
        assert len(questions_of(twice, "abc", tokenizer)) == 2


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        (10, {"rollouts": 12}, "12 answers to different prompts, and there are 10 .*--rollouts"),
        (3, {}, "4 answers to different prompts, and there are 3 .* lower --batch-size"),
    ],
)
def test_a_round_that_cannot_be_is_refused(prompts: int, changes: dict[str, int], message: str):
    with pytest.raises(ConchError, match=message):
        rollouts_of_a_round(prompts, KDConfig(on_policy=1.0, **changes))  # type: ignore[arg-type]


def test_a_round_asks_all_prompts_in_whole_batches():
    config = KDConfig(on_policy=1.0)
    assert [rollouts_of_a_round(count, config) for count in (4, 11, 500)] == [4, 8, 64]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.0}, "on_policy is above 0 and alpha is 0"),
        ({"train_on_prompt": True}, "on_policy and train_on_prompt do not go together"),
        ({"on_policy": 1.5}, "on_policy is 1.5"),
        ({"on_policy": 0.01, "num_iters": 6}, "makes none of 6 batches"),
        ({"rollouts": 6}, "rollouts is 6, which is no multiple of batch_size 4"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ConchError, match=message):
        KDConfig(**{"on_policy": 0.5, **changes})


@pytest.fixture
def rounds(models: Any, tmp_path: Path) -> Rounds:
    config = config_of(tmp_path, on_policy=1.0, rollout_reuse=2, target_bits=32)
    teacher, source = (ModelSource(name) for name in models)
    student = source.load()
    make_trainable(student, config)
    examples = Examples(teacher, source, config)
    questions = questions_of(RECORDS, WORDS, source.tokenizer)
    return Rounds(
        student,
        teacher,
        questions,
        examples,
        config,
        tmp_path,
        residency="both",
        report=Said(),
    )


class TestRounds:
    def test_the_teacher_scores_what_the_student_said(self, rounds: Rounds):
        batch = rounds.batch(0, step=0, last_step=3)
        model = rounds.teacher.resident()
        assert batch.count > 0
        ids = mx.array(batch.arrays["inputs"])
        logits = model.logits(ids).reshape(-1, model.vocabulary_size)
        rows = logits[mx.array(batch.arrays["positions"])] / rounds.config.temperature
        log_probs = np.asarray(rows - mx.logsumexp(rows, axis=-1, keepdims=True))[: batch.count]
        kept = batch.arrays["kept_ids"][: batch.count]
        expected = np.take_along_axis(log_probs, kept, axis=1)
        assert batch.arrays["teacher_log_probs"][: batch.count, :-1] == pytest.approx(
            expected, abs=1e-4
        )

    def test_each_answer_is_used_as_often_as_asked(self, rounds: Rounds):
        size = rounds.config.batch_size
        _, _, batches = rounds.place_in_round(0)
        assert batches == 2 * (rounds.size // size)
        for place in range(batches):
            rounds.batch(place, step=0, last_step=0)
        first = rounds._current
        rounds.batch(batches, step=4, last_step=5)
        assert rounds._current is not None and first is not None
        assert rounds._current[0] == first[0] + 1
        ages = [row["last_age"] for row in round_figures(rounds.folder.parent)]
        assert ages == [0, 1]

    def test_the_last_round_stays_as_it_was_where_more_steps_follow(self, rounds: Rounds):
        whole = rounds.place_in_round(0)
        rounds.config = replace(rounds.config, num_iters=2)
        assert (whole, rounds.place_in_round(0)) == ((0, 0, 4), (0, 0, 2))
        rounds.batch(0, step=0, last_step=1)
        rounds.config = replace(rounds.config, num_iters=8)
        assert [rounds.place_in_round(place) for place in (1, 2, 5, 6)] == [
            (0, 1, 2),
            (1, 0, 4),
            (1, 3, 4),
            (2, 0, 2),
        ]

    def test_rounds_go_through_all_prompts(self, rounds: Rounds):
        asked = [q.name for number in range(3) for q in rounds._asked(number)]
        assert sorted(asked) == sorted(WORDS)
        assert [q.name for q in rounds._asked(3)] != asked[:4]

    def test_an_altered_file_is_drawn_again_where_the_state_is_there(self, rounds: Rounds):
        before = rounds.batch(0, step=0, last_step=0).arrays
        (path,) = rounds.folder.glob("00000/answers_*.json")
        path.write_text(path.read_text().replace('"answers": [[', '"answers": [[7, '))
        rounds._current = None
        again = rounds.batch(0, step=0, last_step=0).arrays
        assert all(np.array_equal(before[name], again[name]) for name in before)
        path.write_text("{}")
        rounds._current = None
        with pytest.raises(ConchError, match="the adapter that drew it has learned since"):
            rounds.batch(1, step=1, last_step=1)

    def test_answers_of_another_state_are_not_taken(self, rounds: Rounds):
        rounds.batch(0, step=0, last_step=0)
        (path,) = rounds.folder.glob("00000/answers_*.json")
        before = read_json(path, needs={})["state"]
        parameters = rounds.student.model.trainable_parameters()
        rounds.student.model.update(tree_map(lambda array: array + 0.1, parameters))
        rounds._current = None
        rounds.batch(0, step=0, last_step=0)
        assert read_json(path, needs={})["state"] != before

    def test_prompts_without_room_are_refused(self, rounds: Rounds):
        config = replace(rounds.config, rollout_tokens=250)
        with pytest.raises(ConchError, match=r"the prompt of cat has .* lower --rollout-tokens"):
            require_room_for_own(rounds.questions, rounds.student.source, config)

    def test_what_the_teacher_cannot_read_is_left_out(self, rounds: Rounds):
        examples = rounds.examples
        question = rounds.questions[0]
        tokenizer = rounds.student.tokenizer
        good = question.answered(tokenizer, question.ids[-2:])
        long = question.answered(tokenizer, question.ids[-1:] * 300)
        made, left_out = examples.of_rollouts([good, long], 0)
        assert (len(made), left_out) == (1, 1)
        with pytest.raises(ConchError, match=r"round 3: the teacher can read none .* longer than"):
            examples.of_rollouts([long], 3)


def test_a_student_that_says_nothing_is_warned_of(rounds: Rounds, monkeypatch):
    end = rounds.student.tokenizer.eos_token_id
    said = rounds.report
    monkeypatch.setattr(rounds_module, "answer_batch", lambda m, p, **k: [[end] for _ in p])
    rounds.batch(0, step=0, last_step=0)
    assert any("answers nothing to all 4 prompts" in line for line in said)  # type: ignore[attr-defined]


def test_answers_that_are_all_cut_are_warned_of(rounds: Rounds, monkeypatch):
    word = rounds.questions[0].ids[-1]
    said = rounds.report
    monkeypatch.setattr(rounds_module, "answer_batch", lambda m, p, **k: [[word] * 6 for _ in p])
    rounds.batch(0, step=0, last_step=0)
    assert any("all 4 answers were cut at --rollout-tokens 6" in line for line in said)  # type: ignore[attr-defined]


class TestResidency:
    def test_what_is_frozen_comes_back_as_it_was(self, models):
        config = KDConfig(lora_rank=4)
        student = ModelSource(models[1]).load()
        make_trainable(student, config)
        mx.random.seed(5)
        before = {n: np.array(v) for n, v in named_arrays(student.model.parameters()).items()}
        drawn = np.array(mx.random.state[0])
        with same_random_numbers(), parked(student, config):
            left = sum(v.nbytes for v in named_arrays(student.model.parameters()).values())
            trained = sum(
                v.nbytes for v in named_arrays(student.model.trainable_parameters()).values()
            )
            assert left == trained
            mx.random.uniform()
        after = named_arrays(student.model.parameters())
        assert all(np.array_equal(before[name], np.array(after[name])) for name in before)
        assert np.array_equal(drawn, np.array(mx.random.state[0]))

    @pytest.mark.parametrize(
        ("resident", "memory", "chosen"),
        [
            ("auto", 10**12, "both"),
            ("auto", 10, "one"),
            ("one", 10**12, "one"),
            ("both", 1, "both"),
        ],
    )
    def test_auto_finds_out_what_fits(self, models, monkeypatch, resident, memory, chosen):
        from conch_dna.training.runs.on_policy import residency

        monkeypatch.setattr(residency, "machine_memory", lambda: (memory, "of a test"))
        teacher, student = (ModelSource(name) for name in models)
        said: list[str] = []
        config = KDConfig(resident=resident)
        assert chosen_residency(teacher, student.load(), config, say=said.append) == chosen
        assert len(said) == (resident == "auto")

    def test_turns_and_full_training_do_not_go_together(self, models):
        teacher, student = (ModelSource(name) for name in models)
        config = KDConfig(resident="one", full=True)
        with pytest.raises(ConchError, match="resident is one, but with --full"):
            chosen_residency(teacher, student.load(), config, say=print)


class TestRun:
    def test_taking_turns_changes_no_bit(self, models, tmp_path):
        both = distil(models, config_of(tmp_path / "a", resident="both"))
        one = distil(models, config_of(tmp_path / "b", resident="one"))
        assert same(adapter(both), adapter(one))
        rounds = both.metadata["rounds"]
        assert [row["step"] for row in rounds] == [1, 5]
        # The last draws no more than what the steps that are left need.
        assert [row["rollouts"] for row in rounds] == [4, 2]

    def test_it_learns_something_else_than_from_given_texts(self, models, tmp_path):
        own = distil(models, config_of(tmp_path / "a", on_policy=1.0))
        given = distil(models, config_of(tmp_path / "b", on_policy=0.0))
        assert not same(adapter(own), adapter(given))
        assert "rounds" not in given.metadata

    @pytest.mark.parametrize(
        ("at", "resident"), [("rollouts", "both"), ("scoring", "one"), ("training", "one")]
    )
    def test_a_stop_anywhere_changes_no_bit(self, models, tmp_path, at, resident):
        # Dropout draws from the random numbers that all share.
        changes = {
            "lora_dropout": 0.2,
            "on_policy": 1.0,
            "rollouts": 8,
            "generation_batch_size": 4,
            "resident": resident,
        }
        whole = distil(models, config_of(tmp_path / "a", **changes))
        places: dict[str, tuple[Any, str, int]] = {
            "rollouts": (rounds_module, "answer_batch", 3),
            "scoring": (SoftTargetCache, "_write", 3),
            "training": (Trainer, "_take_step", 4),
        }
        where, name, stop = places[at]
        config = config_of(tmp_path / "b", **changes)
        with stopped(where, name, call=stop):
            distil(models, config)
        said = Said()
        again = distil(models, config, said, resume=True)
        assert same(adapter(whole), adapter(again))
        assert whole.evaluation["after"] == again.evaluation["after"]

    @pytest.mark.parametrize("where", ["drawn", "scored"])
    def test_ctrl_c_in_a_round_acts_before_its_end(self, models, tmp_path, where):
        changes = {"on_policy": 1.0, "rollouts": 8, "generation_batch_size": 4}
        whole = distil(models, config_of(tmp_path / "a", **changes))
        said: list[str] = []

        def press(event: str, row: dict[str, Any]) -> None:
            if event == "within" and where in row["text"] and not said:
                said.append(row["text"])
                signal.raise_signal(signal.SIGINT)

        config = config_of(tmp_path / "b", **changes)
        with pytest.raises(Interrupted, match=r"stopped after step 0; .* --resume"):
            distil(models, config, press)
        assert said[0].startswith("round 0: ")
        again = distil(models, config, resume=True)
        assert same(adapter(whole), adapter(again))

    def test_more_steps_go_on_behind_a_round_that_was_cut(self, models, tmp_path):
        changes = {"on_policy": 1.0, "rollouts": 8}
        distil(models, config_of(tmp_path, num_iters=2, **changes))
        result = distil(models, config_of(tmp_path, num_iters=4, **changes), resume=True)
        assert [row["rollouts"] for row in result.metadata["rounds"]] == [4, 4]

    def test_a_teacher_with_another_tokenizer_scores_by_text(self, models, tmp_path):
        tokenizer = byte_level_tokenizer(tmp_path / "t", size=300)
        teacher = str(make_model_folder(tmp_path / "teacher", tokenizer=tokenizer))
        result = distil((teacher, models[1]), config_of(tmp_path / "a", on_policy=1.0))
        rounds = result.metadata["rounds"]
        assert sum(row["rollouts"] - row["left_out"] for row in rounds) > 0

    def test_a_teacher_that_reads_more_scores_them_too(self, models, tmp_path):
        config = config_of(
            tmp_path, on_policy=1.0, teacher_system="Say who.", student_system="none"
        )
        result = distil(models, config)
        assert result.metadata["rounds"]

    def test_a_new_run_forgets_the_rounds_of_the_one_before(self, models, tmp_path):
        config = config_of(tmp_path, on_policy=1.0)
        distil(models, config)
        changed = replace(config, seed=3)
        distil(models, changed, overwrite=True)
        fresh = distil(models, replace(changed, output_dir=str(tmp_path / "b")))
        again = distil(models, changed, overwrite=True)
        assert same(adapter(fresh), adapter(again))


class TestOwnAnswers:
    def test_repetition_is_the_share_of_ngrams_that_stood_before(self):
        assert repetition([1, 2, 3, 4, 5]) == 0
        assert repetition([1, 2, 3]) == 0
        assert repetition([7] * 8) == pytest.approx(1 - 1 / 5)

    def test_figures_of_an_answer(self, models):
        tokenizer = ModelSource(models[0]).tokenizer
        question = question_of_record(RECORDS[0], tokenizer, "a")
        text = '{"what_happened": "a", "keep": "b", "change": ["c"], "check": "d"}'
        whole = tokenizer.encode(f"{RECORDS[0]['prompt']} {text}")
        answer = [*whole[len(question.ids) :], tokenizer.eos_token_id]
        figures = answer_figures(question, answer, tokenizer, "reflection")
        assert (figures["ended"], figures["tokens"]) == (1, len(answer))
        assert figures["valid"] == 1
        assert answer_figures(question, answer[:-3], tokenizer, "reflection")["valid"] == 0
        assert "valid" not in answer_figures(question, answer, tokenizer, "stories")

    def test_a_difference_is_judged_by_its_interval(self):
        before = [{"kl_nats": 2.0, "ended": 0.0, "tokens": 4.0}] * 8
        after = [{"kl_nats": 1.0 + n / 9, "ended": 0.0, "tokens": 9.0} for n in range(8)]
        rows = compared([*before, {**before[0], "kl_nats": np.nan}], [*after, after[0]], seed=0)
        assert rows["kl_nats"]["verdict"] == "better"
        assert rows["kl_nats"]["prompts"] == 8
        assert rows["kl_nats"]["interval"][1] < 0
        assert rows["ended"]["verdict"] == "not shown to be better"
        assert rows["tokens"]["verdict"] is None
        worse = compared(after, before, seed=0)
        assert worse["kl_nats"]["verdict"] == "worse"

    def test_a_run_measures_them(self, models, tmp_path):
        config = config_of(tmp_path, on_policy=1.0, own_answers=-1, num_iters=2)
        result = distil(models, config)
        figures = result.evaluation["own_answers"]
        assert figures["kl_nats"]["prompts"] == result.metadata["heldout_examples"]
        assert 0 <= figures["repetition"]["after"] <= 1
        assert not (tmp_path / "own" / "own_answers").exists()
        rows = own_answers_rows(result.evaluation)
        assert next(row[0] for row in rows) == "KL to the teacher (nats)"
        page = tmp_path / "page.html"
        write_report([tmp_path], page)
        assert "Its own answers to held-out prompts" in page.read_text()

    def test_the_distance_is_that_of_full_distributions(self, models, tmp_path):
        teacher, student = (ModelSource(name) for name in models)
        config = config_of(tmp_path, top_k=teacher.vocabulary_size, temperature=1.0)
        examples = Examples(teacher, student, config)
        questions = questions_of(RECORDS[:2], "ab", student.tokenizer)
        answers = [question.ids[-3:] for question in questions]
        targets = examples.targets(tmp_path)
        read = readable_answers(examples, questions, answers)
        targets.fill(teacher, list(read.values()), batch_size=2)
        model = student.load()
        distances = teacher_distances(model, read, targets, config)
        found = [distances[number] for number in range(len(answers))]
        of_teacher = teacher.load()
        for question, answer, distance in zip(questions, answers, found, strict=True):
            ids = mx.array([[*question.ids, *answer]])
            first = len(question.ids) - 1
            logs = []
            for each in (of_teacher, model):
                logits = each.logits(ids)[0, first : first + len(answer)]
                logs.append(np.asarray(logits - mx.logsumexp(logits, axis=-1, keepdims=True)))
            expected = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1).mean()
            assert distance == pytest.approx(expected, rel=1e-3)
