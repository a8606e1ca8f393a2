"""A confidence calibrated: a neuron answers held-out prompts, and EGO is asked of them.

Knows a suite and EGO; what is made of the numbers is in confidence.py, where the prompts come from
in heldout.py. Another way to agree: a branch in `agreement_with_ego`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from conch_dna.checkpoints import write_atomically
from conch_dna.cortex.calibration.confidence import (
    Calibration,
    answer_confidence,
    bins_for,
    calibrate,
    halves,
    save_calibration,
)
from conch_dna.cortex.calibration.drift import (
    Expectations,
    expected_hand_overs,
    expected_mask,
)
from conch_dna.cortex.calibration.heldout import chosen, heldout_prompts, heldout_records
from conch_dna.cortex.calibration.risk_coverage import (
    RiskCoverage,
    draw_risk_coverage,
    risk_coverage,
)
from conch_dna.cortex.calibration.settings import MIN_ANSWERS, CalibrationSettings
from conch_dna.cortex.engine.batching import Piece, Request
from conch_dna.cortex.neuron import CortexSuite
from conch_dna.cortex.options import AskOptions
from conch_dna.ego.model import EgoModel
from conch_dna.errors import ConchError
from conch_dna.generations.promotion import text_scores
from conch_dna.metrics import reliability
from conch_dna.retraining.lessons import conversation, record_of
from conch_dna.screen.progress import Report, silent
from conch_dna.training.chats.conversations import Prompt
from conch_dna.training.data.answers import continuation_text
from conch_dna.training.data.records import Record, tokenize_record
from conch_dna.training.structured_answers import parse_answer

PICTURE_FILE = "risk_coverage.png"
BY_TOKENS = "the share of an answer's tokens that EGO holds likeliest, reading prompt and answer"
BY_TEXT = "the likeness (Indel) of an answer to EGO's own, since an API scores no tokens"
NOT_VALID = "not valid for the domain's schema, so that EGO answers whatever the confidence is"
NOT_READ = "not to be read by EGO: no token of it counts, or it is too long"


class Question(NamedTuple):
    """A prompt on its way to the engine.

    Attributes:
        turns: The conversation as EGO is asked, the system prompt its first turn.
        request: For the engine.
        own_system: Whether the prompt brings a system message of its own.
    """

    turns: list[dict[str, str]]
    request: Request
    own_system: bool = False


@dataclass(frozen=True, eq=False)
class NeuronAnswer:
    """A neuron's first answer to a prompt, before anybody judged it.

    Attributes:
        turns: The conversation as EGO is asked, the system prompt its first turn.
        text: The answer.
        finish_reason: "stop" or "length".
        log_probs: Of its tokens, in nats, that which stops it among them.
        removed: Mean share of probability that a schema took from them; None where it was written
            freely.
        own_system: Whether the prompt brings a system message of its own.
    """

    turns: list[dict[str, str]]
    text: str
    finish_reason: str
    log_probs: tuple[float, ...]
    removed: float | None = None
    own_system: bool = False

    @property
    def confidence(self) -> float:
        """The raw one: exp of the mean log-probability of the tokens."""
        return answer_confidence(self.log_probs)


@dataclass(frozen=True, eq=False)
class Agreement:
    """How sure answers were, and how far EGO agrees.

    Attributes:
        confidence: Raw `[n]`.
        shares: Of each answer, what EGO agrees with, in [0, 1] `[n]`.
        meaning: What agreement means, in words.
        left_out: For each reason how many answers are not among them.
    """

    confidence: np.ndarray
    shares: np.ndarray
    meaning: str
    left_out: dict[str, int]

    def fitted(
        self, settings: CalibrationSettings, *, adapter_digest: str, ego: str
    ) -> Calibration:
        """The calibration that these answers give.

        Raises:
            ConchError: They are too few.
        """
        return calibrate(
            self.confidence,
            self.shares,
            method=settings.method,
            max_risk=settings.max_risk,
            confidence=settings.confidence,
            seed=settings.seed,
            adapter_digest=adapter_digest,
            ego=ego,
        )

    def held_out(self, calibration: Calibration) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Of the answers that a calibration held out, confidences and shares.

        Returns:
            Confidences `[m]` by name, `raw` and `calibrated`; and shares `[m]`.
        """
        _, held = halves(len(self.shares), seed=calibration.seed)
        raw = self.confidence[held]
        calibrated = np.array([calibration(share) for share in raw])
        return {"raw": raw, "calibrated": calibrated}, self.shares[held]

    def curves(self, calibration: Calibration) -> dict[str, RiskCoverage]:
        """Risk and coverage of the answers that a calibration held out, raw and calibrated."""
        confidences, shares = self.held_out(calibration)
        return {name: risk_coverage(values, shares) for name, values in confidences.items()}


def questions_of(
    suite: CortexSuite,
    domain: str,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = CalibrationSettings.max_tokens,
    with_adapter: bool = True,
    structured: bool = False,
) -> tuple[list[Question], dict[str, int]]:
    """Prompts as the suite would ask them, greedily; those it cannot be asked are left out.

    Args:
        suite: Whose engine answers.
        domain: Whose system prompt stands in front.
        prompts: Each a text or a conversation.
        max_tokens: Longest answer.
        with_adapter: Otherwise the student without one is asked the same.
        structured: Whether answers are held to the domain's schema, as when users ask.

    Returns:
        What to ask, and for each reason how many are left out.
    """
    options = AskOptions(max_tokens=max_tokens, hand_over="never", structured=structured)
    questions, left_out = [], Counter[str]()
    for prompt in prompts:
        turn = suite.turn(domain, prompt, options)
        assert turn.request is not None
        request = turn.request if with_adapter else replace(turn.request, domain=None)
        try:
            suite.engine.check(request)
        except ConchError:
            left_out["longer than the student's context"] += 1
            continue
        questions.append(Question(turn.ego_turns, request, turn.own_system))
    return questions, dict(left_out)


def answers_to(
    suite: CortexSuite, questions: Sequence[Question], *, report: Report = silent
) -> list[NeuronAnswer]:
    """The answers, batch after batch through the suite's engine, which must be idle."""
    answers = []
    size = suite.engine.max_batch
    for start in range(0, len(questions), size):
        part = questions[start : start + size]
        pieces = suite.engine.run([each.request for each in part])
        answers += [_answer(suite, *pair) for pair in zip(part, pieces, strict=True)]
        report("advance", {"by": len(part)})
    return answers


def _answer(suite: CortexSuite, question: Question, pieces: Sequence[Piece]) -> NeuronAnswer:
    reason = pieces[-1].finish_reason or "length"
    ids = [piece.token for piece in pieces]
    own = ids[:-1] if reason == "stop" else ids
    text = continuation_text(suite.source.tokenizer, question.request.tokens, own)
    removed = [piece.removed for piece in pieces if piece.removed is not None]
    return NeuronAnswer(
        question.turns,
        text,
        reason,
        tuple(piece.log_prob for piece in pieces),
        fmean(removed) if removed else None,
        question.own_system,
    )


def agreement_of(
    suite: CortexSuite,
    domain: str,
    answers: Sequence[NeuronAnswer],
    *,
    max_tokens: int = CalibrationSettings.max_tokens,
) -> Agreement:
    """Let EGO judge answers; those that the domain's schema refuses are left out.

    Raises:
        ConchError: The suite has no EGO, or it is not there.
    """
    if suite.ego is None:
        raise ConchError(
            f"{domain} cannot be calibrated without EGO, whose agreement it is about: name one"
        )
    schema = suite.domain(domain).schema
    valid = [each for each in answers if _valid(each, schema)]
    shares, meaning = agreement_with_ego(suite.ego, valid, max_tokens=max_tokens)
    known = ~np.isnan(shares)
    confidence = np.array([each.confidence for each in valid], np.float64)
    left_out = {NOT_VALID: len(answers) - len(valid), NOT_READ: int((~known).sum())}
    reasons = {reason: count for reason, count in left_out.items() if count}
    return Agreement(confidence[known], shares[known], meaning, reasons)


def _valid(answer: NeuronAnswer, schema: Mapping[str, Any] | None) -> bool:
    return schema is None or parse_answer(answer.text, schema).valid


def expectations_of(
    calibration: Calibration,
    answers: Sequence[NeuronAnswer],
    schema: Mapping[str, Any] | None,
    *,
    max_tokens: int,
) -> Expectations | None:
    """What the calibration's own answers let expect of live ones.

    All answers count, also such as EGO could not judge; not those to prompts with a system message
    of their own, which live ones are not compared with either.

    Args:
        calibration: Of these answers.
        answers: As the neuron gives them to users.
        schema: Of the domain.
        max_tokens: Longest answer.

    Returns:
        None where none counts.
    """
    plain = [each for each in answers if not each.own_system]
    if not plain:
        return None
    kept = [
        _valid(each, schema) and not calibration.should_fallback(calibration(each.confidence))
        for each in plain
    ]
    removed = [each.removed for each in plain if each.removed is not None]
    return Expectations(
        hand_over=expected_hand_overs(len(plain) - sum(kept), len(plain)),
        mask=expected_mask(removed) if removed else None,
        max_tokens=max_tokens,
    )


def agreement_with_ego(
    ego: EgoModel,
    answers: Sequence[NeuronAnswer],
    *,
    max_tokens: int = CalibrationSettings.max_tokens,
) -> tuple[np.ndarray, str]:
    """How far EGO agrees with each answer, and what that means.

    Args:
        ego: A local model reads the answers; an API answers the same prompts itself.
        answers: Of a neuron.
        max_tokens: Longest answer of an API.

    Returns:
        Shares `[n]` from 0 to 1, NaN where EGO cannot read an answer.

    Raises:
        EgoUnavailableError: EGO cannot be loaded or reached.
    """
    if ego.teaches == "text":
        from rapidfuzz.distance import Indel

        turns = [each.turns for each in answers]
        own = ego.generate_many(turns, max_tokens=max_tokens, temperature=0)
        alike = [
            Indel.normalized_similarity(each.text.strip(), answer.text.strip())
            for each, answer in zip(answers, own, strict=True)
        ]
        return np.array(alike, np.float64), BY_TEXT
    shares = np.full(len(answers), np.nan)
    tokenizer = ego.source.tokenizer
    longest = ego.source.context_length or 2**31
    places, examples = [], []
    for place, each in enumerate(answers):
        try:
            example = tokenize_record(read_by(tokenizer, each), tokenizer, name=f"answer {place}")
        except ConchError:
            # Nothing of it counts, or EGO's chat template changes it: told as left out.
            continue
        if len(example.ids) <= longest:
            places.append(place)
            examples.append(example)
    if examples:
        ego.load()
        scores = text_scores(ego.source.resident(), examples, batch_size=ego.config.batch_size)
        shares[places] = scores.top1
    return shares, BY_TOKENS


def read_by(tokenizer: Any, answer: NeuronAnswer) -> Record:
    """A prompt and its answer as a model with that tokenizer would have been asked and answered."""
    turns = conversation(tokenizer, answer.turns, "")
    return record_of(tokenizer, turns, answer.text, answer.finish_reason)


def calibrate_domain(
    suite: CortexSuite,
    domain: str,
    settings: CalibrationSettings | None = None,
    *,
    prompts: Sequence[Prompt] | None = None,
    data: Sequence[Record] | None = None,
    report: Report = silent,
) -> tuple[Calibration, dict[str, Any]]:
    """Calibrate a neuron's confidence on held-out prompts; the suite uses it from then on.

    The neuron gives its first answer to each, greedily and held to the domain's schema, as it
    answers users. `calibration.json` and `risk_coverage.png` go into the domain's folder. With a
    schema only valid answers count, since the others go to EGO however sure they are.

    Args:
        suite: With EGO, and an idle engine.
        domain: A neuron of it.
        settings: How many prompts, how long answers, and how to calibrate.
        prompts: That no version was trained on; those of `data` where None.
        data: Records that no version was trained on; what the domain held out where None.
        report: Gets progress; see `conch_dna.screen.progress.Progress`.

    Returns:
        The calibration, and what it stands on, as JSON can hold it: `prompts`, `answers`,
        `left_out` by reason, `agreement` and what it means, `area` under the risk-coverage curves
        of the held-out half (`raw`, `calibrated`, and `at_random`, the mean risk), and the `files`.

    Raises:
        ConchError: Too few answers can be judged, the prompts are not known, or there is no EGO.
    """
    settings = settings or CalibrationSettings()
    digest = suite.bank.digest_of(suite.domain(domain).name)
    prompts = _prompts(suite, domain, settings, prompts, data)
    questions, left_out = questions_of(
        suite, domain, prompts, max_tokens=settings.max_tokens, structured=True
    )
    report("phase", {"name": f"{domain}: answers", "total": len(questions), "unit": "prompts"})
    answers = answers_to(suite, questions, report=report)
    report("phase", {"name": f"{domain}: EGO reads them"})
    agreement = agreement_of(suite, domain, answers, max_tokens=settings.max_tokens)
    left_out |= agreement.left_out
    for reason, count in left_out.items():
        report("warning", {"message": f"{count} of {len(prompts)} answers are left out: {reason}"})
    count = len(agreement.shares)
    if count < MIN_ANSWERS:
        why = "; ".join(f"{count} are {reason}" for reason, count in left_out.items())
        raise ConchError(
            f"of {len(prompts)} answers of {domain} {count} can be judged, and {MIN_ANSWERS} are "
            f"needed: {why}"
        )
    assert suite.ego is not None
    calibration = agreement.fitted(settings, adapter_digest=digest, ego=suite.ego.model_id)
    schema = suite.domain(domain).schema
    expected = expectations_of(calibration, answers, schema, max_tokens=settings.max_tokens)
    calibration = replace(calibration, expected=expected)
    path = save_calibration(suite.adapters_dir, domain, calibration)
    picture = path.with_name(PICTURE_FILE)
    confidences, shares = agreement.held_out(calibration)
    curves = agreement.curves(calibration)
    bins = bins_for(len(shares))
    draw = partial(
        draw_risk_coverage,
        curves=curves,
        reliabilities={
            name: reliability(values, shares, bins=bins) for name, values in confidences.items()
        },
        title=f"{domain}: {len(shares)} held-out answers, EGO is {calibration.ego}",
    )
    write_atomically(picture, draw)
    suite.take_calibration(domain)
    details = {
        "domain": domain,
        "prompts": len(prompts),
        "answers": count,
        "left_out": left_out,
        "agreement": {"mean": float(agreement.shares.mean()), "means": agreement.meaning},
        "area": {name: curve.area for name, curve in curves.items()}
        | {"at_random": float(1 - shares.mean())},
        "files": [str(path), str(picture)],
    }
    return calibration, details


def _prompts(
    suite: CortexSuite,
    domain: str,
    settings: CalibrationSettings,
    prompts: Sequence[Prompt] | None,
    data: Sequence[Record] | None,
) -> list[Prompt]:
    if prompts is None:
        prompts = heldout_prompts(
            heldout_records(suite.adapters_dir, domain) if data is None else data,
            suite.source.tokenizer,
            suite.domain(domain).system,
            most=settings.samples,
            seed=settings.seed,
        )
    else:
        prompts = chosen(prompts, settings.samples, seed=settings.seed)
    if len(prompts) < MIN_ANSWERS:
        raise ConchError(
            f"{domain} has {len(prompts)} held-out prompts, too few to calibrate on: give "
            f"{MIN_ANSWERS} or more that it was not trained on (--prompts FILE or --data FILE)"
        )
    return prompts
