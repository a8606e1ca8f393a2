"""Adapters in the files of other programs, and from them: written whole, and read back.

Knows folders and files; the forms themselves stand in the modules beside it. Another form: a
function here.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx

from conch_dna.checkpoints import (
    provenance,
    write_atomically,
    write_folder,
)
from conch_dna.errors import ConchError
from conch_dna.exporting.gguf_lora import architecture_of, write_gguf_lora
from conch_dna.exporting.gguf_model import write_gguf_model
from conch_dna.exporting.modelfile import modelfile
from conch_dna.exporting.peft import CONFIG_FILE, WEIGHTS_FILE, from_peft, to_peft
from conch_dna.exporting.quantised import Precision, fuse_in_place
from conch_dna.exporting.source import AdapterSource
from conch_dna.language_model import ModelSource, named_arrays
from conch_dna.screen.progress import Report, silent
from conch_dna.training.adapters import adapter_tensors, outline, save_adapter
from conch_dna.training.students.student_folder import require_free


def export_peft(adapter: AdapterSource, folder: Path, *, name: str) -> None:
    """Write an adapter as PEFT saves one.

    Args:
        adapter: That fits its model; else it is refused.
        folder: Where to; it must not be there.
        name: What PEFT is to open the model by; empty for the adapter's own.

    Raises:
        ConchError: See `to_peft`; or the folder is there or cannot be written.
    """
    require_free(folder)
    arrays, document = to_peft(
        _tensors(adapter),
        adapter.document,
        tied=bool(adapter.base.config.get("tie_word_embeddings")),
        base=name or adapter.base.openable_name,
    )
    write_folder(folder, arrays={WEIGHTS_FILE: arrays}, documents={CONFIG_FILE: document})


def export_gguf_lora(adapter: AdapterSource, path: Path) -> None:
    """Write an adapter as llama.cpp opens one beside a model's GGUF file.

    Args:
        adapter: That fits its model; else it is refused.
        path: Of the file; it must not be there.

    Raises:
        ConchError: See `write_gguf_lora`; or the file is there or cannot be written.
    """
    require_free(path)
    tensors = _tensors(adapter)
    write_atomically(
        path, lambda file: write_gguf_lora(file, tensors, adapter.document, adapter.base)
    )


def export_gguf(adapter: AdapterSource, path: Path, kind: str, report: Report) -> None:
    """Write an adapter in its model as one GGUF file, and a Modelfile beside it.

    Args:
        adapter: That fits its model; else it is refused.
        path: Of the file; neither it nor another Modelfile of its name must be there.
        kind: Of its numbers; see `settings.GGUF_KINDS`.
        report: Gets the progress, and what the Modelfile lacks.

    Raises:
        ConchError: See `write_gguf_model`; or a file is there or cannot be written.
    """
    require_free(path)
    beside = modelfile_path(path)
    architecture_of(adapter.base)
    text, lacks = modelfile(adapter, path.name)
    if not _holds(beside, text):
        require_free(beside)
    for lack in lacks:
        report("message", {"message": f"warning: {beside.name}: {lack}"})
    _, adapted = adapter.load()
    fuse_in_place(adapted, Precision(bits=None, own={}), None, report)
    weights = named_arrays(adapted.model.parameters())
    write_atomically(beside, text)
    with ExitStack() as undo:
        undo.callback(beside.unlink)
        write_atomically(
            path, lambda file: write_gguf_model(file, adapter.base, weights, kind, report)
        )
        undo.pop_all()


def _holds(path: Path, text: str) -> bool:
    """Whether a file says just that, as one does that an export left which was killed."""
    try:
        return path.read_bytes() == text.encode()
    except OSError:
        return False


def modelfile_path(path: Path) -> Path:
    """Where the Modelfile of a GGUF file lies: thinking.Modelfile beside thinking.gguf."""
    return path.with_name(f"{path.name.removesuffix('.gguf')}.Modelfile")


def import_peft(folder: Path, output: Path, base: ModelSource) -> None:
    """Write an adapter that PEFT saved as mlx_lm opens one; it is read back onto its model.

    Args:
        folder: That PEFT saved.
        output: Where to; it must not be there.
        base: The model that it is for.

    Raises:
        ConchError: See `from_peft`; or it does not fit the model, or the folder is there.
    """
    require_free(output)
    outlined = outline(base)
    if outlined is None:
        raise ConchError(f"the weights of {base.model_id} are not here: download it first")
    tensors, document = from_peft(folder, base, outlined)
    document["model"] = base.openable_name
    document["conch_dna"] = {
        "student": base.model_id,
        "student_digest": base.weights_digest,
        "imported": str(folder),
        **provenance(),
    }

    def look(written: Path) -> None:
        bare, _ = AdapterSource(written, base, silent).load()
        bare.release()

    save_adapter(output, tensors, document, look=look)


def _tensors(adapter: AdapterSource) -> dict[str, mx.array]:
    """An adapter's tensors, float32, after a look whether they fit the model."""
    bare, adapted = adapter.load()
    full = adapter.document.get("fine_tune_type") == "full"
    found: dict[str, Any] = {} if full else adapter_tensors(adapted.model)
    found = {name: value.astype(mx.float32) for name, value in found.items()}
    mx.eval(found)
    bare.release()
    return found
