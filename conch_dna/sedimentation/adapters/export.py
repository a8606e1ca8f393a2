"""A student and its adapter as one sentence-transformers model.

Knows the library's modules; nothing of stores or training. To export another kind: the modules
that give exactly what `EmbeddingAdapter.apply` gives, in `_adapter_modules`.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from conch_dna.errors import ConchError
from conch_dna.sedimentation.adapters.adapter import EmbeddingAdapter
from conch_dna.sedimentation.adapters.token_table import token_vectors


def export_sentence_transformer(student: Any, adapter: EmbeddingAdapter, folder: Path) -> None:
    """Write a model whose `encode` gives the adapted vectors of texts.

    Linear kinds become the student's modules, Normalize, one Dense with the identity as its
    activation, Normalize. The residual network follows as two more Dense: the first gives
    `[0; gelu(u W1 + b1)] + [u; 0]`, where the library's own residual connection carries u past the
    gelu, which is 0 at 0; the second is `[I; W2]` with b2. So it is exact as well.

    A model2vec student becomes a StaticEmbedding. It drops unknown tokens, which StaticEmbedding
    would average in, so their row is set to zero: that leaves the sum as it is, and Normalize
    takes the number of tokens out. Texts are neither padded nor cut, as by `StaticEmbedder`.

    Args:
        student: A `SentenceTransformer` or a model2vec `StaticModel`: the `model` of an embedder.
        adapter: Fitted to this student's vectors.
        folder: Where; it must not exist.

    Raises:
        ConchError: The folder exists or cannot be written, or the student's dimension is not the
            adapter's.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    if folder.exists():
        raise ConchError(f"{folder} exists: choose another folder for the exported model")
    if isinstance(student, SentenceTransformer):
        modules = list(student)
        dimension = student.get_embedding_dimension()
        device = str(student.device)
        prompts, prompt_name = student.prompts, student.default_prompt_name
    else:
        modules = [_static_embedding(student)]
        dimension, device, prompts, prompt_name = student.dim, "cpu", None, None
    if dimension != adapter.in_dimension:
        raise ConchError(
            f"the student gives {dimension} dimensions and the adapter maps "
            f"{adapter.in_dimension}: use the student that it was fitted for"
        )
    if not isinstance(modules[-1], Normalize):
        modules.append(Normalize())
    modules += _adapter_modules(adapter)
    model = SentenceTransformer(
        modules=modules, device=device, prompts=prompts, default_prompt_name=prompt_name
    )
    # As in checkpoints: a name that `remove_unfinished` knows, then one rename.
    temporary = folder.with_name(f".writing-{os.getpid()}-{folder.name}")
    try:
        temporary.mkdir(parents=True)
        model.save_pretrained(str(temporary))
        temporary.rename(folder)
    except OSError as error:
        raise ConchError(
            f"cannot write {folder}: {error}. Free some disk space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _static_embedding(student: Any) -> Any:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    # The library changes the tokenizer that it is given; the student keeps its own.
    tokenizer = Tokenizer.from_str(student.tokenizer.to_str())
    tokenizer.no_truncation()
    return StaticEmbedding(tokenizer, embedding_weights=token_vectors(student))


def _adapter_modules(adapter: EmbeddingAdapter) -> list[Any]:
    """The modules after the student's last Normalize; none for the identity."""
    from sentence_transformers.sentence_transformer.modules import Normalize
    from torch import nn, tensor

    modules: list[Any] = []
    if "weight" in adapter.arrays:
        weight, bias = adapter.arrays["weight"], adapter.arrays["bias"]
        modules += [_dense(weight, bias), Normalize()]
    if adapter.kind == "residual":
        inner, outer = adapter.arrays["inner_weight"], adapter.arrays["outer_weight"]
        width, hidden = inner.shape
        carried = np.eye(width, dtype=np.float32)
        bent = _dense(
            np.hstack([np.zeros((width, width), np.float32), inner]),
            np.hstack([np.zeros(width, np.float32), adapter.arrays["inner_bias"]]),
            activation=nn.GELU(),
            use_residual=True,
        )
        past = np.hstack([carried, np.zeros((width, hidden), np.float32)])
        bent.residual.weight = nn.Parameter(tensor(past.T.copy()))
        summed = _dense(np.vstack([carried, outer]), adapter.arrays["outer_bias"])
        modules += [bent, summed, Normalize()]
    return modules


def _dense(
    weight: np.ndarray, bias: np.ndarray, *, activation: Any = None, use_residual: bool = False
) -> Any:
    """`activation(x weight + bias)`; torch keeps weights the other way round."""
    from sentence_transformers.sentence_transformer.modules import Dense
    from torch import tensor

    return Dense(
        *weight.shape,
        activation_function=activation,
        init_weight=tensor(weight.T.copy()),
        init_bias=tensor(bias.copy()),
        use_residual=use_residual,
    )
