"""Embeddings as OpenAI's API has them: what is asked for, the thread that makes them, the reply.

Knows the API as JSON and an embedder of sedimentation; nothing of HTTP or neurons. Another field of
the API: a field of `EmbeddingRequest`. Another kind of work between two batches: a `yield` in
`EmbeddingThread._made`.
"""

import base64
import json
import os
import queue
import reprlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from conch_dna.cortex.server.loop import STOPPING
from conch_dna.cortex.server.openai_api import MAX_VALUES, validated
from conch_dna.errors import ConchError, one_line
from conch_dna.sedimentation.embedders.contract import problems_of
from conch_dna.sedimentation.embedders.local import LocalEmbedder, open_local
from conch_dna.sedimentation.stores.edge import MANIFEST
from conch_dna.sedimentation.stores.open_store import VECTORS
from conch_dna.training.settings import EGO
from conch_dna.web.door import ApiError, json_object

# Of one request, as OpenAI has it.
MOST_TEXTS = 2048
# Of one batch, padded: so long a request waits for another one. A batch of so many tokens takes
# MiniLM about a second on one core.
_BATCH_TEXTS, _BATCH_TOKENS = 64, 2048
# Characters whose tokens are counted in one go.
_PART_CHARACTERS = 2**16


class _Conch(BaseModel):
    """What only this server has."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    queries: bool = Field(default=False, description="true or false")


class EmbeddingRequest(BaseModel):
    """Embeddings that were asked for, in the API's own fields.

    Attributes:
        conch: Whether the texts are searched with, and so get the model's prompt for queries.
    """

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    model: str = Field(min_length=1, description="the name of the model, see /v1/models")
    input: list[str] = Field(description="a text or a list of texts")
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="float or base64"
    )
    dimensions: int | None = Field(default=None, ge=1, description="a whole number, 1 or more")
    # Tells the provider's clients apart.
    user: Any = None
    conch: _Conch = Field(default=_Conch(), description="an object with queries")

    @field_validator("input", mode="before")
    @classmethod
    def _as_texts(cls, given: Any) -> Any:
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list):
            return texts
        if not texts:
            raise PydanticCustomError("clash", "input is an empty list: give a text or more")
        if any(isinstance(each, int | list) for each in texts):
            raise PydanticCustomError(
                "clash", "input holds token ids, which mean other tokens here: send texts"
            )
        if len(texts) > MOST_TEXTS:
            problem = f"input has {len(texts):,} texts: send at most {MOST_TEXTS:,} at once"
            raise PydanticCustomError("clash", problem)
        for number, problem in problems_of(texts).items():
            if isinstance(texts[number], str):
                raise PydanticCustomError("clash", f"input[{number}]: {problem}, leave it out")
        return texts

    @property
    def ignored(self) -> list[str]:
        """Names of fields that are not known here."""
        return list(self.model_extra or ())


def parse_embeddings(body: bytes) -> EmbeddingRequest:
    """Read a request.

    Raises:
        ApiError: It is no JSON object, or something of it is not supported or out of its range; all
            of that is named.
    """
    fields = json_object(body, most_values=MAX_VALUES)
    given = {name: value for name, value in fields.items() if value is not None}
    return validated(EmbeddingRequest, given)


@dataclass(frozen=True)
class MadeEmbeddings:
    """A reply.

    Attributes:
        body: JSON.
        tokens: That the model read.
    """

    body: bytes
    tokens: int


@dataclass(frozen=True)
class _Job:
    """A request whose embeddings are made, and who waits for it; cancelled where nobody does."""

    steps: Iterator[MadeEmbeddings | None]
    future: "Future[MadeEmbeddings]"


def open_student(folder: str, *, trust_remote_code: bool = False) -> LocalEmbedder:
    """The model of a folder, in memory, called as the folder is.

    Args:
        folder: A student of `make_student`, or any model of sentence-transformers or model2vec.
        trust_remote_code: Let Python code that comes with the model run.

    Raises:
        ConchError: There is no such folder or no model in it, or it cannot be loaded.
    """
    path = Path(os.path.abspath(Path(folder).expanduser()))
    if not path.is_dir():
        raise ConchError(f"there is no folder {folder}: give that of an embedding model")
    if (path / VECTORS / MANIFEST).is_file():
        raise ConchError(
            f"{folder} is a store: write its student and adapter as one model by `conch-dna "
            "sediment export`, and give the folder of that"
        )
    embedder = open_local(
        str(path), device=None, batch_size=_BATCH_TEXTS, trust_remote_code=trust_remote_code
    )
    # Clients need not know where it lies.
    embedder.place = replace(embedder.place, name=path.name)
    embedder.token_counts(["token"], queries=False)
    return embedder


class EmbeddingThread:
    """Makes embeddings in a thread of its own, a batch of each request in turn.

    So a batch waits for one batch of each other request, however long those are. A text that is
    longer than the model reads is refused, before any embedding is made.

    Args:
        embedder: The model; only this thread uses it from now on.
        taken: Names that clients know otherwise: domains.
        failed: Gets what ends the thread, such as an interrupt.
        report: Gets a line for what the one who runs the server should know.

    Attributes:
        name: What clients call the model.
        dimension: Of its vectors.

    Raises:
        ConchError: The model has the name of a domain or EGO's.
    """

    def __init__(
        self,
        embedder: LocalEmbedder,
        *,
        taken: Sequence[str],
        failed: Callable[[BaseException], None],
        report: Callable[[str], None],
    ) -> None:
        self.name = embedder.name
        if self.name in (*taken, EGO):
            whose = "the big teacher" if self.name == EGO else "a domain"
            raise ConchError(
                f"the folder of embeddings is called {self.name!r}, as {whose} is: rename it"
            )
        self.dimension = embedder.dimension
        self._embedder = embedder
        self._failed = failed
        self._report = report
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._ending = False
        # A daemon, since a model that is in the middle of a batch cannot be stopped.
        self._thread = threading.Thread(target=self._run, name="embeddings", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def check(self, asked: EmbeddingRequest) -> None:
        """Refuse what this model cannot do.

        Raises:
            ApiError: Another model or other dimensions are asked for.
        """
        if asked.model != self.name:
            raise ApiError(
                404,
                f"{reprlib.repr(asked.model)} makes no embeddings here: {self.name} does",
                param="model",
                code="model_not_found",
            )
        if asked.dimensions not in (None, self.dimension):
            raise ApiError(
                400,
                f"dimensions is {asked.dimensions}: the embeddings of {self.name} have "
                f"{self.dimension}, leave it out",
                param="dimensions",
            )

    def put(self, asked: EmbeddingRequest) -> "Future[MadeEmbeddings]":
        """Make embeddings; from any thread.

        Returns:
            The reply, or the ApiError that says why there is none. Who cancels it has no more of it
            computed.

        Raises:
            ApiError: The thread is ending, and would make them no more.
        """
        if self._ending:
            raise ApiError(503, STOPPING)
        future: Future[MadeEmbeddings] = Future()
        self._jobs.put(_Job(self._made(asked), future))
        return future

    def stop(self, *, wait_s: float) -> bool:
        """End the thread after the batch that it is at; who waits is told so.

        Returns:
            Whether it ended in that time.
        """
        self._ending = True
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join(wait_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._ending:
                if (job := self._jobs.get()) is not None:
                    self._go_on(job)
            while not self._jobs.empty():
                if (job := self._jobs.get()) is not None:
                    self._end(job, ApiError(503, STOPPING))
        except BaseException as error:  # noqa: BLE001  (raised in the server's thread)
            self._failed(error)

    def _go_on(self, job: _Job) -> None:
        """Take the next step of a request, and put it behind the others."""
        if job.future.cancelled():
            return
        try:
            made = next(job.steps)
        except ApiError as error:
            self._end(job, error)
        except Exception as error:  # noqa: BLE001  (the failure of this request alone)
            why = one_line(error)
            self._report(f"a request to {self.name} failed: {why}")
            message = f"the embeddings failed ({why}): ask again, or for fewer texts"
            self._end(job, ApiError(500, message))
        else:
            if made is None:
                self._jobs.put(job)
            else:
                self._end(job, made)

    @staticmethod
    def _end(job: _Job, end: MadeEmbeddings | ApiError) -> None:
        if not job.future.set_running_or_notify_cancel():
            return
        if isinstance(end, ApiError):
            job.future.set_exception(end)
        else:
            job.future.set_result(end)

    def _made(self, asked: EmbeddingRequest) -> Iterator[MadeEmbeddings | None]:
        """The steps of a request: None between two of them, the reply at last.

        Raises:
            ApiError: A text is too long, or has no embedding.
        """
        texts, queries = asked.input, asked.conch.queries
        sizes = [len(text) for text in texts]
        counts: list[int] = []
        for part in _batches(range(len(texts)), sizes, most=_PART_CHARACTERS):
            if counts:
                yield None
            found = self._embedder.token_counts([texts[each] for each in part], queries=queries)
            counts.extend(found)
        self._check_lengths(counts, queries=queries)
        # Alike lengths together, so that little is padded.
        order = sorted(range(len(texts)), key=counts.__getitem__)
        entries = [""] * len(texts)
        for begun, batch in enumerate(_batches(order, counts, most=_BATCH_TOKENS)):
            # Only between two: what fits in one batch waits for one of each other request.
            if begun:
                yield None
            embedded = self._embedder.embed([texts[each] for each in batch], queries=queries)
            for place, reason in embedded.errors.items():
                raise ApiError(400, f"input[{batch[place]}]: {reason}", param="input")
            for number, row in zip(batch, embedded.vectors, strict=True):
                entries[number] = _entry(number, row, asked.encoding_format)
        yield MadeEmbeddings(_reply(entries, self.name, sum(counts)), sum(counts))

    def _check_lengths(self, counts: Sequence[int], *, queries: bool) -> None:
        most = self._embedder.most_tokens(queries=queries)
        long = [number for number, count in enumerate(counts) if most and count > most]
        if long:
            others = f", and {len(long) - 1} more texts are too long" if len(long) > 1 else ""
            raise ApiError(
                400,
                f"input[{long[0]}] has {counts[long[0]]:,} tokens{others}: {self.name} reads "
                f"{most:,} of a text, shorten or split it",
                param="input",
                code="context_length_exceeded",
            )


def _batches(order: Iterable[int], sizes: Sequence[int], *, most: int) -> Iterator[list[int]]:
    """Numbers in groups, the largest of which times its length is at most so much.

    Args:
        order: Of the numbers.
        sizes: By number.
        most: Of a group; one alone may have more.
    """
    batch: list[int] = []
    longest = 0
    for number in order:
        longest = max(longest, sizes[number])
        if batch and (len(batch) == _BATCH_TEXTS or longest * (len(batch) + 1) > most):
            yield batch
            batch, longest = [], sizes[number]
        batch.append(number)
    if batch:
        yield batch


def _entry(number: int, vector: np.ndarray, encoding_format: str) -> str:
    """A vector as JSON: numbers, or little-endian float32 as base64."""
    value: Any = vector.tolist()
    if encoding_format == "base64":
        value = base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return json.dumps({"object": "embedding", "index": number, "embedding": value})


def _reply(entries: Sequence[str], model: str, tokens: int) -> bytes:
    """The whole body; joined, since to write it at once would keep other threads waiting."""
    rest = {"model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    head = f'{{"object": "list", "data": [{", ".join(entries)}], '
    return (head + json.dumps(rest, ensure_ascii=False)[1:]).encode()
