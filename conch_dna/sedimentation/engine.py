"""AntigravityEngine: an embedding store that learns, each change judged by a gate.

Ties the parts of this wing together: store, student, teacher, log, versions and gate; knows no
formula. What a cycle learns is in cycles.py. To give users another action: a method here that
returns a result of results.py.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from conch_dna.checkpoints import FolderLock
from conch_dna.errors import ConchError
from conch_dna.screen.progress import Report, silent
from conch_dna.sedimentation.changes.chelation_log import ChelationLog
from conch_dna.sedimentation.changes.collapse import Neighbourhoods
from conch_dna.sedimentation.changes.cycles import (
    LearnedAdapter,
    NothingToLearn,
    adapter_from_log,
    adapter_from_teacher,
)
from conch_dna.sedimentation.changes.draws import account_of, draw_about, next_draw
from conch_dna.sedimentation.changes.forecast import Forecast, forecast
from conch_dna.sedimentation.changes.gate import add_to_history, decide, read_history
from conch_dna.sedimentation.changes.heldout_queries import Evidence, measures
from conch_dna.sedimentation.changes.teacher_distillation import (
    TeacherDistillationHelper,
    create_distillation_helper,
)
from conch_dna.sedimentation.changes.upgrades import upgraded
from conch_dna.sedimentation.changes.versions import OF_TEACHER, Versions, lasting
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.documents import DocumentId, read_documents
from conch_dna.sedimentation.embedders.contract import Embedder
from conch_dna.sedimentation.embedders.local import static_model
from conch_dna.sedimentation.embedders.open_embedder import open_embedder
from conch_dna.sedimentation.intake import Intake
from conch_dna.sedimentation.results import (
    ChangeResult,
    DeleteResult,
    InferenceResult,
    IngestResult,
)
from conch_dna.sedimentation.retrieval import FUSED, Judgements, WordFusion
from conch_dna.sedimentation.stores.contract import RAW, VectorStore
from conch_dna.sedimentation.stores.open_store import (
    LOG,
    TEACHER_VECTORS,
    VECTORS,
    VERSIONS,
    open_store,
    state_of,
)
from conch_dna.sedimentation.upkeep.deletion import delete, recovered

DEFAULT_STUDENT = "sentence-transformers/all-MiniLM-L6-v2"
# Documents of an ingest's first batch, and about how long a batch may take.
FIRST_BATCH = 8
DURABLE_S = 5.0


class AntigravityEngine:
    """Documents under a student's vectors, improved by an adapter that must prove itself.

    What its gate guarantees, and what not, stands in changes/gate.py.

    Args:
        qdrant_location: A folder (Qdrant Edge in this process), `http(s)://…` of a server, or
            ":memory:".
        model_name: The student; see `open_embedder`.
        training_mode: "baseline", "offline" or "hybrid"; None for the configuration's.
        teacher_model_name: One teacher or several; needed by the last two modes and by the
            asymmetric space.
        teacher_weight: None for the configuration's.
        config: Everything that is not named here; its defaults where None.
        teacher_weights: Of several teachers.
        fusion: "none" or "rrf"; None for the configuration's.
        state_folder: Where adapters, logs and caches of a server's store lie; a folder's lie in it.
        teacher_cache: Where the teacher's vectors are kept, which several engines may share; in the
            state folder where None.
        collection: Of a server.
        api_key: Of a server.
        device: Of the models; chosen where None.
        trust_remote_code: Let Python code that comes with a model run.

    Attributes:
        report: Gets the phases of a change and how far they are; see `progress.Progress`.
        recovered: A line for everything that opening put right after a killed process.

    Raises:
        ConchError: A setting is out of its range, a teacher is needed and not named, the store is
            another student's or in use, or a model cannot be loaded.
    """

    def __init__(
        self,
        qdrant_location: str | Path = "./db",
        model_name: str = DEFAULT_STUDENT,
        training_mode: str | None = None,
        teacher_model_name: str | Sequence[str] | None = None,
        teacher_weight: float | None = None,
        *,
        config: ChelationConfig | None = None,
        teacher_weights: Sequence[float] | None = None,
        fusion: str | None = None,
        state_folder: str | Path | None = None,
        teacher_cache: str | Path | None = None,
        collection: str = "documents",
        api_key: str | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.config = (config or ChelationConfig()).having(
            training_mode=training_mode, teacher_weight=teacher_weight, fusion=fusion
        )
        needs_teacher = self.config.training_mode != "baseline" or self.config.space != "symmetric"
        if needs_teacher and not teacher_model_name:
            raise ConchError(
                f"training_mode {self.config.training_mode} in the {self.config.space} space needs "
                "a teacher: give teacher_model_name"
            )
        self.report: Report = silent
        self._judged: Evidence | None = None
        with ExitStack() as opening:
            location = str(qdrant_location)
            opener = partial(
                open_embedder,
                device=device,
                batch_size=self.config.batch_size,
                trust_remote_code=trust_remote_code,
            )
            self.student: Embedder = opener(model_name)
            if location == ":memory:" and state_folder is None:
                state_folder = opening.enter_context(TemporaryDirectory())
            self.state = state_of(location, state_folder, collection)
            self.helper: TeacherDistillationHelper | None = None
            if needs_teacher:
                self.helper = create_distillation_helper(
                    teacher_model_name or "",
                    cache_dir=teacher_cache or self.state / TEACHER_VECTORS,
                    weights=teacher_weights,
                    device=device,
                    trust_remote_code=trust_remote_code,
                )
            # A model that is not there, and a server that is down, leave nothing behind.
            identity = {
                "student": lasting(self.student.name),
                "digest": self.student.digest,
                "dimension": self.student.dimension,
            }
            is_folder = location != ":memory:" and "://" not in location
            lock = FolderLock(self.state, elsewhere="give another qdrant_location or state_folder")
            if is_folder:
                opening.enter_context(lock)
            self.store: VectorStore = opening.enter_context(
                open_store(
                    str(self.state / VECTORS) if is_folder else location,
                    identity=identity,
                    collection=collection,
                    api_key=api_key,
                    exact_below=self.config.exact_below,
                )
            )
            if not is_folder:
                opening.enter_context(lock)
            self.log = ChelationLog(
                self.state / LOG,
                rotate_bytes=self.config.log_rotate_bytes,
                keep_queries=self.config.log_queries,
            )
            unfinished = recovered(self.store, self.log)
            folder, dimension = self.state / VERSIONS, self.student.dimension
            self.versions = Versions(self.store, folder, dimension, self.student, opener)
            self._neighbourhoods = Neighbourhoods(
                self.store, self.log, self.config, self.state, self.student.digest
            )
            self._fusion = WordFusion(self.store, self.config.rrf_k, self.config.fusion_share)
            self.recovered = [*self.log.recovered, *unfinished, *self.versions.recovered]
            self._open = opening.pop_all()

    def close(self) -> None:
        """Give the store and its lock back; a second call does nothing."""
        self._open.close()

    def __enter__(self) -> "AntigravityEngine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Documents

    def ingest(self, documents: Iterable[Any], *, replace_changed: bool = False) -> IngestResult:
        """Take documents in, a batch at a time; each batch is durable when the next one begins.

        What is there already with the same text is not embedded again, so that an ingest that was
        stopped goes on when it is called once more.

        Args:
            documents: See `read_documents`; any iterable, of any length.
            replace_changed: Let a document with a known id and another text replace the old one.

        Raises:
            ConchError: A document is none, or a known id comes with another text.
        """
        began = time.perf_counter()
        intake = Intake(self.versions, self.student, self._teacher, replace_changed)
        source = read_documents(documents)
        size = min(FIRST_BATCH, self.config.batch_size)
        while part := list(islice(source, size)):
            started = time.perf_counter()
            intake.take_in(part)
            # Where a model is slow, what it did is durable after seconds all the same.
            each = (time.perf_counter() - started) / len(part)
            size = max(1, min(self.config.batch_size, int(DURABLE_S / max(each, 1e-9))))
        if intake.counts["added"] or intake.counts["updated"]:
            self.store.index()
        return IngestResult(
            **intake.counts,
            errors=intake.errors,
            documents=self.store.count(RAW),
            seconds=time.perf_counter() - began,
            embedding_seconds=intake.embedding_seconds,
        )

    def delete(self, ids: Sequence[DocumentId]) -> DeleteResult:
        """Forget documents, their vectors of every version, and the logged events that name them.

        Durable when it returns; what a kill cuts off, the next opening finishes. What adapters
        learned from them stays, as do a teacher's cached vectors, which are kept by their text.

        Args:
            ids: As they were given at ingest; 1 and "1" are two documents.

        Raises:
            ConchError: Some are not in the store; the message names them, and none is deleted.
        """
        return delete(self.store, self.log, ids)

    def _teacher(self) -> TeacherDistillationHelper:
        if self.helper is None:
            raise ConchError(
                "documents of a version carry a teacher's vectors: open the store with it and the "
                "asymmetric space (--teacher MODEL --space asymmetric)"
            )
        return self.helper

    # Queries

    def run_inference(
        self, query: str, top_k: int | None = None, *, where: Mapping[str, Any] | None = None
    ) -> InferenceResult:
        """The documents nearest to a query; a collapsed neighbourhood is logged.

        Args:
            query: A text.
            top_k: How many; None for the configuration's.
            where: Payload fields and the value, or list of values, that they must have.

        Raises:
            ConchError: The query has no text, or top_k is below 1.
        """
        return self.run_inferences([query], top_k, where=where)[0]

    def run_inferences(
        self,
        queries: Sequence[str],
        top_k: int | None = None,
        *,
        where: Mapping[str, Any] | None = None,
    ) -> list[InferenceResult]:
        """`run_inference` for several queries at once."""
        top_k = self.config.top_k if top_k is None else top_k
        if top_k < 1:
            raise ConchError(f"top_k is {top_k}: it must be 1 or more")
        if empty := [number for number, each in enumerate(queries, 1) if not each.strip()]:
            raise ConchError(f"query {empty[0]} is only white space: give it words")
        if not queries:
            return []
        version = self.versions.active
        vectors = self.versions.embed([version], queries, queries=True, what="queries")[version]
        fused = self.config.fusion == "rrf"
        wanted = max(top_k, self.config.top_k, FUSED if fused else 0)
        hits = self.store.search(vectors, version=version, top_k=wanted, where=where)
        crowding: list[tuple[float | None, bool | None]] = [(None, None)] * len(hits)
        if not where:
            crowding = self._neighbourhoods.measure(queries, hits, version)
        results = []
        for query, row, (dispersion, collapsed) in zip(queries, hits, crowding, strict=True):
            best = self._fusion.fused(query, row, top_k, where) if fused else row
            results.append(
                InferenceResult(
                    ids=best.ids[:top_k],
                    scores=best.scores[:top_k].tolist(),
                    payloads=best.payloads[:top_k],
                    version=version,
                    dispersion=dispersion,
                    collapsed=collapsed,
                )
            )
        return results

    # Changes

    def set_judgements(self, queries: Mapping[str, str], judgements: Judgements) -> None:
        """Give held-out queries with judgements to the gate, in place of pseudo-queries.

        They judge every change anew, so that after many its confidence is less than it says.

        Args:
            queries: Name to text; none of them may be asked in a cycle.
            judgements: Name to grades of documents.

        Raises:
            ConchError: No query has a relevant document.
        """
        self._judged = Evidence.judged(queries, judgements)

    def run_sedimentation_cycle(
        self,
        threshold: int | None = None,
        learning_rate: float | None = None,
        epochs: int | None = None,
    ) -> ChangeResult:
        """Learn from the documents that were logged in collapsed neighbourhoods often enough.

        Args:
            threshold: How often; None for the configuration's, as the others.
            learning_rate: Of the residual adapter.
            epochs: Most passes over the pairs.

        Raises:
            ConchError: A setting is out of its range.
        """
        config = self.config.having(threshold=threshold, learning_rate=learning_rate, epochs=epochs)
        learn = partial(adapter_from_log, self.versions, self.log, self.helper, config)
        return self._change("cycle", learn)

    def run_offline_distillation(
        self,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        epochs: int | None = None,
    ) -> ChangeResult:
        """Learn from a teacher's vectors of all documents.

        Args:
            batch_size: Pairs of a step; None for the configuration's, as the others.
            learning_rate: Of a residual adapter; linear ones are solved.
            epochs: Most passes over the pairs of a residual adapter.

        Raises:
            ConchError: There is no teacher, a setting is out of its range, or `train_student` is
                set and the student is not a static one.
        """
        if self.helper is None:
            raise ConchError(
                "offline distillation needs a teacher: name one (--teacher, teacher_model_name) "
                "and the mode offline or hybrid"
            )
        config = self.config.having(
            batch_size=batch_size, offline_learning_rate=learning_rate, offline_epochs=epochs
        )
        learn = partial(
            adapter_from_teacher,
            self.store,
            self.helper,
            config,
            trained=static_model(self.student) if config.train_student else None,
            report=self.report,
        )
        return self._change("distillation", learn)

    def forecast_upgrade(self, sample: int, questions: int, price: float = 0.0) -> Forecast:
        """What the teacher would be worth as the model of queries; see `changes.forecast`.

        Raises:
            ConchError: See `forecast` there.
        """
        helper, seed = self._teacher(), self.config.seed
        asked = next_draw(self.store, (), sample=questions, judged=self._judged)
        how: dict[str, Any] = {"sample": sample, "price": price, "report": self.report}
        asked = asked.sampled(questions, seed=seed)
        return forecast(self.versions, helper, asked, seed=seed, **how)

    def run_upgrade(self, way: str, sample: int) -> ChangeResult:
        """Let the teacher be the model that queries go to; see `changes.upgrades.upgraded`.

        Raises:
            ConchError: There is no teacher, there are several, or one cannot be used.
        """
        learn = partial(upgraded, self.versions, self._teacher(), way, sample=sample)
        return self._change(way, partial(learn, seed=self.config.seed, report=self.report))

    def _change(self, kind: str, learn: Callable[..., LearnedAdapter]) -> ChangeResult:
        """Learn an adapter, build its version, let the gate decide, and activate or drop it."""
        documents, active = self.store.count(RAW), self.versions.active
        if not documents:
            raise ConchError("the store is empty: ingest documents first")
        self.versions.require(active, self.helper.teacher if self.helper else None)
        about: dict[str, Any] = {"kind": kind, "mode": self.config.training_mode}
        seconds: dict[str, float] = {}
        began = time.perf_counter()

        def lap(stage: str) -> None:
            nonlocal began
            seconds[stage] = time.perf_counter() - began
            began = time.perf_counter()

        history, sample = self.gate_history(), self.config.gate_queries
        evidence = next_draw(self.store, history, sample=sample, judged=self._judged)
        questions = account_of(evidence, history)
        lap("queries")
        try:
            learned = learn(without=evidence.holds_out)
        except NothingToLearn as reason:
            return ChangeResult(
                **about, activated=False, version=active, candidate=None, reason=str(reason)
            )
        lap("fit")
        name = self.versions.next_name(entry["candidate"] for entry in history)
        origin = {
            **learned.origin,
            **about,
            "student": self.student.name,
            "student_digest": self.student.digest,
            "config": self.config.to_json(),
        }
        of_teacher = origin["documents"] == OF_TEACHER
        embed = self._teacher().embed if of_teacher else learned.embed
        self.report("phase", {"name": "rewriting", "total": documents, "unit": "documents"})
        how: dict[str, Any] = {"student": learned.student, "embed": embed, "change": learned.change}
        self.versions.build(name, learned.adapter, origin, **how, report=self.report)
        lap("rewrite")
        self.report("phase", {"name": "asking held-out queries", "total": 0, "unit": ""})
        against = list(dict.fromkeys([active, RAW]))
        found = measures(self.versions, evidence, [*against, name], self.helper)
        decision = decide(found, self.config, against=against)
        lap("gate")
        # The history first: what is active without an entry would have no reason.
        about["candidate"] = name
        entry = {**about, "against": active, "documents": documents, "questions": questions}
        entry |= decision.to_json()
        add_to_history(self.state, entry)
        if decision.passed:
            self.versions.activate(name)
            self.store.index()
        else:
            self.versions.drop(name)
        lap("activation")
        return ChangeResult(
            **about,
            activated=decision.passed,
            version=self.versions.active,
            reason=decision.reason,
            figures=decision.figures,
            questions=questions,
            documents=learned.documents,
            fit=dict(learned.adapter.figures),
            steps=learned.steps,
            reasons=[*filter(None, [questions["note"]]), *learned.reasons],
            seconds=seconds,
        )

    def gate_history(self) -> list[dict[str, Any]]:
        """Every decision of the gate, oldest first."""
        return read_history(self.state)

    def held_out_quality(self) -> dict[str, float]:
        """The active version's figures on the queries that last judged it, as the history has them.

        Returns:
            Means over the queries, by the measure's name; none where there are no queries.

        Raises:
            ConchError: A query or the rest of its document cannot be embedded.
        """
        active, sample = self.versions.active, self.config.gate_queries
        evidence = draw_about(
            self.store, self.gate_history(), active, sample=sample, judged=self._judged
        )
        quality = measures(self.versions, evidence, (active,), self.helper)
        return {name: float(figures.mean()) for name, (figures,) in quality.items()}

    def rollback(self) -> str:
        """Let the version before the active one answer again.

        Returns:
            Its name.

        Raises:
            ConchError: There is none.
        """
        return self.versions.rollback()
