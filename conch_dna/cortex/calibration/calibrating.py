"""A domain's confidence calibrated: its neuron answers held-out prompts, and EGO is asked of them.

Knows a suite and EGO; what is made of the numbers is in confidence.py, where the prompts come from
in heldout.py. Another way to agree: a branch in `agreement_with_ego`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from conch_dna.cortex.calibration.confidence import (
    MIN_ANSWERS,
    MIN_IN_A_BIN,
    Calibration,
    RiskCoverage,
    answer_confidence,
    calibrate,
    draw_risk_coverage,
    halves,
    risk_coverage,
    save_calibration,
)
from conch_dna.cortex.calibration.heldout import chosen, heldout_prompts, heldout_records
from conch_dna.cortex.engine.request import Piece, Request
from conch_dna.cortex.neuron import CortexSuite
from conch_dna.cortex.turn import AskOptions
from conch_dna.ego.model import EgoModel
from conch_dna.errors import ConchError
from conch_dna.generations.promotion import text_scores
from conch_dna.metrics import reliability
from conch_dna.progress import Report, silent
from conch_dna.training.answers import continuation_text
from conch_dna.training.records import (
    Prompt,
    Record,
    plain_prompt,
    prompt_messages,
    tokenize_record,
)
from conch_dna.training.structured_answers import parse_answer

PICTURE_FILE = "risk_coverage.png"
MAX_TOKENS = AskOptions.max_tokens
BY_TOKENS = "the share of an answer's tokens that EGO holds likeliest, reading prompt and answer"
BY_TEXT = "the likeness (Indel) of an answer to EGO's own, since an API scores no tokens"
NOT_VALID = "not valid for the domain's schema, so that EGO answers whatever the confidence is"


@dataclass(frozen=True, eq=False)
class Said:
    """A neuron's first answer to a prompt, before anybody judged it.

    Attributes:
        turns: The conversation as it was asked, the system prompt its first turn.
        text: The answer.
        finish_reason: "stop" or "length".
        log_probs: Of its tokens, in nats, that which stops it among them.
    """

    turns: list[dict[str, str]]
    text: str
    finish_reason: str
    log_probs: tuple[float, ...]

    @property
    def confidence(self) -> float:
        """The raw one; see `answer_confidence`."""
        return answer_confidence(self.log_probs)


@dataclass(frozen=True, eq=False)
class Asked:
    """A prompt on its way to the engine.

    Attributes:
        turns: See `Said`.
        request: For the engine.
    """

    turns: list[dict[str, str]]
    request: Request

    def said(self, tokenizer: Any, pieces: Sequence[Piece]) -> Said:
        """The answer that came in these pieces."""
        reason = pieces[-1].finish_reason or "length"
        ids = [piece.token for piece in pieces]
        text = continuation_text(
            tokenizer, self.request.tokens, ids[:-1] if reason == "stop" else ids
        )
        return Said(self.turns, text, reason, tuple(piece.log_prob for piece in pieces))


def asked_of(
    suite: CortexSuite,
    domain: str,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = MAX_TOKENS,
    with_adapter: bool = True,
) -> tuple[list[Asked], dict[str, int]]:
    """Prompts as the suite would ask them, greedily; those it cannot be asked are left out.

    Args:
        suite: Whose engine answers.
        domain: Whose system prompt stands in front.
        prompts: Each a text or a conversation.
        max_tokens: Longest answer.
        with_adapter: Otherwise the student without one is asked the same.

    Returns:
        What to ask, and for each reason how many are left out.
    """
    options = AskOptions(max_tokens=max_tokens, hand_over="never", structured=False)
    asked, left_out = [], Counter[str]()
    for prompt in prompts:
        turn = suite.turn(domain, prompt, options)
        assert turn.request is not None
        request = turn.request if with_adapter else replace(turn.request, domain=None)
        try:
            suite.engine.check(request)
        except ConchError:
            left_out["longer than the student's context"] += 1
            continue
        asked.append(Asked(turn.turns, request))
    return asked, dict(left_out)


def answered(suite: CortexSuite, asked: Sequence[Asked], *, report: Report = silent) -> list[Said]:
    """The answers, batch after batch through the suite's engine, which must be idle."""
    said = []
    size = suite.engine.max_batch
    for start in range(0, len(asked), size):
        part = asked[start : start + size]
        answers = suite.engine.run([each.request for each in part])
        for each, pieces in zip(part, answers, strict=True):
            said.append(each.said(suite.source.tokenizer, pieces))
        report("advance", {"by": len(part)})
    return said


@dataclass(frozen=True, eq=False)
class Judged:
    """How sure answers were, and how far EGO agrees.

    Attributes:
        confidence: Raw `[n]`.
        agreement: In [0, 1] `[n]`.
        how: What agreement means.
        left_out: For each reason how many answers are not among them.
    """

    confidence: np.ndarray
    agreement: np.ndarray
    how: str
    left_out: dict[str, int]


def judged(
    suite: CortexSuite, domain: str, said: Sequence[Said], *, max_tokens: int = MAX_TOKENS
) -> Judged:
    """Let EGO judge answers; those that the domain's schema refuses are left out.

    Raises:
        ConchError: The suite has no EGO, or it is not there.
    """
    if suite.ego is None:
        raise ConchError(
            f"{domain} cannot be calibrated without EGO, whose agreement it is about: name one"
        )
    schema = suite.domain(domain).schema
    left_out = Counter[str]()
    if schema is not None:
        valid = [each for each in said if parse_answer(each.text, schema).valid]
        left_out[NOT_VALID] = len(said) - len(valid)
        said = valid
    agreement, how = agreement_with_ego(suite.ego, said, max_tokens=max_tokens)
    known = ~np.isnan(agreement)
    left_out["not to be read by EGO: no token of it counts, or it is too long"] = int(
        (~known).sum()
    )
    confidence = np.array([each.confidence for each in said], np.float64)
    reasons = {reason: count for reason, count in left_out.items() if count}
    return Judged(confidence[known], agreement[known], how, reasons)


def agreement_with_ego(
    ego: EgoModel, said: Sequence[Said], *, max_tokens: int = MAX_TOKENS
) -> tuple[np.ndarray, str]:
    """How far EGO agrees with each answer, and what that means.

    Args:
        ego: A local model reads the answers; an API answers the same prompts itself.
        said: The answers.
        max_tokens: Longest answer of an API.

    Returns:
        Shares `[n]` from 0 to 1, NaN where EGO cannot read an answer.

    Raises:
        EgoUnavailableError: EGO cannot be loaded or reached.
    """
    if ego.teaches == "text":
        from rapidfuzz.distance import Indel

        own = ego.generate_many([each.turns for each in said], max_tokens=max_tokens, temperature=0)
        alike = [
            Indel.normalized_similarity(each.text.strip(), answer.text.strip())
            for each, answer in zip(said, own, strict=True)
        ]
        return np.array(alike, np.float64), BY_TEXT
    agreement = np.full(len(said), np.nan)
    tokenizer = ego.source.tokenizer
    longest = ego.source.context_length or 2**31
    places, examples = [], []
    for place, each in enumerate(said):
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
        agreement[places] = scores.top1
    return agreement, BY_TOKENS


def read_by(tokenizer: Any, said: Said) -> Record:
    """A prompt and its answer as a model with that tokenizer would have been asked and answered."""
    more = {"finish_reason": said.finish_reason}
    if tokenizer.has_chat_template:
        turns = prompt_messages(tokenizer, said.turns, "")
        return {"messages": [*turns, {"role": "assistant", "content": said.text}], **more}
    return {"prompt": plain_prompt(said.turns, ""), "completion": said.text, **more}


def curves_of(
    confidence: np.ndarray, agreement: np.ndarray, calibration: Calibration
) -> dict[str, RiskCoverage]:
    """Risk and coverage of the answers that the calibration held out, raw and calibrated."""
    _, held = halves(len(confidence), seed=calibration.seed)
    sure = [calibration(share) for share in confidence[held]]
    return {
        "raw": risk_coverage(confidence[held], agreement[held]),
        "calibrated": risk_coverage(sure, agreement[held]),
    }


def calibrate_domain(
    suite: CortexSuite,
    domain: str,
    *,
    prompts: Sequence[Prompt] | None = None,
    data: Sequence[Record] | None = None,
    method: str = "isotonic",
    max_risk: float = 0.3,
    samples: int = 200,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
    report: Report = silent,
) -> tuple[Calibration, dict[str, Any]]:
    """Calibrate a neuron's confidence on held-out prompts; the suite uses it from then on.

    The neuron gives its first answer to each, greedily. `calibration.json` and
    `risk_coverage.png` go into the domain's folder. With a schema only valid answers count, since
    the others go to EGO however sure they are.

    Args:
        suite: With EGO, and an idle engine.
        domain: A neuron of it.
        prompts: That no version was trained on; those of the domain's held-out data where None.
        data: See `heldout_records`.
        method: See `calibrate`.
        max_risk: Likewise.
        samples: Most prompts, drawn by the seed where there are more.
        max_tokens: Longest answer.
        seed: Of the draw and of the split.
        report: Gets progress; see `conch_dna.progress.Progress`.

    Returns:
        The calibration, and what it stands on, as JSON can hold it: `prompts`, `answers`,
        `left_out` by reason, `agreement` and what it means, `area` under the risk-coverage curves
        of the held-out half (`raw`, `calibrated`, and `at_random`, the mean risk), and the `files`.

    Raises:
        ConchError: Too few answers can be judged, the prompts are not known, or there is no EGO.
    """
    if samples < MIN_ANSWERS:
        raise ConchError(f"samples is {samples}: {MIN_ANSWERS} or more are needed")
    digest = suite.bank.digest_of(suite.domain(domain).name)
    if prompts is None:
        records = heldout_records(suite.adapters_dir, domain, suite.source, data=data)
        system = suite.domain(domain).system
        prompts = heldout_prompts(records, suite.source.tokenizer, system, most=samples, seed=seed)
    else:
        prompts = chosen(prompts, samples, seed=seed)
    if len(prompts) < MIN_ANSWERS:
        raise ConchError(
            f"{domain} has {len(prompts)} held-out prompts, too few to calibrate on: give "
            f"{MIN_ANSWERS} or more that it was not trained on"
        )
    asked, left_out = asked_of(suite, domain, prompts, max_tokens=max_tokens)
    report("phase", {"name": f"{domain}: answers", "total": len(asked), "unit": "prompts"})
    said = answered(suite, asked, report=report)
    report("phase", {"name": f"{domain}: EGO reads them"})
    found = judged(suite, domain, said, max_tokens=max_tokens)
    left_out |= found.left_out
    for reason, count in left_out.items():
        report("warning", {"message": f"{count} of {len(prompts)} answers are left out: {reason}"})
    if len(found.agreement) < MIN_ANSWERS:
        why = "; ".join(f"{count} are {reason}" for reason, count in left_out.items())
        raise ConchError(
            f"of {len(prompts)} answers of {domain} {len(found.agreement)} can be judged, and "
            f"{MIN_ANSWERS} are needed: {why}"
        )
    assert suite.ego is not None
    calibration = calibrate(
        found.confidence,
        found.agreement,
        method=method,
        max_risk=max_risk,
        seed=seed,
        adapter_digest=digest,
        ego=suite.ego.model_id,
    )
    curves = curves_of(found.confidence, found.agreement, calibration)
    files = _saved(suite, domain, found, calibration, curves)
    suite.take_calibration(domain)
    _, held = halves(len(found.agreement), seed=seed)
    details = {
        "domain": domain,
        "prompts": len(prompts),
        "answers": len(found.agreement),
        "left_out": left_out,
        "agreement": {"mean": float(found.agreement.mean()), "means": found.how},
        "area": {name: curve.area for name, curve in curves.items()}
        | {"at_random": float(1 - found.agreement[held].mean())},
        "files": files,
    }
    return calibration, details


def _saved(
    suite: CortexSuite,
    domain: str,
    found: Judged,
    calibration: Calibration,
    curves: dict[str, RiskCoverage],
) -> list[str]:
    path = save_calibration(suite.adapters_dir, domain, calibration)
    _, held = halves(len(found.agreement), seed=calibration.seed)
    bins = max(1, min(10, len(held) // MIN_IN_A_BIN))
    right = found.agreement[held]
    sure = {
        "raw": found.confidence[held],
        "calibrated": np.array([calibration(share) for share in found.confidence[held]]),
    }
    picture = path.with_name(PICTURE_FILE)
    draw_risk_coverage(
        picture,
        curves,
        {name: reliability(values, right, bins=bins) for name, values in sure.items()},
        title=f"{domain}: {len(held)} held-out answers, EGO is {calibration.ego}",
    )
    return [str(path), str(picture)]
