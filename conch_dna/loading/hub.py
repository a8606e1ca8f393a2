"""Models of the hub: what is downloaded of them, and its errors in one line.

Knows huggingface_hub, nothing of models. To tell another error of the hub apart: an `except` in
`hub_errors`, before the more general ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conch_dna.errors import ConchError

EMBEDDED_HINT = "embedded:teacher and embedded:student run without a network"


def download(model_id: str, *, weights: bool) -> Path:
    """A model's folder in the hub's cache, downloaded where it is not there.

    Args:
        model_id: On the hub, such as organisation/name.
        weights: Download the weights too, not only configuration and tokenizer.

    Raises:
        ConchError: See `hub_errors`.
    """
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", "*.jsonl", "*.jinja"]
    patterns += ["model*.safetensors", "*.py"] if weights else []
    otherwise = f"give a folder, or use the embedded pair ({EMBEDDED_HINT})"
    with hub_errors(model_id, otherwise=otherwise):
        return Path(snapshot_download(model_id, allow_patterns=patterns))


@contextmanager
def hub_errors(model_id: str, *, otherwise: str) -> Iterator[None]:
    """Turns the errors of a download into one line.

    Args:
        model_id: What is downloaded, for the message.
        otherwise: What to do without the hub, as the end of "check the network, …".

    Raises:
        ConchError: The hub has no such model, asks for a login, or could not be reached.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise ConchError(
            f"the hub asks for a login and a licence agreement for {model_id}: accept it on the "
            "model's page, then run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConchError(
            f"the hub has no model {model_id}: check the name; no folder is called so either"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConchError(
            f"the hub could not be reached for {model_id} (no folder is called so), and it is not "
            f"in the local cache: check the network, {otherwise}"
        ) from error
