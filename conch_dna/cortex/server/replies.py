"""What clients are answered in OpenAI's API: whole, and as streams.

Knows the API as JSON, and answers; nothing of HTTP, models or threads. What clients are to learn of
an answer beyond that API: a field of `Answer`. Replies of another address: a class like
`ChatReplies`.
"""

import json
import time
import uuid
from codecs import getincrementaldecoder
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from conch_dna.cortex.answer import Answer
from conch_dna.cortex.engine.batching import Piece

DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting\n\n"
WARNING_HEADER = "x-conch-warning"
# So many names of fields that are not known are told in it.
_MOST_NAMES = 8
# Of an answer, what stands elsewhere in the reply.
_ELSEWHERE = (
    "domain",
    "text",
    "finish_reason",
    "calls",
    "tokens",
    "prompt_tokens",
    "completion_tokens",
)


class ChatReplies:
    """Replies to one chat request, which share an id.

    Args:
        model: As the client named it.
        texts: The bytes of every token, where log-probabilities were asked for.
        counts: Whether a stream ends with the numbers of tokens.
    """

    kind, chunk_kind, mark = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, model: str, texts: Sequence[bytes], *, counts: bool) -> None:
        self._head = {
            "id": f"{self.mark}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._texts = texts
        self._usage = {"usage": None} if counts else {}

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """All answers at once."""
        choices = [
            self._choice(index, self._whole_choice(answer), answer.tokens, answer.finish_reason)
            for index, answer in enumerate(answers)
        ]
        reply = {
            **self._head,
            "object": self.kind,
            "choices": choices,
            "usage": self._counted(answers),
        }
        if len(answers) == 1:
            return {**reply, "conch": _conch(answers[0])}
        for choice, answer in zip(choices, answers, strict=True):
            choice["conch"] = _conch(answer)
        return reply

    def _counted(self, answers: Sequence[Answer]) -> dict[str, int] | None:
        return usage_of(answers)

    def begin(self, index: int) -> bytes:
        """What a streamed answer begins with."""
        return self._event([self._choice(index, {"delta": {"role": "assistant", "content": ""}})])

    def part(self, index: int, text: str, tokens: Sequence[Piece] | None) -> bytes:
        """More of a streamed answer."""
        return self._event([self._choice(index, self._part_choice(text), tokens)])

    def end(self, index: int, answer: Answer, tokens: Sequence[Piece] | None) -> bytes:
        """The end of a streamed answer, whose text was sent before.

        Args:
            index: Which of them.
            answer: The whole.
            tokens: Those that were not told of yet.
        """
        rest = self._end_choice(answer)
        choice = self._choice(index, rest, tokens, answer.finish_reason)
        return self._event([choice], conch=_conch(answer))

    def last(self, answers: Sequence[Answer]) -> bytes:
        """The end of a stream, with the numbers of tokens where they were asked for."""
        return (self._event([], usage=self._counted(answers)) if self._usage else b"") + DONE

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        head = {**self._head, "object": self.chunk_kind, "choices": choices}
        return server_sent_event({**head, **self._usage, **more})

    def _choice(
        self,
        index: int,
        text: Mapping[str, Any],
        tokens: Sequence[Piece] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        log_probs = None if tokens is None else self._log_probs(tokens)
        return {"index": index, **text, "logprobs": log_probs, "finish_reason": finish_reason}

    def _whole_choice(self, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.calls:
            message |= {"content": answer.text or None, "tool_calls": _calls(answer)}
        return {"message": message}

    def _part_choice(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def _end_choice(self, answer: Answer) -> dict[str, Any]:
        calls = [{"index": index, **call} for index, call in enumerate(_calls(answer))]
        return {"delta": {"tool_calls": calls} if calls else {}}

    def _log_probs(self, tokens: Sequence[Piece]) -> dict[str, Any]:
        content = [
            {
                **self._token(piece.token, piece.log_prob),
                "top_logprobs": [self._token(*each) for each in piece.top],
            }
            for piece in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, log_prob: float) -> dict[str, Any]:
        text = self._texts[token]
        return {"token": text.decode(errors="replace"), "logprob": log_prob, "bytes": list(text)}


class TextReplies(ChatReplies):
    """Replies to one request for texts.

    Args:
        model: As the client named it.
        texts: The bytes of every token, where log-probabilities were asked for.
        prompts: For each answer what stands before its text: the prompt, where it is told.
        asked: How many prompts there are.
        counts: Whether a stream ends with the numbers of tokens.
    """

    kind = chunk_kind = "text_completion"
    mark = "cmpl"

    def __init__(
        self,
        model: str,
        texts: Sequence[bytes],
        prompts: Sequence[str],
        *,
        asked: int,
        counts: bool,
    ) -> None:
        super().__init__(model, texts, counts=counts)
        self._asked = asked
        self._prompts = prompts
        self._offsets = [0] * len(prompts)
        # Some tokens are parts of a character.
        self._decoders = [getincrementaldecoder("utf-8")("replace") for _ in prompts]

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """All answers at once."""
        reply = super().whole(answers)
        for choice, prompt in zip(reply["choices"], self._prompts, strict=True):
            choice["text"] = prompt + choice["text"]
        return reply

    def _counted(self, answers: Sequence[Answer]) -> dict[str, int] | None:
        return usage_of(answers, self._asked)

    def begin(self, index: int) -> bytes:
        """The prompt, where it is told."""
        prompt = self._prompts[index]
        return self.part(index, prompt, None) if prompt else b""

    def _whole_choice(self, answer: Answer) -> dict[str, Any]:
        return {"text": answer.text}

    def _part_choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _end_choice(self, answer: Answer) -> dict[str, Any]:
        return {"text": ""}

    def _choice(
        self,
        index: int,
        text: Mapping[str, Any],
        tokens: Sequence[Piece] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = super()._choice(index, text, tokens, finish_reason)
        if tokens is not None:
            starts = choice["logprobs"]["text_offset"] = []
            for piece in tokens:
                starts.append(self._offsets[index])
                self._offsets[index] += len(self._decoders[index].decode(self._texts[piece.token]))
        return choice

    def _log_probs(self, tokens: Sequence[Piece]) -> dict[str, Any]:
        return {
            "tokens": [self._name(piece.token) for piece in tokens],
            "token_logprobs": [piece.log_prob for piece in tokens],
            "top_logprobs": [
                {self._name(token): log_prob for token, log_prob in piece.top} for piece in tokens
            ],
        }

    def _name(self, token: int) -> str:
        return self._texts[token].decode(errors="replace")


def warning_header(names: Sequence[str]) -> dict[str, str]:
    """The header that names fields of a request that were left out of account."""
    if not names:
        return {}
    told = [name if name.isascii() and name.isprintable() else repr(name) for name in names]
    told = [quote(name[:64], safe="._-[] ") for name in told[:_MOST_NAMES]]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return {WARNING_HEADER: f"not known here and ignored: {', '.join(told)}{more}"}


def server_sent_event(value: Any) -> bytes:
    """A server-sent event with a JSON value."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def model_entry(name: str, created: int) -> dict[str, Any]:
    """What /v1/models says of one of them."""
    return {"id": name, "object": "model", "created": created, "owned_by": "conch_dna"}


def usage_of(answers: Sequence[Answer], prompts: int = 1) -> dict[str, int] | None:
    """Tokens read and written for several answers; None where they are not known.

    A prompt counts once however many answers it has, with what was read for a repair.

    Args:
        answers: Of each prompt as many, one prompt after the other.
        prompts: How many there are.
    """
    read = [answer.prompt_tokens for answer in answers]
    written = [answer.completion_tokens for answer in answers]
    if None in read or None in written:
        return None
    each = len(answers) // prompts
    known = [count or 0 for count in read]
    prompt = sum(max(known[start : start + each]) for start in range(0, len(known), each))
    completion = sum(count or 0 for count in written)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _calls(answer: Answer) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{uuid.uuid4().hex}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in answer.calls
    ]


def _conch(answer: Answer) -> dict[str, Any]:
    """Who answered and why, how sure it is, and what its check found."""
    return {name: value for name, value in answer.to_json().items() if name not in _ELSEWHERE}
