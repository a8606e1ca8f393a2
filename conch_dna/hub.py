"""What goes wrong with a download from the model hub, in one line that says what to do.

Knows the hub's errors; nothing of which files are wanted, or what for.
To tell another of its errors apart: an `except` in `hub_errors`, before the more general ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from conch_dna.errors import ConchError


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
        raise ConchError(f"the hub has no model {model_id}: check the name") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConchError(
            f"the hub could not be reached for {model_id}, and it is not in the local cache: "
            f"check the network, {otherwise}"
        ) from error
