"""Load a causal language model by hub id, folder or embedded name; its body, head and real size.

Knows mlx_lm's model classes; nothing of training, targets or files other than the model's own.
To embed another model: a folder under assets/ is enough, its name becomes `embedded:<name>`.
"""

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from conch_dna.checkpoints import content_digest, file_digest, read_json
from conch_dna.errors import ConchError, one_line
from conch_dna.loading.full_precision import for_this_device, log_once
from conch_dna.loading.gguf_model import SUFFIX, model_folder
from conch_dna.loading.hub import EMBEDDED_HINT, download
from conch_dna.loading.model_config import head_rows, read_config
from conch_dna.loading.output_head import OutputHead, rows_at_once
from conch_dna.screen.progress import Report

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = "embedded:"
TRUST_OPTION = "--trust-remote-code"
# Stands for the weights of a teacher whose targets are there without them.
DIGEST_FILE = "weights.json"
ADAPTER_FILES = ("adapter_config.json", "adapters.safetensors")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


def resolve_model(model_id: str, *, weights: bool = True) -> Path:
    """The local folder of a model, downloaded from the hub when it is not here.

    Args:
        model_id: `embedded:<name>`, a folder, a GGUF file, or a hub id (`organisation/name`).
        weights: Download the weights too, not only configuration and tokenizer.

    Raises:
        ConchError: There is no such model, it cannot be read, or the hub has or gives none.
    """
    if model_id.startswith(EMBEDDED):
        name = model_id.removeprefix(EMBEDDED)
        known = sorted(path.parent.name for path in ASSETS.glob("*/config.json"))
        if name not in known:
            raise ConchError(
                f"there is no embedded model {name!r}: use one of "
                f"{', '.join(EMBEDDED + other for other in known)}"
            )
        return ASSETS / name
    path = Path(model_id).expanduser()
    if "://" in model_id:
        raise ConchError(
            f"{model_id} is an address, where only a teacher can be: give a model's folder, a hub "
            f"id such as organisation/name, or an embedded name ({EMBEDDED_HINT})"
        )
    if not model_id.strip():
        raise ConchError(
            f"a model's name is {model_id!r}: give a folder, a .gguf file, a hub id such as "
            f"organisation/name, or an embedded name ({EMBEDDED_HINT})"
        )
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConchError(f"{model_id} has no config.json: it is not a model folder")
        return path
    if path.is_file() and path.suffix.lower() == SUFFIX:
        return model_folder(path)
    if path.is_file():
        raise ConchError(
            f"{model_id} is a file, not a model folder: give the folder that holds config.json, or "
            "a .gguf file"
        )
    if path.is_absolute() or model_id.startswith((".", "~")) or model_id.count("/") != 1:
        raise ConchError(
            f"model folder {model_id} does not exist: give an existing folder or .gguf file, a hub "
            f"id such as organisation/name, or an embedded name ({EMBEDDED_HINT})"
        )
    return download(model_id, weights=weights)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order of their names."""
    return sorted(folder.glob("model*.safetensors"))


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder, as mlx_lm wraps it, without the model.

    Raises:
        ConchError: It cannot be read.
    """
    from mlx_lm.utils import load_config
    from mlx_lm.utils import load_tokenizer as load

    # A folder with a tokenizer alone is enough to look at it.
    has_model = (folder / "config.json").is_file() or not _has_tokenizer(folder)
    if has_model:
        read_config(folder)
    try:
        eos = load_config(folder).get("eos_token_id") if has_model else None
        tokenizer = load(folder, {"trust_remote_code": trust_remote_code}, eos_token_ids=eos)
        # Some of what is wrong shows only where a text is read.
        tokenizer.encode("a")
        return tokenizer
    except Exception as error:
        # Broken files make the libraries below raise all kinds, tokenizers even Exception itself.
        reason = one_line(error, trust_option=TRUST_OPTION)
        raise ConchError(f"cannot read the tokenizer in {folder}: {reason}") from error


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def open_tokenizer(model_id: str, *, trust_remote_code: bool = False) -> tuple[Any, int | None]:
    """The tokenizer of a model, and how many rows its configuration gives the head.

    Args:
        model_id: A hub id, an embedded name, or a folder, which may hold nothing but a tokenizer.
        trust_remote_code: Let Python code that comes with it run.

    Raises:
        ConchError: There is none, or it cannot be read.
    """
    folder = Path(model_id).expanduser()
    if not (folder.is_dir() and _has_tokenizer(folder)):
        folder = resolve_model(model_id, weights=False)
    rows = head_rows(read_config(folder)) if (folder / "config.json").is_file() else None
    return load_tokenizer(folder, trust_remote_code=trust_remote_code), rows


class ModelSource:
    """A model's folder: all that can be told without its weights, and the way to load them.

    Args:
        model_id: `embedded:<name>`, a folder, a GGUF file, or a hub id (`organisation/name`).
        trust_remote_code: Let Python code that comes with the model run.
        weights: Download the weights too, where the model comes from the hub.
        adapter: Folder of an adapter that belongs to it and is applied whenever it is loaded.
        report: Gets what is to be said of its weights, as a `message`; by default it is logged.

    Attributes:
        model_id: What the user called it.
        folder: Where it lies.

    Raises:
        ConchError: There is no such embedded model or folder, or the hub has or gives none.
    """

    def __init__(
        self,
        model_id: str,
        *,
        trust_remote_code: bool = False,
        weights: bool = True,
        adapter: Path | None = None,
        report: Report | None = None,
    ) -> None:
        self.model_id = model_id
        self.report = report
        self.adapter = adapter
        self.trust_remote_code = trust_remote_code
        self.folder = resolve_model(model_id, weights=weights)
        self._resident: LanguageModel | None = None

    @property
    def openable_name(self) -> str:
        """What mlx_lm can open it by from anywhere: a hub id, or the folder's whole path."""
        local = self.model_id.startswith(EMBEDDED) or Path(self.model_id).expanduser().is_dir()
        return str(self.folder.resolve()) if local else self.model_id

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return read_config(self.folder)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer, as mlx_lm wraps it."""
        return load_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)

    @cached_property
    def token_count(self) -> int:
        """One more than the tokenizer's largest id: rows of the head from here on are padding."""
        return int(max(self.tokenizer.get_vocab().values())) + 1

    @cached_property
    def vocabulary_size(self) -> int:
        """Real tokens V that its head can predict: the tokenizer's, as far as there are rows."""
        return min(self.token_count, head_rows(self.config) or self.token_count)

    def require_rows(self, ids: Iterable[int], name: str) -> None:
        """Refuse token ids for which embedding and head have no row.

        A tokenizer may have more tokens than its model has rows, such as markers that were added
        without resizing; mlx would read whatever lies behind the last row.

        Args:
            ids: Token ids of a text.
            name: What the message calls the text.

        Raises:
            ConchError: One is beyond the last row.
        """
        rows = head_rows(self.config)
        beyond = max(ids, default=0)
        if rows is not None and beyond >= rows:
            piece = self.tokenizer.convert_ids_to_tokens([int(beyond)])[0]
            raise ConchError(
                f"{name} has token {beyond} ({piece}), but {self.model_id} has rows for 0 to "
                f"{rows - 1}: its embedding was not resized when tokens were added; leave such "
                "tokens out of the text, or resize the model"
            )

    @cached_property
    def context_length(self) -> int | None:
        """Most positions the model was made for; None when its config does not say."""
        text = self.config.get("text_config")
        value = (text if isinstance(text, dict) else self.config).get("max_position_embeddings")
        if not (value is None or (isinstance(value, int | float) and 0 <= value < 2**53)):
            raise ConchError(
                f"max_position_embeddings of {self.model_id} is {value!r}, which is no number of "
                "positions: mend its config.json"
            )
        return int(value) if value else None

    @property
    def is_far(self) -> bool:
        """Whether another process has it in memory."""
        return False

    @property
    def lasting_name(self) -> str:
        """What a run that goes on knows it by."""
        return self.model_id

    @property
    def is_weightless(self) -> bool:
        """Whether only its targets were brought here, and not its weights."""
        return not weight_files(self.folder) and (self.folder / DIGEST_FILE).is_file()

    @cached_property
    def weights_digest(self) -> str:
        """Content address of configuration and weights, its adapter's among them."""
        if self.is_weightless:
            needs = {"weights_digest": str}
            return str(read_json(self.folder / DIGEST_FILE, needs=needs)["weights_digest"])
        files = [self.folder / "config.json", *weight_files(self.folder)]
        if self.adapter:
            files += [self.adapter / name for name in ADAPTER_FILES]
        return content_digest(*(file_digest(file) for file in files))

    @cached_property
    def tokenizer_digest(self) -> str:
        """Content address of everything that decides how the tokenizer works."""
        files = [self.folder / name for name in TOKENIZER_FILES]
        return content_digest(
            *(part for file in files if file.is_file() for part in (file.name, file_digest(file)))
        )

    @property
    def weight_bytes(self) -> int | None:
        """Bytes of the weights, about what they take in memory; None where they are not here."""
        files = weight_files(self.folder)
        return sum(file.stat().st_size for file in files) if files else None

    def load(
        self, *, adapter_path: Path | None = None, share: "LanguageModel | None" = None
    ) -> "LanguageModel":
        """Load the weights anew, through mlx_lm.

        Args:
            adapter_path: Folder of an adapter to apply, instead of its own.
            share: The same model in memory, without an adapter: its arrays are used, so that only
                the adapter takes memory of its own.

        Raises:
            ConchError: The model is not complete, broken, or of a kind mlx_lm does not know.
        """
        from mlx_lm.utils import load_adapters, maybe_set_recommended_wired_limit

        maybe_set_recommended_wired_limit()
        if self.is_weightless:
            raise ConchError(
                f"{self.model_id} is a teacher without its weights, and is asked for something "
                "that was not made: give the data, seed, shares, lengths and temperatures of "
                "`targets make`, or the whole teacher"
            )
        if not weight_files(self.folder):
            raise ConchError(
                f"{self.model_id} has no model*.safetensors in {self.folder}: it is not complete"
            )
        with self.load_errors():
            model = self.modules(lazy=share is not None)
            model = for_this_device(model, self.model_id, say=self._say)
            if share is not None:
                model.update(share.model.parameters())
            mx.eval(model.parameters())
            if adapter := adapter_path or self.adapter:
                model = load_adapters(model, str(adapter))
        model.eval()
        return LanguageModel(self, model)

    def _say(self, text: str) -> None:
        if self.report is None:
            log_once(text)
        else:
            self.report("message", {"message": text})

    def modules(self, *, lazy: bool) -> nn.Module:
        """Its modules with its weights as its files hold them; `lazy` computes none of them."""
        from mlx_lm.utils import load_model

        model, _ = load_model(self.folder, lazy=lazy, trust_remote_code=self.trust_remote_code)
        return model

    @contextmanager
    def load_errors(self) -> Iterator[None]:
        """Turns what a broken model raises into one line."""
        read_config(self.folder)
        try:
            yield
        except Exception as error:
            # A broken configuration makes the model's own code raise all kinds.
            reason = one_line(error, trust_option=TRUST_OPTION)
            raise ConchError(f"cannot load {self.model_id}: {reason}") from error

    def resident(self) -> "LanguageModel":
        """The loaded model, kept until `release`."""
        if self._resident is None:
            self._resident = self.load()
        return self._resident

    @contextmanager
    def lent(self, model: "LanguageModel") -> Iterator[None]:
        """Makes a model that is in memory anyway what `resident` gives meanwhile."""
        own, self._resident = self._resident, model
        try:
            yield
        finally:
            self._resident = own

    def release(self) -> None:
        """Free the memory of the resident model, if there is one."""
        if self._resident is not None:
            self._resident.release()
            self._resident = None


def named_arrays(tree: Any) -> dict[str, mx.array]:
    """The arrays of a module or tree by their dotted names."""
    return dict(tree_flatten(tree))


def nan_array(tree: Any) -> str | None:
    """The name of the first array of a module or tree in which there is a NaN; None for none."""
    for name, value in named_arrays(tree).items():
        if mx.issubdtype(value.dtype, mx.inexact) and mx.isnan(value).any():
            return name
    return None


class LanguageModel:
    """A causal language model in memory.

    Attributes:
        source: Where it came from, with its tokenizer.
        model: mlx_lm's module: ids `[B, T]` to logits `[B, T, rows]`.
    """

    def __init__(self, source: ModelSource, model: nn.Module) -> None:
        self.source = source
        self.model = model
        self._read: dict[tuple[str, int], tuple[mx.array, mx.array]] | None = None

    @property
    def model_id(self) -> str:
        """What the user called it."""
        return self.source.model_id

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, as mlx_lm wraps it."""
        return self.source.tokenizer

    @cached_property
    def vocabulary_size(self) -> int:
        """Real tokens V: the smaller of what the tokenizer has and the head's rows."""
        rows = int(self.model(mx.array([[0]])).shape[-1])
        return min(self.source.token_count, rows)

    @cached_property
    def output_head(self) -> OutputHead | None:
        """Its last layer; None where the model cannot be taken apart there.

        With it also the size of the vocabulary is found out, which runs the model too: in a traced
        training step that would draw numbers for dropout, in the first trace of a process only.
        """
        assert self.vocabulary_size
        try:
            return OutputHead(self.model)
        except ValueError:
            return None

    def body(self, inputs: mx.array, *, cache: list[Any] | None = None) -> mx.array:
        """Ids `[B, T]` to the hidden states `[B, T, D]` that the head takes, where there is one.

        Args:
            inputs: Behind what the cache holds.
            cache: mlx_lm's prompt cache of as many rows; it grows.
        """
        assert self.output_head is not None
        return self._once("states", self.output_head.states, inputs, cache)

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden states `[..., D]` to logits of the real tokens `[..., V]`, scaled or capped."""
        assert self.output_head is not None
        return self.output_head.logits(hidden, self.vocabulary_size)

    def logits(self, inputs: mx.array, *, cache: list[Any] | None = None) -> mx.array:
        """Ids `[B, T]` to logits of the real tokens `[B, T, V]`; see `body` for the cache."""
        return self._once("logits", self.model, inputs, cache)[..., : self.vocabulary_size]

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Ids that several losses read within are read once, as long as no weight changes."""
        self._read = {}
        try:
            yield
        finally:
            self._read = None

    def _once(self, what: str, run: Any, inputs: mx.array, cache: list[Any] | None) -> mx.array:
        if cache or self._read is None:
            return run(inputs, **_given(cache))
        # The ids stay, so that no other array can be at their address.
        key = what, id(inputs)
        if key not in self._read:
            self._read[key] = inputs, run(inputs)
        return self._read[key][1]

    def logits_at(
        self,
        inputs: mx.array,
        positions: mx.array,
        *,
        memory: float,
        cache: list[Any] | None = None,
    ) -> Iterator[tuple[slice, mx.array]]:
        """Logits of some positions, a chunk of them at a time.

        Where the head can be taken apart from the body, no more logits exist than those of a
        chunk, as long as the caller evaluates what it makes of one before it takes the next.

        Args:
            inputs: Ids `[B, T]`.
            positions: Indices into the flattened `[B * T]` positions `[N]`.
            memory: Megabytes for a chunk's logits and what is made of them, see `rows_at_once`.
            cache: Of what comes before, see `body`.

        Yields:
            Which of the positions, and their logits of the real tokens `[n, V]`.
        """
        apart = self.output_head is not None
        states = self.body(inputs, cache=cache) if apart else self.logits(inputs, cache=cache)
        states = states.reshape(-1, states.shape[-1])[positions]
        size = rows_at_once(memory, self.vocabulary_size)
        for start in range(0, len(states), size):
            part = slice(start, start + size)
            yield part, self.head(states[part]) if apart else states[part]

    def release(self) -> None:
        """Drop the weights and give their memory back; the object is of no use afterwards."""
        self.model = nn.Module()
        gc.collect()
        mx.clear_cache()


def _given(cache: list[Any] | None) -> dict[str, Any]:
    return {"cache": cache} if cache else {}
