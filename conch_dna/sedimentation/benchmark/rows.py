"""The rows of a benchmark: every mode on a copy of one store, beside control and ceiling.

Knows a collection, engines and their stages; nothing of files of results or of the command line.
To compare another mode: a method of `Benchmark` that calls `_add`, and its call in `run`.
"""

import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.checkpoints import content_digest, provenance
from conch_dna.errors import ConchError
from conch_dna.metrics import paired_interval
from conch_dna.options.fields import option, option_problem
from conch_dna.screen.progress import Report, silent
from conch_dna.sedimentation.benchmark.collections import Collection
from conch_dna.sedimentation.benchmark.stages import (
    QUERY_EMBEDDING,
    answers,
    fused_rankings,
    run_training_cycle,
    split_queries,
)
from conch_dna.sedimentation.changes.heldout_queries import Evidence, teacher_rankings
from conch_dna.sedimentation.changes.teacher_distillation import (
    TeacherDistillationHelper,
    create_distillation_helper,
)
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.documents import DocumentId
from conch_dna.sedimentation.embedders.local import static_model
from conch_dna.sedimentation.engine import AntigravityEngine
from conch_dna.sedimentation.results import ChangeResult
from conch_dna.sedimentation.retrieval import RECALL_AT, Evaluation, word_index

CONTROL, TEACHER, WORDS = "student untouched (control)", "teacher (ceiling)", "BM25"
MODES = {"baseline": "baseline", "hybrid": "hybrid", "offline": "offline symmetric"}
# Folder of the store that the others are copies of.
UNTOUCHED = "untouched"
SWEPT = tuple(tenth / 10 for tenth in range(1, 11))
CONFIDENCE = 0.95
FIGURES = {"ndcg_at_10": "ndcg", "recall_at_100": "recall"}


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """What is compared.

    Attributes:
        student: A name as `open_embedder` takes it.
        teacher: One or several such names.
        teacher_shares: Weights of several, in their order; the same for all where None.
        cycles: Of each mode, 1 or more.
        queries_per_cycle: Asked before each, 1 or more.
        sweep: Whether the offline symmetric mode is run with every teacher_weight of SWEPT.
        config: Of every engine, but for training_mode and space; its seed splits the queries too.
        teacher_cache: Where the teacher's vectors stay for another run; gone with this where None.
        device: Of the models; chosen where None.
        trust_remote_code: Let Python code that comes with a model run.

    Raises:
        ConchError: A number is out of its range.
    """

    student: str
    teacher: Sequence[str]
    teacher_shares: Sequence[float] | None = None
    cycles: int = option(3, "Cycles of each training mode.", low=1)
    queries_per_cycle: int = option(
        50,
        "Judged queries asked before each cycle, which are never evaluated: at most half of them "
        "in all.",
        low=1,
    )
    sweep: bool = False
    config: ChelationConfig = field(default_factory=ChelationConfig)
    teacher_cache: str | None = None
    device: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        limited = [each for each in fields(self) if "help" in each.metadata]
        checked = [option_problem(each, getattr(self, each.name)) for each in limited]
        problems = [problem for problem in checked if problem is not None]
        shares = self.teacher_shares
        if shares is not None and len(shares) != len(self.teacher):
            problems.append(f"{len(shares)} shares do not fit {len(self.teacher)} teachers")
        if not self.config.teacher_weight:
            problems.append(
                "teacher_weight is 0: the teacher would teach nothing, and the control is that "
                "row; give a weight up to 1"
            )
        if problems:
            raise ConchError("; ".join(problems))


def peak_memory_bytes() -> int:
    """The most memory this process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux KiB.
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(eq=False, kw_only=True)
class Benchmark:
    """One run over one collection; `run` measures, `document` holds what was measured so far.

    Attributes:
        collection: Its corpus is ingested whole, its judged queries are divided.
        settings: What is compared.
        folder: An empty one for the stores.
        save: Gets `document` after every row, so that what was measured outlives what comes.
        report: Gets events, see `progress.Progress`.
        rows: What was measured so far.

    Raises:
        ConchError: The queries cannot be divided as asked; see `split_queries`.
    """

    collection: Collection
    settings: ComparisonSettings
    folder: Path
    save: Callable[[dict[str, Any]], None]
    report: Report = silent
    rows: list[dict[str, Any]] = field(default_factory=list, init=False)
    _control: Evaluation | None = field(default=None, init=False)
    _words: list[list[DocumentId]] = field(default_factory=list, init=False)
    # Rankings of the student's rows, of which the best is fused.
    _dense: dict[str, list[list[DocumentId]]] = field(default_factory=dict, init=False)
    _models: dict[str, Any] = field(default_factory=dict, init=False)
    _is_static: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        settings, seed = self.settings, self.settings.config.seed
        each, cache = settings.queries_per_cycle, settings.teacher_cache
        self.split = split_queries(
            self.collection, cycles=settings.cycles, queries_per_cycle=each, seed=seed
        )
        self.evidence = Evidence.judged(self.split.evaluated, self.collection.judgements)
        self._cache = Path(cache).expanduser() if cache else self.folder / "teacher_vectors"

    def run(self) -> dict[str, Any]:
        """Measure every row.

        Raises:
            ConchError: A model cannot be used, or a document or query cannot be taken.
        """
        self._untouched()
        for mode in MODES:
            self._cycles(mode)
        self._distilled("asymmetric", space="asymmetric")
        if self._is_static:
            self._distilled("own table", train_student=True)
            self._distilled("own table, asymmetric", space="asymmetric", train_student=True)
        if self.settings.sweep:
            for weight in SWEPT:
                name = f"offline symmetric, teacher_weight {weight:g}"
                self._distilled(name, teacher_weight=weight)
        self._fusion()
        return self.document(complete=True)

    def document(self, *, complete: bool = False) -> dict[str, Any]:
        """What was measured so far, for JSON.

        Args:
            complete: Whether that is all.
        """
        collection, split = self.collection, self.split
        return {
            "task": collection.name,
            "complete": complete,
            "config": {
                **{name: value for name, value in vars(self.settings).items() if name != "config"},
                "teacher": list(self.settings.teacher),
                "engine": self.settings.config.to_json(),
                "confidence": CONFIDENCE,
            },
            **provenance(),
            "processors": os.cpu_count(),
            "models": self._models,
            "corpus": {
                "documents": len(collection.documents),
                "empty_left_out": collection.empty,
                "judgements_outside": collection.outside,
                "digest": self._corpus_digest,
            },
            "queries": {
                "cycles": split.cycles,
                "evaluated": list(split.evaluated),
                "repeated_left_out": split.repeated,
            },
            "rows": self.rows,
        }

    @cached_property
    def _corpus_digest(self) -> str:
        rows = self.collection.documents
        return content_digest(*(each[part] for each in rows for part in ("id", "title", "text")))

    def _untouched(self) -> None:
        """The store that all modes begin with: control, teacher and words."""
        seconds: dict[str, float] = {"ingest": 0.0, "embedding": 0.0}
        errors: dict[DocumentId, str] = {}
        with self._engine(UNTOUCHED) as engine:
            # What an earlier run left must not pass for this one's.
            self.save(self.document())
            total = len(self.collection.documents)
            self.report("phase", {"name": "ingest", "total": total, "unit": "documents"})
            source = iter(self.collection.documents)
            while part := list(islice(source, engine.config.batch_size)):
                result = engine.ingest(part)
                seconds["ingest"] += result.seconds
                seconds["embedding"] += result.embedding_seconds
                errors |= result.errors
                self.report("advance", {"by": len(part)})
            with suppress(ConchError):
                self._is_static = static_model(engine.student) is not None
            identity = dict(engine.store.identity)
            self._models["student"] = {"name": identity.pop("student"), **identity}
            failed = {"not_embedded": {str(each): why for each, why in errors.items()}}
            self._answered(CONTROL, engine, seconds, failed)
            self._ceiling(engine)
            self._bm25(engine)

    def _ceiling(self, engine: AntigravityEngine) -> None:
        self.report("phase", {"name": TEACHER})
        helper = self._helper(self._cache)
        teacher = helper.teacher
        began = time.perf_counter()
        rankings = teacher_rankings(engine.store, helper, self.evidence.texts, top_k=RECALL_AT)
        seconds = {"documents_and_search": time.perf_counter() - began}
        # Without the cache, and with the model in memory: what a query really costs.
        plain = self._helper(None)
        plain.load_teacher_model()
        plain.embed(self.evidence.texts[:1], queries=True)
        began = time.perf_counter()
        plain.embed(self.evidence.texts, queries=True)
        seconds[QUERY_EMBEDDING] = time.perf_counter() - began
        self._models["teacher"] = {
            "names": list(self.settings.teacher),
            "digest": teacher.digest,
            "dimension": teacher.dimension,
        }
        self._add(TEACHER, rankings, seconds)

    def _helper(self, cache: Path | None) -> TeacherDistillationHelper:
        return create_distillation_helper(
            self.settings.teacher,
            cache_dir=cache,
            weights=self.settings.teacher_shares,
            device=self.settings.device,
            trust_remote_code=self.settings.trust_remote_code,
        )

    def _bm25(self, engine: AntigravityEngine) -> None:
        began = time.perf_counter()
        words = word_index(engine.store)
        indexed = time.perf_counter()
        self._words = words.rankings(self.evidence.texts)
        seconds = {"index": indexed - began, "search": time.perf_counter() - indexed}
        self._add(WORDS, self._words, seconds)

    def _cycles(self, mode: str) -> None:
        with self._engine(mode, training_mode=mode) as engine:
            for number, names in enumerate(self.split.cycles, 1):
                name = f"{MODES[mode]}, cycle {number}"
                self.report("phase", {"name": name})
                began = time.perf_counter()
                change = run_training_cycle(engine, [self.split.texts[each] for each in names])
                self._changed(name, engine, change, {"cycle": time.perf_counter() - began})

    def _distilled(self, name: str, **changes: Any) -> None:
        self.report("phase", {"name": name})
        with self._engine("distilled", training_mode="offline", **changes) as engine:
            self._changed(name, engine, engine.run_offline_distillation(), {})

    def _changed(
        self,
        name: str,
        engine: AntigravityEngine,
        change: ChangeResult,
        seconds: Mapping[str, float],
    ) -> None:
        """A row of what an engine answers after a change, with what the change came to."""
        more = asdict(change)
        more |= {"gate": more.pop("figures"), "space": engine.config.space}
        more["teacher_weight"] = engine.config.teacher_weight
        self._answered(name, engine, {**seconds, **more.pop("seconds")}, more)

    def _answered(
        self,
        name: str,
        engine: AntigravityEngine,
        seconds: Mapping[str, float],
        more: Mapping[str, Any],
    ) -> None:
        """A row of what an engine's active version answers to the evaluated queries."""
        self._dense[name], taken = answers(engine, self.evidence.texts)
        self._add(name, self._dense[name], {**seconds, **taken}, more)

    def _fusion(self) -> None:
        figures = {row["name"]: row["ndcg_at_10"] for row in self.rows}
        best = max(self._dense, key=lambda name: figures[name])
        began = time.perf_counter()
        rankings = fused_rankings(self._dense[best], self._words, self.settings.config)
        seconds = {"fusion": time.perf_counter() - began}
        # The choice saw the queries that it is judged by; whoever reads the figure must know.
        more = {"fused": [best, WORDS], "chosen_on_evaluated_queries": True}
        self._add("fusion of the best student row and BM25", rankings, seconds, more)

    @contextmanager
    def _engine(self, name: str, **changes: Any) -> Iterator[AntigravityEngine]:
        """An engine whose settings are changed, on a copy of the untouched store, gone after it."""
        settings, place = self.settings, self.folder / name
        if name != UNTOUCHED:
            shutil.copytree(self.folder / UNTOUCHED, place)
        modes: dict[str, Any] = {"training_mode": "baseline", "space": "symmetric"}
        modes |= {"fusion": "none", "train_student": False}
        with AntigravityEngine(
            place,
            settings.student,
            teacher_model_name=settings.teacher,
            config=replace(settings.config, **{**modes, **changes}),
            teacher_weights=settings.teacher_shares,
            teacher_cache=self._cache,
            device=settings.device,
            trust_remote_code=settings.trust_remote_code,
        ) as engine:
            yield engine
        if name != UNTOUCHED:
            shutil.rmtree(place)

    def _add(
        self,
        name: str,
        rankings: Sequence[Sequence[DocumentId]],
        seconds: Mapping[str, float],
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """A row: figures of rankings, and intervals of the difference to the control."""
        own = self.evidence.evaluate(rankings)
        self._control = control = self._control or own
        row: dict[str, Any] = {"name": name, **own.to_json()}
        seed = self.settings.config.seed
        row["against_control"] = {
            figure: _difference(getattr(own, part), getattr(control, part), seed)
            for figure, part in FIGURES.items()
        }
        lowest = float(control.ndcg.mean())
        ceiling = next((each["ndcg_at_10"] for each in self.rows if each["name"] == TEACHER), None)
        row["gap_closed"] = None
        if ceiling is not None and ceiling > lowest:
            row["gap_closed"] = (row["ndcg_at_10"] - lowest) / (ceiling - lowest)
        if QUERY_EMBEDDING in seconds:
            row["milliseconds_per_query"] = 1000 * seconds[QUERY_EMBEDDING] / len(own.queries)
        row |= {**(more or {}), "seconds": dict(seconds), "peak_memory_bytes": peak_memory_bytes()}
        self.rows.append(row)
        self.report("message", {"message": f"{name}: nDCG@10 {row['ndcg_at_10']:.4f}"})
        self.save(self.document())


def _difference(own: np.ndarray, control: np.ndarray, seed: int) -> dict[str, Any]:
    low, high = paired_interval(own, control, confidence=CONFIDENCE, seed=seed)
    return {"difference": float((own - control).mean()), "interval": [low, high]}
