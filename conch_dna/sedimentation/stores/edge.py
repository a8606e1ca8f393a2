"""A store in a folder: one shard of Qdrant Edge, the server's engine in this process.

Knows one shard and a manifest beside it; nothing of servers. Versions are further named vectors of
the same points; which one is active stands in the manifest, and only there.

What a kill leaves, by the shard's write-ahead log: an update that returned is there after a kill
-9, but only once it was flushed after a power cut; and when the log is replayed, an update that
names a vector which was deleted later is lost as a whole. So documents are flushed before `put`
returns, and everything before a vector name is deleted.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.checkpoints import FolderLock, read_json, remove_unfinished, write_json
from conch_dna.errors import ConchError, NotWholeError, one_line
from conch_dna.sedimentation.stores.accounts import no_contents
from conch_dna.sedimentation.stores.contract import EXACT_BELOW, RAW, VectorStore
from conch_dna.sedimentation.stores.filters import Conditions, qdrant_filter
from conch_dna.sedimentation.stores.ledger import require_format
from conch_dna.sedimentation.stores.state import (
    FORMAT,
    OLDEST_FORMAT,
    VersionState,
    checked_identity,
    require_sound,
    sealed,
    unsealed,
)
from conch_dna.sedimentation.stores.stored_documents import Record, id_of, key_of

MANIFEST = "manifest.json"
SHARD = "shard"
# Room that must stay free: Edge writes through memory maps, where a full disk kills the process
# (SIGBUS). It makes its files 32 MiB at a time, of which a batch can need several.
SPARE_BYTES = 256 * 2**20
# Bytes on disk for each byte of vectors: once in the log and once in the storage, and some.
BYTES_WRITTEN = 3

_log = logging.getLogger(__name__)


class EdgeStore(VectorStore):
    """A `VectorStore` in one folder, locked while it is open.

    Args:
        folder: Made where it is missing; may hold other files.
        identity: `student`, `digest` and `dimension` of the raw vectors; may be None where there
            is a store.
        exact_below: Documents from which on searches are approximate, and `index` builds HNSW
            graphs.

    Raises:
        FolderInUseError: Another process has it open.
        NotWholeError: Manifest and shard do not belong together.
        ConchError: It was made with another student, or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any] | None = None,
        *,
        exact_below: int = EXACT_BELOW,
    ) -> None:
        import qdrant_edge

        self.folder = folder
        # Its stubs give vectors a type that must be told apart at each use.
        self._edge: Any = qdrant_edge
        manifest = folder / MANIFEST
        if identity is None and not manifest.is_file():
            checked_identity(None, None, str(folder))
        with ExitStack() as opening:
            opening.enter_context(FolderLock(folder, elsewhere="choose another folder"))
            is_new = not manifest.exists()
            stored, state = None, VersionState(active=RAW, contents=no_contents())
            if not is_new:
                stored, state = _read_manifest(manifest)
            checked = checked_identity(identity, stored, str(folder))
            super().__init__(str(folder), checked, state, exact_below)
            if is_new:
                self._make_shard()
            else:
                _finish_shard(folder)
            remove_unfinished(folder)
            self._shard = self._load_shard()
            opening.callback(self._shard.close)
            self._settle()
            self._drop_unfinished()
            self._check_whole()
            self._open = opening.pop_all()

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Turns Qdrant Edge's errors into one line."""
        try:
            yield
        except Exception as error:
            # All of Edge's errors are of this type.
            reason = one_line(error).rstrip(".")
            raise ConchError(f"the store in {self.folder} could not {what}: {reason}") from error

    def _make_shard(self) -> None:
        if (self.folder / SHARD).exists():
            raise NotWholeError(
                f"{self.folder} has documents but no {MANIFEST}: put the file back, or choose "
                "another folder"
            )
        remove_unfinished(self.folder)
        self._need_space(0)
        configuration = self._configuration([])
        with self._asking("be made"):
            self._edge.EdgeShard.create(str(_unfinished(self.folder)), configuration).close()
        # With the manifest there, the next process can tell a shard to be renamed from litter.
        self._commit(self._state)
        _finish_shard(self.folder)

    def _configuration(self, versions: Sequence[str]) -> Any:
        """Edge's configuration of a shard with the raw vectors and those of some versions."""
        dimension = int(self.identity["dimension"])
        # A quarter, as optimized documents may be spread over several segments.
        kilobytes = max(1, self._exact_below * dimension * 4 // 1024 // 4)
        edge = self._edge
        return edge.EdgeConfig(
            vectors={
                name: edge.EdgeVectorParams(size=self._dimension(name), distance=edge.Distance.Dot)
                for name in (RAW, *versions)
            },
            hnsw_config=edge.HnswIndexConfig(16, 100, kilobytes),
            optimizers=edge.EdgeOptimizersConfig(indexing_threshold=kilobytes),
        )

    def _load_shard(self) -> Any:
        """The shard; where a kill came between two parts of a deletion, as it was before or after.

        Edge deletes a vector name in its segments and in its configuration, one after the other,
        and loads nothing where they differ. Which names were to go is in the manifest; where none
        was, there is nothing else to try.
        """
        load, path = self._edge.EdgeShard.load, str(self.folder / SHARD)
        unfinished = ", ".join(self._state.building)
        try:
            with self._asking("be opened"):
                return load(path)
        except ConchError as error:
            if not unfinished:
                raise
            reasons = [str(error)]
        for what, versions in (("without", list(self._state.kept)), ("with", self.versions())):
            try:
                with self._asking(f"be opened {what} version {unfinished}"):
                    shard = load(path, self._configuration(versions))
            except ConchError as error:
                reasons.append(str(error))
            else:
                _log.warning(
                    "opened %s %s version %s, whose deletion a killed process left half done: %s",
                    self.folder,
                    what,
                    unfinished,
                    reasons[0],
                )
                return shard
        raise ConchError(
            f"{'; '.join(reasons)}. Restore the folder, or make the store anew from its documents"
        )

    def _settle(self) -> None:
        """What a killed process wrote is counted in; what it deleted goes, and waits for the rest.

        What else names deleted documents is not known here: see `also_forget`.
        """
        writing = self._state.writing
        if writing is not None and writing["deletes"]:
            self._remove([key_of(id_of(text)) for text in writing["ids"]])
        else:
            self.recover()

    def _drop_unfinished(self) -> None:
        for name in self._state.building:
            self._erase(name)
        if self._state.building:
            self._advance(replace(self._state, building={}))

    def _check_whole(self) -> None:
        for name in (RAW, *self._state.kept):
            vectors, expected = self.count(name), self._kept(name)["count"]
            if vectors != expected:
                raise NotWholeError(
                    f"{self.folder} is not whole: version {name} holds {vectors} vectors for "
                    f"{expected} documents. Restore the folder, or make the store anew from its "
                    "documents"
                )

    def _need_space(self, written: int) -> None:
        free = shutil.disk_usage(self.folder).free
        needed = SPARE_BYTES + BYTES_WRITTEN * written
        if free < needed:
            raise ConchError(
                f"the disk of {self.folder} is full: {free / 2**20:.0f} MiB are free and "
                f"{needed / 2**20:.0f} MiB needed. Nothing of this batch was written; free some "
                "space and go on"
            )

    def _write(
        self, keys: list[str], stored: list[dict[str, Any]], rows: Mapping[str, np.ndarray]
    ) -> None:
        texts = sum(len(str(payload)) for payload in stored)
        self._need_space(texts + sum(table.nbytes for table in rows.values()))
        lists = {version: table.tolist() for version, table in rows.items()}
        with self._asking("be written"):
            points = [
                self._edge.Point(key, {version: lists[version][n] for version in lists}, payload)
                for n, (key, payload) in enumerate(zip(keys, stored, strict=True))
            ]
            self._shard.update(self._edge.UpdateOperation.upsert_points(points))
            self._shard.flush()

    def _fetch(
        self, keys: list[str], version: str, *, payload: bool | list[str], vector: bool
    ) -> list[Record]:
        with self._asking("be read"):
            points = self._shard.retrieve(
                keys, with_payload=payload, with_vector=[version] if vector else False
            )
        if not vector:
            return [Record(str(each.id), each.payload) for each in points]
        return [
            Record(str(each.id), each.payload, each.vector[version])
            for each in points
            if version in each.vector
        ]

    def _scroll(
        self, version: str, offset: Any, size: int, payload: bool | list[str]
    ) -> tuple[list[Record], Any]:
        request = self._edge.ScrollRequest(
            offset=offset,
            limit=size,
            filter=self._holding(version),
            with_vector=[version],
            with_payload=payload,
        )
        with self._asking("be read"):
            points, following = self._shard.scroll(request)
        records = [Record(str(each.id), each.payload, each.vector[version]) for each in points]
        return records, following

    def _nearest(
        self,
        queries: np.ndarray,
        version: str,
        top_k: int,
        conditions: Conditions,
        exact: bool,
    ) -> list[list[Record]]:
        edge = self._edge
        condition = qdrant_filter(edge, conditions)
        requests = [
            edge.QueryRequest(
                query=edge.Query.Nearest(row, using=version),
                limit=top_k,
                filter=condition,
                with_payload=True,
                params=edge.SearchParams(exact=exact),
            )
            for row in queries.tolist()
        ]
        with self._asking("be searched"):
            answers = self._shard.query_batch(edge.QueryBatchRequest(requests))
        return [
            [Record(str(each.id), each.payload, score=each.score) for each in hits]
            for hits in answers
        ]

    def _holding(self, version: str) -> Any:
        return self._edge.Filter(must=[self._edge.HasVectorCondition(version)])

    def _count(self, version: str) -> int:
        request = self._edge.CountRequest(exact=True, filter=self._holding(version))
        with self._asking("be counted"):
            return int(self._shard.count(request))

    def _create(self, name: str, dimension: int) -> None:
        self._need_space(0)
        update = self._edge.UpdateOperation
        with self._asking("be written"):
            self._shard.update(update.create_dense_vector(name, dimension, self._edge.Distance.Dot))

    def _fill(self, name: str, keys: list[str], rows: np.ndarray) -> None:
        self._need_space(rows.nbytes)
        with self._asking("be written"):
            vectors = [
                self._edge.PointVectors(key, {name: row})
                for key, row in zip(keys, rows.tolist(), strict=True)
            ]
            self._shard.update(self._edge.UpdateOperation.update_vectors(vectors))

    def _remove(self, keys: list[str]) -> None:
        with self._asking("be written"):
            self._shard.update(self._edge.UpdateOperation.delete_points(keys))
        self._flush()

    def _erase(self, name: str) -> None:
        self._flush()
        with self._asking("be written"):
            self._shard.update(self._edge.UpdateOperation.delete_vector_name(name))
        self._flush()

    def _commit(self, state: VersionState) -> None:
        document = {
            "format": FORMAT,
            "identity": self.identity,
            "versions": asdict(state),
        }
        try:
            write_json(self.folder / MANIFEST, sealed(document))
        except ConchError as error:
            # Its own message tells of options that only training has.
            raise ConchError(
                f"cannot write {self.folder / MANIFEST}: {error.__cause__ or error}. "
                f"{self._state.active} stays active; free some disk space and try again"
            ) from error

    def _flush(self) -> None:
        with self._asking("be flushed"):
            self._shard.flush()

    def _optimize(self) -> bool:
        # Segments are written anew beside the old ones.
        dimensions = [self._dimension(name) for name in (RAW, *self.versions())]
        self._need_space(2 * 4 * sum(dimensions) * self.count(RAW))
        with self._asking("be indexed"):
            built = bool(self._shard.optimize())
        self._flush()
        return built

    def _release(self) -> None:
        self._open.close()


def _unfinished(folder: Path) -> Path:
    return folder / f".writing-{SHARD}"


def _finish_shard(folder: Path) -> None:
    """Give a shard its name, if the process that made it was killed before it could."""
    if not (folder / SHARD).exists() and _unfinished(folder).exists():
        _unfinished(folder).rename(folder / SHARD)


def _read_manifest(path: Path) -> tuple[dict[str, Any], VersionState]:
    """The identity and the versions."""
    try:
        manifest = read_json(path, needs={"format": int, "identity": dict, "versions": dict})
        if manifest["format"] not in (OLDEST_FORMAT, FORMAT):
            raise ConchError(
                f"{path} has format {manifest['format']}, but only {OLDEST_FORMAT} and {FORMAT} "
                "are known: open the store with the version of conch_dna that made it"
            )
        # Beside the store's folder, where an engine keeps it.
        require_format(path.parent.parent, manifest["format"], path)
        manifest = unsealed(manifest, str(path))
        identity, state = dict(manifest["identity"]), VersionState(**manifest["versions"])
        require_sound(identity, state)
        return identity, state
    except (NotWholeError, TypeError) as error:
        raise NotWholeError(
            f"{path} cannot be read as a manifest: {one_line(error)}. Restore it, or make the "
            "store anew from its documents"
        ) from error
