"""Targets from a teacher: its vectors, cached, and what the student's are to become.

Knows embedders, their cache and the alignment; nothing of stores, gates or training. What happens
when a teacher fails is in fallback_targets.py.
To offer another target: a function in teacher_alignment.py, called here with the teacher's vectors.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.sedimentation.adapters.adapter import Adapter
from conch_dna.sedimentation.adapters.teacher_alignment import (
    aligned,
    blend,
    check_weight,
    compute_alignment_metric,
    rows_of,
)
from conch_dna.sedimentation.embedders.contract import Embedded, Embedder
from conch_dna.sedimentation.embedders.open_embedder import open_embedder
from conch_dna.sedimentation.embedders.teachers import SHARD_ROWS, CachedEmbedder, TeacherEnsemble

_shared: dict[tuple[str, str | None, bool], Embedder] = {}
_shared_lock = threading.Lock()


def shared_embedder(
    name: str, *, device: str | None, batch_size: int, trust_remote_code: bool
) -> Embedder:
    """The one instance of this process for a name and device; the first asker's batch size holds.

    Raises:
        ConchError: See `open_embedder`.
    """
    key = (name, device, trust_remote_code)
    with _shared_lock:
        if key not in _shared:
            _shared[key] = open_embedder(
                name, device=device, batch_size=batch_size, trust_remote_code=trust_remote_code
            )
        return _shared[key]


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


class TeacherDistillationHelper:
    """A teacher, or several with weights, that says what a student's vectors should become.

    Nothing is found, read or loaded before it is needed, and what lies in the cache needs no
    model. Helpers of the same name and device share one model in a process.

    Args:
        teacher_model_name: See `open_embedder`; or several of them.
        cache_dir: Where vectors are kept; not kept where None.
        batch_size: Texts at once.
        weights: One above 0 for each of several teachers; cosines are then their weighted mean.
        device: cpu, cuda or mps; chosen where None.
        trust_remote_code: Let Python code that comes with a model run.

    Raises:
        ConchError: No teacher, or weights that do not fit.
    """

    def __init__(
        self,
        teacher_model_name: str | Sequence[str],
        *,
        cache_dir: Path | str | None = None,
        batch_size: int = 64,
        weights: Sequence[float] | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        names = teacher_model_name
        self.names: tuple[str, ...] = (names,) if isinstance(names, str) else tuple(names)
        if not self.names or not all(self.names):
            raise ConchError("no teacher is named: give the name of a model, or several")
        if weights is not None and len(weights) != len(self.names):
            raise ConchError(f"{len(weights)} weights do not fit {len(self.names)} teachers")
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.batch_size = batch_size
        self.weights = weights
        self.device = device
        self.trust_remote_code = trust_remote_code
        self._teacher: Embedder | None = None

    @property
    def teacher(self) -> Embedder:
        """The teacher, found but not loaded; with the cache in front of it.

        Raises:
            ConchError: It is not here and cannot be fetched.
        """
        if self._teacher is None:
            found = [self._opened(name) for name in self.names]
            if self.cache_dir is not None:
                found = [CachedEmbedder(embedder, self.cache_dir) for embedder in found]
            several = len(found) > 1
            self._teacher = TeacherEnsemble(found, self.weights) if several else found[0]
        return self._teacher

    def load_teacher_model(self) -> Embedder:
        """The teacher with its model in memory; loaded the first time, once in a process.

        Raises:
            ConchError: It is not here, cannot be fetched or cannot be loaded.
        """
        for name in self.names:
            # Asking for the dimension loads; the cache would answer without.
            _ = self._opened(name).dimension
        return self.teacher

    def _opened(self, name: str) -> Embedder:
        return shared_embedder(
            name,
            device=self.device,
            batch_size=self.batch_size,
            trust_remote_code=self.trust_remote_code,
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

    def stream_teacher_embeddings(self, texts: Iterable[str]) -> Iterator[Embedded]:
        """The same for any number of texts, 1,024 at a time; numbers count within each part.

        Raises:
            ConchError: See `embed`.
        """
        source = iter(texts)
        while part := list(islice(source, SHARD_ROWS)):
            yield self.embed(part)

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
        alignment: Adapter | None = None,
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
        return blend(current, aligned(vectors, current, alignment), teacher_weight)

    def compute_alignment_metric(self, first: Any, second: Any) -> float:
        """Mean cosine; see the function of the same name in teacher_alignment.py."""
        return compute_alignment_metric(first, second)


def create_distillation_helper(
    teacher_model_name: str | Sequence[str],
    *,
    cache_dir: Path | str | None = None,
    batch_size: int = 64,
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
        batch_size=batch_size,
        weights=weights,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    _ = helper.teacher
    return helper
