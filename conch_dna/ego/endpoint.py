"""A teacher behind an OpenAI-compatible HTTP API: text in, text out.

Knows the chat completions of that API, through the official client; nothing of tokens, local
models or training. Another setting of the API: a field of `EgoConfig`, used in `_request`.
"""

import json
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from conch_dna.ego.settings import EgoAnswer, EgoConfig
from conch_dna.errors import ConchError, EgoUnavailableError
from conch_dna.web.client import ApiClient, Remedies

Turns = list[dict[str, str]]
REMEDIES = Remedies(
    slow="raise timeout_s, or check the server",
    absent="check remote_model, and the address, which often ends in /v1",
    busy="try again later, or raise retries",
)


class Endpoint:
    """One model of an API. Several threads may ask at once.

    Args:
        config: With a URL as model. Answers are drawn with the configuration of each call.

    Raises:
        ConchError: The key would travel unencrypted to another machine.
    """

    def __init__(self, config: EgoConfig) -> None:
        self._config = config
        # The older name of the limit; servers that want the newer one say so.
        self._limit = "max_tokens"
        # Whether it takes a schema; servers that do not say so.
        self._holds = True
        # What makes a stream say its tokens; servers that do not know it say so.
        self._counted: dict[str, Any] = {"stream_options": {"include_usage": True}}
        self._api = ApiClient(
            config.model,
            name=config.name,
            key_env=config.api_key_env,
            timeout_s=config.timeout_s,
            retries=config.retries,
            remedies=REMEDIES,
        )

    def close(self) -> None:
        """Close its connections; the object is of no use afterwards."""
        self._api.close()

    def answer(self, turns: Turns, config: EgoConfig, schema: str | None = None) -> EgoAnswer:
        """Answer one conversation.

        Args:
            turns: The conversation, as objects of role and content.
            config: Length, temperature and seed.
            schema: Of the answer, a JSON schema as JSON text; servers that do not know how to keep
                to it are asked without.

        Raises:
            EgoUnavailableError: The API cannot be reached, gives no access, is busy or broken.
            ConchError: It refuses the request.
        """
        with self._api.explained():
            completion = self._request(turns, config, schema, stream=False)
            try:
                choice = completion.choices[0]
                text, reason = choice.message.content, str(choice.finish_reason)
            except (AttributeError, IndexError, TypeError) as error:
                raise self._api.foreign() from error
            usage = getattr(completion, "usage", None)
        self._check_finish(reason)
        return EgoAnswer(text or "", reason, _tokens(usage))

    def answers(
        self, conversations: Sequence[Turns], config: EgoConfig, schema: str | None = None
    ) -> list[EgoAnswer]:
        """Answer several conversations, some at once; each with the next seed.

        Raises:
            ConchError: The first that fails; EgoUnavailableError where the API is not there.
        """
        configs = [config.reseeded(number) for number in range(len(conversations))]
        with ThreadPoolExecutor(config.batch_size) as pool:
            waiting = [
                pool.submit(self.answer, turns, one, schema)
                for turns, one in zip(conversations, configs, strict=True)
            ]
            try:
                return [future.result() for future in waiting]
            finally:
                # After a failure, what has not begun would only fail too.
                for future in waiting:
                    future.cancel()

    def stream(
        self, turns: Turns, config: EgoConfig, schema: str | None = None
    ) -> Generator[str, bool | None, EgoAnswer]:
        """Pieces of the answer as they come; closing the iterator hangs up, and so does True.

        Returns:
            The answer as far as it came.

        Raises:
            EgoUnavailableError: The API is not there, or the answer breaks off.
            ConchError: It refuses the request.
        """
        reason, tokens, text = None, None, ""
        with self._api.explained():
            chunks = self._request(turns, config, schema, stream=True)
            if not hasattr(chunks, "close"):
                raise self._api.foreign()
            try:
                for chunk in chunks:
                    usage = getattr(chunk, "usage", None)
                    tokens = _tokens(usage) if usage is not None else tokens
                    for choice in getattr(chunk, "choices", None) or ():
                        if choice.delta and choice.delta.content:
                            text += choice.delta.content
                            if (yield choice.delta.content):
                                return EgoAnswer(text, "length", tokens)
                        reason = choice.finish_reason or reason
            finally:
                chunks.close()
        if reason is None:
            raise EgoUnavailableError(
                f"{self._config.name} broke off its answer: ask again, or look at the server's log"
            )
        self._check_finish(str(reason))
        return EgoAnswer(text, str(reason), tokens)

    def _request(self, turns: Turns, config: EgoConfig, schema: str | None, *, stream: bool) -> Any:
        import openai

        limit = self._limit
        arguments: dict[str, Any] = {
            "model": config.remote_model,
            "messages": turns,
            "temperature": config.temperature,
            "seed": config.seed,
            limit: config.max_tokens,
        }
        if stream:
            arguments |= self._counted
        if schema is not None and self._holds:
            form = {"name": "answer", "schema": json.loads(schema)}
            arguments["response_format"] = {"type": "json_schema", "json_schema": form}
        try:
            return self._api.client.chat.completions.create(**arguments, stream=stream)
        except openai.BadRequestError as error:
            if "stream_options" in arguments and "stream_options" in str(error):
                self._counted = {}
            elif "response_format" in arguments and "response_format" in str(error):
                if "invalid schema" in str(error).lower():
                    # One schema is refused where others are kept to.
                    schema = None
                else:
                    self._holds = False
            elif limit == "max_tokens" and "max_completion_tokens" in str(error):
                self._limit = "max_completion_tokens"
            else:
                raise
        return self._request(turns, config, schema, stream=stream)

    def _check_finish(self, reason: str) -> None:
        if reason not in ("stop", "length"):
            raise ConchError(
                f"{self._config.name} gave no whole answer (finish reason {reason}): reword the "
                "prompt"
            )


def _tokens(usage: Any) -> int | None:
    """How many tokens an answer had; None where it does not say."""
    tokens = getattr(usage, "completion_tokens", None)
    return tokens if isinstance(tokens, int) else None
