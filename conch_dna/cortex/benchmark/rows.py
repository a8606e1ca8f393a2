"""What a domain's adapter is worth: the student without it, with it, and EGO, measured.

Knows a suite of neurons, EGO and held-out records; nothing of tables, files or the command line.
To measure another figure: a key of the rows here, and a column in report.py.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from conch_dna.cortex.calibration.calibrating import (
    NeuronAnswer,
    Question,
    agreement_of,
    answers_to,
    questions_of,
)
from conch_dna.cortex.calibration.confidence import Calibration, TooFewAnswersError
from conch_dna.cortex.calibration.heldout import chosen, heldout_prompts, heldout_records
from conch_dna.cortex.calibration.settings import AdapterBenchmarkSettings
from conch_dna.cortex.neuron import CortexSuite
from conch_dna.ego.model import EgoModel
from conch_dna.errors import ConchError
from conch_dna.language_model import LanguageModel
from conch_dna.metrics import TokenMetrics, closed_gap
from conch_dna.retraining.domain import distillation_settings
from conch_dna.screen.progress import Report, silent
from conch_dna.training.batches import sequential_batches
from conch_dna.training.data.examples import Examples
from conch_dna.training.data.records import Record
from conch_dna.training.evaluation import heldout_metrics, teacher_metrics
from conch_dna.training.structured_answers import parse_answer

STUDENT, ADAPTER, EGO = "student", "adapter", "EGO"
ROWS = (STUDENT, ADAPTER, EGO)
AN_API = "EGO is an API, which gives no distributions: nothing to take a KL of"


class DomainBenchmark:
    """The three rows of one domain.

    Args:
        suite: With EGO, and an idle engine.
        domain: A neuron of it.
        settings: How to measure.
        data: Records that no version was trained on; what the domain held out where None.
        report: Gets progress; see `conch_dna.screen.progress.Progress`.

    Raises:
        ConchError: There is no EGO, or what was held out is not known.
    """

    def __init__(
        self,
        suite: CortexSuite,
        domain: str,
        settings: AdapterBenchmarkSettings,
        *,
        data: Sequence[Record] | None = None,
        report: Report = silent,
    ) -> None:
        if suite.ego is None:
            raise ConchError("a benchmark compares with EGO: name one")
        self.suite = suite
        self.ego: EgoModel = suite.ego
        self.domain = suite.domain(domain)
        self.settings = settings
        self.report = report
        self.notes: list[str] = []
        records = heldout_records(suite.adapters_dir, domain) if data is None else data
        self.prompts = heldout_prompts(
            records,
            suite.source.tokenizer,
            self.domain.system,
            most=settings.samples,
            seed=settings.seed,
        )
        self.records = chosen(records, settings.samples, seed=settings.seed)
        if not self.prompts:
            raise ConchError(f"{domain} held out nothing that could be asked: give other data")

    def run(self) -> dict[str, Any]:
        """Measure; what comes back is a domain's part of what `run_benchmark` gives."""
        rows: dict[str, dict[str, Any]] = {}
        answers: dict[str, list[NeuronAnswer]] = {}
        if self.ego.teaches == "distributions":
            # What the student's rows take must not count EGO.
            self.ego.unload()
        for name in (STUDENT, ADAPTER):
            answers[name], rows[name] = self._answers(with_adapter=name == ADAPTER)
        turns = [each.turns for each in answers[ADAPTER]]
        rows[EGO] = self._ego_answers(turns)
        for name in (STUDENT, ADAPTER):
            self._phase(f"EGO reads the answers of the {name}")
            rows[name] |= self._confidence(name, answers[name])
        heldout = self._distributions()
        for name, figures in heldout.pop("rows").items():
            rows[name]["heldout"] = figures
        return {
            "adapter": str(self.suite.folder(self.domain.name)),
            "adapter_digest": self.suite.bank.digest_of(self.domain.name),
            "prompts": len(turns),
            **heldout,
            "rows": {name: rows[name] for name in ROWS},
            "notes": self.notes,
        }

    # Answers, and how fast they come.

    def _answers(self, *, with_adapter: bool) -> tuple[list[NeuronAnswer], dict[str, Any]]:
        suite, name = self.suite, ADAPTER if with_adapter else STUDENT
        questions, left_out = questions_of(
            suite,
            self.domain.name,
            self.prompts,
            max_tokens=self.settings.max_tokens,
            with_adapter=with_adapter,
        )
        self._left_out(name, left_out)
        if not questions:
            raise ConchError(
                f"no held-out prompt of {self.domain.name} fits into the student's context"
            )
        mx.reset_peak_memory()
        first = [self._first_token(each) for each in questions[: self.settings.alone]]
        self._phase(f"answers of the {name}", len(questions), "prompts")
        start = time.perf_counter()
        answers = answers_to(suite, questions, report=self.report)
        seconds = time.perf_counter() - start
        tokens = sum(len(each.log_probs) for each in answers)
        speed = self._speed([each.text for each in answers], tokens, seconds, first)
        own = suite.bank.bytes_of(self.domain.name) if with_adapter else 0
        return answers, {**speed, "bytes": suite.bank.base_bytes + own, "adapter_bytes": own}

    def _first_token(self, question: Question) -> float:
        start = time.perf_counter()
        uid = self.suite.engine.submit(question.request)
        while not self.suite.engine.step():
            pass
        seconds = time.perf_counter() - start
        self.suite.engine.cancel(uid)
        return seconds

    def _ego_answers(self, turns: Sequence[list[dict[str, str]]]) -> dict[str, Any]:
        ego, limit = self.ego, self.settings.max_tokens
        ego.load()
        mx.reset_peak_memory()
        first = []
        for each in turns[: self.settings.alone]:
            start = time.perf_counter()
            stream = ego.stream(each, max_tokens=limit, temperature=0)
            next(iter(stream), "")
            first.append(time.perf_counter() - start)
            del stream
        self._phase("EGO's answers", len(turns), "prompts")
        start = time.perf_counter()
        answers = ego.generate_many(turns, max_tokens=limit, temperature=0)
        seconds = time.perf_counter() - start
        counts = [answer.tokens for answer in answers if answer.tokens is not None]
        tokens = sum(counts) if len(counts) == len(answers) else None
        local = ego.teaches == "distributions"
        weights = ego.source.weight_bytes if local else None
        speed = self._speed([answer.text for answer in answers], tokens, seconds, first)
        if not local:
            # Nothing of what an API takes is here.
            speed["peak_bytes"] = None
        return {**speed, "bytes": weights, "adapter_bytes": 0}

    def _speed(
        self, texts: Sequence[str], tokens: int | None, seconds: float, first: Sequence[float]
    ) -> dict[str, Any]:
        schema = self.domain.schema
        valid = None
        if schema is not None:
            valid = statistics.fmean(parse_answer(text, schema).valid for text in texts)
        return {
            "valid_share": valid,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds if tokens is not None else None,
            # The very first one also compiles.
            "first_token_s": statistics.median(first),
            "peak_bytes": mx.get_peak_memory(),
        }

    # Confidence, and what goes to EGO.

    def _confidence(self, name: str, answers: Sequence[NeuronAnswer]) -> dict[str, Any]:
        agreement = agreement_of(
            self.suite, self.domain.name, answers, max_tokens=self.settings.max_tokens
        )
        self._left_out(name, agreement.left_out)
        count = len(agreement.shares)
        figures: dict[str, Any] = {
            "agreement": float(agreement.shares.mean()) if count else None,
            "agreement_means": agreement.meaning,
            "calibration": None,
            "hand_over_share": None,
            "risk_coverage": None,
        }
        digest = self.suite.bank.digest_of(self.domain.name) if name == ADAPTER else ""
        try:
            calibration = agreement.fitted(
                self.settings, adapter_digest=digest, ego=self.ego.model_id
            )
        except TooFewAnswersError as error:
            self.notes.append(f"{name}: not calibrated: {error}")
            return figures
        curves = agreement.curves(calibration)
        return figures | {
            "calibration": _figures_of(calibration),
            # What is not valid goes to EGO too.
            "hand_over_share": 1 - calibration.coverage * count / len(answers),
            "risk_coverage": {key: asdict(curve) for key, curve in curves.items()},
        }

    # Distributions.

    def _distributions(self) -> dict[str, Any]:
        """Held-out figures of the three, by EGO's own targets."""
        if self.ego.teaches == "text":
            self.notes.append(AN_API)
            return {
                "rows": dict.fromkeys(ROWS),
                "heldout_records": 0,
                "alignment": None,
                "gap_closed": None,
            }
        suite, source = self.suite, self.ego.source
        # The settings of the distillation say how texts are cut and compared.
        settings = distillation_settings(suite.adapters_dir, self.domain.name)
        config = replace(settings, too_long="skip")
        maker = Examples(source, suite.source, config, report=self.report)
        _, examples = maker.make(self.records)
        self._phase("EGO's distributions", sum(each.count for each in examples), "tokens")
        with tempfile.TemporaryDirectory(prefix="conch-benchmark-") as folder:
            targets = maker.targets(Path(folder))
            targets.fill(source, examples, batch_size=config.batch_size)
            rows: dict[str, TokenMetrics] = {}
            for name, adapter in ((STUDENT, None), (ADAPTER, self.domain.name)):
                self._phase(f"distributions of the {name}")
                batches = (
                    targets.evaluation_batch([examples[index] for index in indices])
                    for indices in sequential_batches(examples, config.batch_size)
                )
                model = LanguageModel(suite.source, suite.bank.tree(adapter))
                rows[name] = heldout_metrics(model, batches, memory=config.loss_memory)
            rows[EGO] = teacher_metrics(examples, targets)
        figures = {name: metrics.to_json() for name, metrics in rows.items()}
        return {
            "rows": figures,
            "heldout_records": len(examples),
            "alignment": maker.alignment,
            "gap_closed": closed_gap(figures[STUDENT], figures[ADAPTER]),
        }

    def _left_out(self, name: str, reasons: dict[str, int]) -> None:
        self.notes += [f"{name}: {count} answers left out: {why}" for why, count in reasons.items()]

    def _phase(self, name: str, total: int = 0, unit: str = "") -> None:
        text = f"{self.domain.name}: {name}"
        self.report("phase", {"name": text, "total": total, "unit": unit})


def _figures_of(calibration: Calibration) -> dict[str, Any]:
    names = ("method", "threshold", "max_risk", "coverage", "risk", "ece_before", "ece_after")
    whole = calibration.to_json()
    return {name: whole[name] for name in (*names, "n_fit", "n_held", "seed")}
