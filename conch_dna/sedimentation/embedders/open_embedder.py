"""Opens an embedder by its name: sentence-transformers, model2vec or Ollama.

Knows which name means which kind; nothing of how each works.
To add a kind: a module beside ollama.py, a branch in `open_embedder`, a row in the contract tests.
"""

from conch_dna.errors import ConchError
from conch_dna.sedimentation.embedders.contract import Embedder
from conch_dna.sedimentation.embedders.local import open_local
from conch_dna.sedimentation.embedders.ollama import OLLAMA, OllamaEmbedder


def open_embedder(
    name: str,
    *,
    device: str | None = None,
    batch_size: int = 64,
    trust_remote_code: bool = False,
) -> Embedder:
    """The embedder of a name; a local model is found now and loaded when first needed.

    Args:
        name: A folder or hub id of a sentence-transformers or model2vec model, or
            `ollama:<model>`.
        device: cpu, cuda or mps for a sentence-transformers model; chosen where None.
        batch_size: Texts at once.
        trust_remote_code: Let Python code that comes with a model run.

    Raises:
        ConchError: The name means nothing that is here or can be reached, or batch_size is no
            count.
    """
    if batch_size < 1:
        raise ConchError(f"batch_size {batch_size} must be 1 or more")
    if name.startswith(OLLAMA):
        return OllamaEmbedder(name.removeprefix(OLLAMA), batch_size=batch_size)
    return open_local(
        name, device=device, batch_size=batch_size, trust_remote_code=trust_remote_code
    )
