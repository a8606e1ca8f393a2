"""What the server says, in the shapes of OpenAI's chat API, with a field `conch` of its own.

Knows answers and JSON; nothing of HTTP, models or threads. What clients are to learn of an answer
beyond that API: a key in `reply_of`.
"""

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from conch_dna.cortex.turn import Answer
from conch_dna.ego.settings import EgoAnswer

DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting\n\n"
# Of an answer, what stands elsewhere in the reply.
_ELSEWHERE = ("domain", "text", "finish_reason", "prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class Reply:
    """A whole answer of a neuron or of EGO.

    Attributes:
        text: The answer.
        finish_reason: "stop" or "length".
        prompt_tokens: None where EGO does not tell.
        completion_tokens: Likewise.
        conch: Who answered and why, how sure it is, and what its check found.
    """

    text: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    conch: dict[str, Any]

    @property
    def usage(self) -> dict[str, int] | None:
        """Numbers of tokens; None where they are not known."""
        if self.prompt_tokens is None or self.completion_tokens is None:
            return None
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


def reply_of(answer: Answer) -> Reply:
    """A neuron's answer, or EGO's in its place."""
    told = {name: value for name, value in answer.to_json().items() if name not in _ELSEWHERE}
    return Reply(
        answer.text,
        answer.finish_reason,
        answer.prompt_tokens,
        answer.completion_tokens,
        told,
    )


def reply_of_ego(answer: EgoAnswer, prompt_tokens: int | None, seconds: float) -> Reply:
    """The answer of EGO where it was the model that was asked for."""
    asked = Answer(
        domain="",
        text=answer.text,
        answered_by="ego",
        reason="EGO was asked for",
        finish_reason=answer.finish_reason,
        seconds=seconds,
    )
    told = reply_of(asked).conch
    return Reply(answer.text, answer.finish_reason, prompt_tokens, answer.tokens, told)


class Shapes:
    """Replies to one request, which share an id.

    Args:
        model: As the client named it.
    """

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def completion(self, reply: Reply) -> dict[str, Any]:
        """The whole answer at once."""
        message = {"role": "assistant", "content": reply.text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": reply.finish_reason,
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": reply.usage,
            "conch": reply.conch,
        }

    def chunk(self, delta: dict[str, str], *, finish: str | None = None, **more: Any) -> bytes:
        """A part of a streamed answer, as the event that is sent."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._event(choices=[choice], **more)

    def usage(self, reply: Reply) -> bytes:
        """The event with the numbers of tokens."""
        return self._event(choices=[], usage=reply.usage)

    def _event(self, **more: Any) -> bytes:
        return event({**self._head, "object": "chat.completion.chunk", **more})


def event(value: Any) -> bytes:
    """A server-sent event with a JSON value."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def model_list(names: Iterable[str], created: int) -> dict[str, Any]:
    """What /v1/models says."""
    return {"object": "list", "data": [model_entry(name, created) for name in names]}


def model_entry(name: str, created: int) -> dict[str, Any]:
    """What it says of one of them."""
    return {"id": name, "object": "model", "created": created, "owned_by": "conch_dna"}


def unknown_model(name: str, known: Sequence[str]) -> str:
    """Why there is no answer of a model that is not there."""
    return f"there is no model {name!r}: there is {', '.join(known)}"
