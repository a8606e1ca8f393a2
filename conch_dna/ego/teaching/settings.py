"""Settings of a teacher's server.

Knows names, defaults and ranges; nothing of models, so that the command line starts without them.
To add a setting: a field made by `option`, and its use in server.py.
"""

from dataclasses import dataclass

from conch_dna.options.fields import option
from conch_dna.training.settings import LOSS_MEMORY
from conch_dna.web.door import ListenSettings


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(ListenSettings):
    """Where the server listens, who may ask, and how much at once.

    Raises:
        ConchError: As of `ListenSettings`.
    """

    port: int = option(8643, "Port to listen at; 0 takes a free one", low=0, high=65535)
    max_body_bytes: int = option(2**22, "Largest body of a request", low=1)
    max_queue: int = option(64, "Most requests that wait or are answered at once", low=1)
    max_request_tokens: int = option(
        2**16, "Most tokens of a request's prompts and answers together", low=1
    )
    loss_memory: float = option(
        LOSS_MEMORY, "Megabytes for logits and what is made of them", above=0
    )
