"""Several adapters on one base model in memory, switched in place.

Knows modules and their arrays; nothing of requests, tokens or domains' meaning. What an adapter is
made of is read in `adapter_modules`; this module keeps them and says which one is active.
"""

from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from conch_dna.cortex.engine.adapter_modules import LoadedAdapter, SharedTree, read_adapter
from conch_dna.errors import ConchError
from conch_dna.language_model import LanguageModel, named_arrays
from conch_dna.training.adapters import adapter_tensors


class AdapterBank:
    """Adapters by name on one base, whose arrays all of them share.

    Not for several threads at once.

    Args:
        base: Loaded without an adapter; its module tree is what `activate` changes.

    Attributes:
        base: The model.
        vocabulary_size: Of the base: real tokens, without padding rows of its head.
        shared: The base's modules without an adapter, and new trees over its arrays.
        active: Which adapter the base's module tree carries now; None for the base as it was.
        version: Grows whenever an adapter comes or is replaced.

    Raises:
        ConchError: The base already carries an adapter.
    """

    def __init__(self, base: LanguageModel) -> None:
        if base.source.adapter or adapter_tensors(base.model):
            raise ConchError(
                f"{base.model_id} already carries an adapter: load the base without one"
            )
        self.base = base
        self.version = 0
        # Asked before anything is active; it runs the model once.
        self.vocabulary_size = base.vocabulary_size
        self.shared = SharedTree(base.model)
        self._adapters: dict[str, LoadedAdapter] = {}
        self.active: str | None = None

    @property
    def names(self) -> list[str]:
        """All adapters, in the order they came."""
        return list(self._adapters)

    def add(self, name: str, folder: Path) -> None:
        """Read an adapter, under a name of its own.

        Args:
            name: Not taken yet.
            folder: Holds adapter_config.json and adapters.safetensors.

        Raises:
            ConchError: The name is taken, or the folder's adapter does not belong to the base.
        """
        if name in self._adapters:
            raise ConchError(f"there is an adapter {name!r} already: replace it")
        self._adapters[name] = read_adapter(Path(folder), self.base, self.shared)
        self.version += 1

    def replace(self, name: str, folder: Path) -> None:
        """Read another version of an adapter; if it is refused, the old one stays.

        If it is the active one, the new version is active afterwards.

        Raises:
            ConchError: There is no such adapter, or the folder's does not belong to the base.
        """
        self.get(name)
        new = read_adapter(Path(folder), self.base, self.shared)
        active = self.active
        self.activate(None)
        self._adapters[name] = new
        self.version += 1
        self.activate(active)

    def get(self, name: str) -> LoadedAdapter:
        """The adapter of that name.

        Raises:
            ConchError: There is none.
        """
        if name not in self._adapters:
            known = ", ".join(self._adapters) or "none yet"
            raise ConchError(f"there is no adapter {name!r}: known are {known}")
        return self._adapters[name]

    def activate(self, name: str | None) -> None:
        """Let the base's module tree be the model with that adapter; None: the base as it was.

        Exchanges references to modules: nothing is loaded, computed or copied.

        Raises:
            ConchError: There is no such adapter; the active one stays.
        """
        swaps = self.get(name).swaps if name is not None else ()
        if self.active is not None:
            for swap in self._adapters[self.active].swaps:
                swap.holder[swap.key] = swap.own
        for swap in swaps:
            swap.holder[swap.key] = swap.other
        self.active = name

    def tree(self, name: str | None) -> nn.Module:
        """The model with an adapter as a module tree of its own, whatever is active.

        It shares the arrays, and goes on being that version after `replace`.

        Raises:
            ConchError: There is no such adapter.
        """
        return self.shared.pristine if name is None else self.get(name).tree

    def can_share_batch(self, names: Iterable[str | None]) -> bool:
        """Whether rows of one batch can have these adapters: plain LoRA on plain layers only.

        Not so for DoRA, full weights, layers of experts, and tensors of several dtypes.
        """
        from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

        dtypes = set()
        for name in names:
            for swap in self.get(name).swaps if name is not None else ():
                if type(swap.other) not in (LoRALinear, LoRAEmbedding):
                    return False
                dtypes |= {swap.other.lora_a.dtype, swap.other.lora_b.dtype}
        return len(dtypes) <= 1

    def digest_of(self, name: str) -> str:
        """Content address of an adapter's configuration and tensors."""
        return self.get(name).digest

    def bytes_of(self, name: str) -> int:
        """Memory of an adapter's own tensors, in bytes."""
        return self.get(name).nbytes

    @property
    def base_bytes(self) -> int:
        """Memory of the base's arrays, in bytes; arrays used twice count once."""
        arrays: dict[int, mx.array] = {
            id(array): array for array in named_arrays(self.shared.pristine.parameters()).values()
        }
        return sum(array.nbytes for array in arrays.values())
