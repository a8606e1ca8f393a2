"""Targets from a teacher: its cached vectors, what texts become by them, and if it fails.

Knows embedders, their cache and the alignment; nothing of stores, gates or training.
`targets_with_fallback` is the one place where a failure is gone on from, so each is logged with
its reason and counted in the result. To add a step there: its name in STEPS, in its order, and a
branch in the function.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.sedimentation.adapters.adapter import EmbeddingAdapter
from conch_dna.sedimentation.adapters.teacher_alignment import (
    aligned,
    check_weight,
    compute_alignment_metric,
    generate_hybrid_targets,
    rows_of,
)
from conch_dna.sedimentation.embedders.contract import Embedded, Embedder, unit
from conch_dna.sedimentation.embedders.open_embedder import open_embedder
from conch_dna.sedimentation.embedders.teachers import CachedEmbedder, TeacherEnsemble

logger = logging.getLogger(__name__)
# What a target was made of, best first.
STEPS = ("teacher", "homeostatic", "unchanged", "skipped")


@dataclass(frozen=True, kw_only=True)
class DimensionCheck:
    """How a student's dimension and a teacher's go together.

    Attributes:
        student_dimension: D.
        teacher_dimension: E.
        equal: Whether they are the same: then a rotation aligns them without loss.
        needs_map: Whether a student's vectors have to be mapped (ridge) before they can be
            compared with the teacher's own.
        keeps_cosines: Whether the teacher's vectors keep all their cosines when they are brought
            into the student's space: the student is not smaller.
    """

    student_dimension: int
    teacher_dimension: int
    equal: bool
    needs_map: bool
    keeps_cosines: bool


@dataclass(eq=False)
class TeacherDistillationHelper:
    """A teacher, or several with weights, that says what a student's vectors should become.

    Nothing is found, read or loaded before it is needed, and what lies in the cache needs no
    model. Helpers of the same teacher and device share one model, which goes with the last of them.

    Args:
        teacher_model_name: See `open_embedder`; or several of them.
        cache_dir: Where vectors are kept; not kept where None.
        weights: One above 0 for each of several teachers; cosines are then their weighted mean.
        device: cpu, cuda or mps; chosen where None.
        trust_remote_code: Let Python code that comes with a model run.

    Raises:
        ConchError: No teacher, or weights that do not fit.
    """

    teacher_model_name: str | Sequence[str]
    _: KW_ONLY
    cache_dir: Path | str | None = None
    weights: Sequence[float] | None = None
    device: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        names = self.teacher_model_name
        self.names: tuple[str, ...] = (names,) if isinstance(names, str) else tuple(names)
        if not self.names or not all(self.names):
            raise ConchError("no teacher is named: give the name of a model, or several")
        if self.weights is not None and len(self.weights) != len(self.names):
            raise ConchError(f"{len(self.weights)} weights do not fit {len(self.names)} teachers")

    @cached_property
    def teacher(self) -> Embedder:
        """The teacher, found but not loaded; with the cache in front of it.

        Raises:
            ConchError: It is not here and cannot be fetched.
        """
        embedders = list(self._opened)
        if self.cache_dir is not None:
            folder = Path(self.cache_dir).expanduser()
            embedders = [CachedEmbedder(embedder, folder) for embedder in embedders]
        return TeacherEnsemble(embedders, self.weights) if len(embedders) > 1 else embedders[0]

    @property
    def only(self) -> Embedder:
        """The one teacher without the cache, as queries are asked of it later.

        Raises:
            ConchError: There are several.
        """
        if len(self._opened) > 1:
            raise ConchError(f"{len(self._opened)} models are named, and one is needed: give one")
        return self._opened[0]

    def load_teacher_model(self) -> Embedder:
        """The teacher with its model in memory; loaded the first time, once in a process.

        Raises:
            ConchError: It is not here, cannot be fetched or cannot be loaded.
        """
        for embedder in self._opened:
            # Asking for the dimension loads; the cache would answer without.
            _ = embedder.dimension
        return self.teacher

    @cached_property
    def _opened(self) -> tuple[Embedder, ...]:
        trust = self.trust_remote_code
        return tuple(
            open_embedder(name, device=self.device, trust_remote_code=trust) for name in self.names
        )

    def embed(self, texts: Iterable[str], *, queries: bool = False) -> Embedded:
        """The teacher's vectors, from the cache where they lie there, and errors per text.

        Raises:
            ConchError: The teacher as a whole cannot be used.
        """
        return self.teacher.queries(texts) if queries else self.teacher.documents(texts)

    def get_teacher_embeddings(self, texts: Iterable[str], *, queries: bool = False) -> np.ndarray:
        """The teacher's vectors of all texts, unit float32 `[N, E]`.

        Raises:
            ConchError: See `embed`; or a text cannot be embedded, which is named.
        """
        return self.embed(texts, queries=queries).all_vectors()

    def check_dimension_compatibility(self, student_dimension: int) -> DimensionCheck:
        """Whether a student of that dimension agrees with the teacher or needs a learned map.

        Raises:
            ConchError: The dimension is no number of dimensions, or the teacher cannot be used.
        """
        if student_dimension < 1:
            raise ConchError(f"student dimension {student_dimension} must be 1 or more")
        dimension = self.teacher.dimension
        equal = dimension == student_dimension
        return DimensionCheck(
            student_dimension=student_dimension,
            teacher_dimension=dimension,
            equal=equal,
            needs_map=not equal,
            keeps_cosines=student_dimension >= dimension,
        )

    def generate_distillation_targets(
        self,
        texts: Sequence[str],
        current_embeddings: Any,
        teacher_weight: float = 1.0,
        *,
        alignment: EmbeddingAdapter | None = None,
    ) -> np.ndarray:
        """What the vectors of these texts should become.

        Args:
            texts: N of them.
            current_embeddings: The student's raw vectors `[N, D]`.
            teacher_weight: 0 gives a copy of the student's, and the teacher is not asked; 1 the
                teacher's, in the teacher's space; between, normalize((1 − a) student + a teacher)
                in the student's space.
            alignment: Teacher's space to student's, from `fit_alignment` on more texts than
                these; fitted to these where None.

        Returns:
            float32 `[N, D]`; `[N, E]` at weight 1.

        Raises:
            ConchError: Weight or shapes do not fit, or see `get_teacher_embeddings`.
        """
        check_weight(teacher_weight)
        current = rows_of(texts, current_embeddings)
        if teacher_weight == 0:
            return current.copy()
        vectors = self.get_teacher_embeddings(texts)
        if teacher_weight == 1:
            return vectors
        return generate_hybrid_targets(
            current, aligned(vectors, current, alignment), teacher_weight
        )

    def compute_alignment_metric(self, first: Any, second: Any) -> float:
        """Mean cosine; see the function of the same name in teacher_alignment.py."""
        return compute_alignment_metric(first, second)


def create_distillation_helper(
    teacher_model_name: str | Sequence[str],
    *,
    cache_dir: Path | str | None = None,
    weights: Sequence[float] | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> TeacherDistillationHelper:
    """A helper whose teacher was found, though not loaded: what is missing is said now.

    Raises:
        ConchError: See `TeacherDistillationHelper`; or a teacher is not here and cannot be fetched.
    """
    helper = TeacherDistillationHelper(
        teacher_model_name,
        cache_dir=cache_dir,
        weights=weights,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    _ = helper.teacher
    return helper


@dataclass(frozen=True, kw_only=True, eq=False)
class FallbackTargets:
    """Targets in the space of the current vectors, and how each came about.

    Attributes:
        targets: Unit float32 `[n, D]`.
        without_teacher: What they would be without one, `[n, D]`: the homeostatic targets, or the
            current vectors as they are.
        kept: Which text each row belongs to, counted from 0.
        steps: For each text the one of STEPS that gave its target, or `skipped`.
        reasons: Why a step was left, in the order of the log.
    """

    targets: np.ndarray
    without_teacher: np.ndarray
    kept: list[int]
    steps: list[str]
    reasons: list[str]

    @property
    def counts(self) -> dict[str, int]:
        """How many texts each step served; every step is named."""
        served = Counter(self.steps)
        return {step: served[step] for step in STEPS}


def targets_with_fallback(
    texts: Sequence[str],
    current_embeddings: Any,
    *,
    helper: TeacherDistillationHelper | None = None,
    homeostatic: Callable[[np.ndarray], np.ndarray] | None = None,
    alignment: EmbeddingAdapter | None = None,
) -> FallbackTargets:
    """Targets by the documents' chain: teacher, homeostatic, unchanged, critical log and skip.

    All lie in the space of the current vectors, so that rows of different steps may be trained on
    together. A step that is not given is no failure; each that fails is logged with its reason.

    Args:
        texts: N of them.
        current_embeddings: What the store's active version gives for them, `[N, D]`.
        helper: The teacher; None in baseline mode, in which it is never loaded.
        homeostatic: Gives targets `[n, D]` for rows `[n, D]`; a row that is not finite has none.
        alignment: Teacher's space to that of the current vectors, from `fit_alignment` on more
            texts than these; fitted to these where None.

    Raises:
        ConchError: Shapes do not fit; nothing else, since that is what the chain is for.
    """
    current = rows_of(texts, current_embeddings)
    reasons: list[str] = []
    usable = np.isfinite(current).all(axis=1) & current.any(axis=1)
    targets = np.where(usable[:, None], current, np.float32(0))
    steps = np.where(usable, "unchanged", "skipped").astype(object)
    places = np.flatnonzero(usable)

    def leave(step: str, count: int, reason: object) -> None:
        reasons.append(f"{step} gave no target for {count} of {len(places)} texts: {reason}")
        logger.warning("%s; the next step of the chain takes them", reasons[-1])

    if homeostatic is not None and len(places):
        try:
            rows = np.asarray(homeostatic(current[places]), np.float32)
            if rows.shape != (len(places), current.shape[1]):
                raise ConchError(f"its targets have shape {list(rows.shape)}")
        except ConchError as error:
            leave("homeostatic", len(places), error)
        else:
            sound = np.isfinite(rows).all(axis=1) & rows.any(axis=1)
            if not sound.all():
                leave("homeostatic", int((~sound).sum()), "not finite or zero")
            targets[places[sound]], steps[places[sound]] = rows[sound], "homeostatic"
    # Current vectors are of unit length already, and are handed on to the bit.
    without_teacher = targets[places]
    if homeostatic is not None:
        without_teacher = unit(without_teacher, what="targets")
    if helper is not None and len(places):
        try:
            embedded = helper.embed([texts[number] for number in places.tolist()])
            if embedded.errors:
                leave("teacher", len(embedded.errors), next(iter(embedded.errors.values())))
            if embedded.kept:
                asked = places[embedded.kept]
                targets[asked] = aligned(embedded.vectors, current[asked], alignment)
                steps[asked] = "teacher"
        except ConchError as error:
            leave("teacher", len(places), error)

    if len(places) < len(texts):
        skipped = len(texts) - len(places)
        reasons.append(f"{skipped} of {len(texts)} texts have no usable vector at all")
        logger.critical("%s: they are skipped", reasons[-1])
    return FallbackTargets(
        targets=unit(targets[places], what="targets"),
        without_teacher=without_teacher,
        kept=places.tolist(),
        steps=steps.tolist(),
        reasons=reasons,
    )
