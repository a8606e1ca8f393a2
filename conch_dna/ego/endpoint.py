"""A teacher behind an OpenAI-compatible HTTP API: text in, text out.

Knows the chat completions of that API, through the official client; nothing of tokens, local
models or training. To tell another refusal of the API in one line: a branch in `_explained`.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from conch_dna.ego.settings import EgoAnswer, EgoConfig
from conch_dna.errors import ConchError, EgoUnavailableError

Turns = list[dict[str, str]]
# What the client asks for where there is no key; servers that want none do not look at it.
_NO_KEY = "none"


class Endpoint:
    """One model of an API. Several threads may ask at once.

    Args:
        config: With a URL as model. Answers are drawn with the configuration of each call.

    Raises:
        ConchError: The key would travel unencrypted to another machine.
    """

    def __init__(self, config: EgoConfig) -> None:
        import openai

        self._config = config
        key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
        if key and not config.on_this_machine and config.model.lower().startswith("http://"):
            raise ConchError(
                f"the key in {config.api_key_env} would go unencrypted to {config.model}: use "
                "https://, or an empty api_key_env if the server wants no key"
            )
        self._key = key
        # The older name of the limit; servers that want the newer one say so.
        self._limit = "max_tokens"
        self._client = openai.OpenAI(
            base_url=config.model,
            api_key=key or _NO_KEY,
            timeout=config.timeout_s,
            max_retries=config.retries,
            # A proxy for the world outside must not be asked for a server on this machine.
            http_client=openai.DefaultHttpxClient(trust_env=not config.on_this_machine),
        )

    def close(self) -> None:
        """Close its connections; the object is of no use afterwards."""
        self._client.close()

    def answer(self, turns: Turns, config: EgoConfig) -> EgoAnswer:
        """Answer one conversation.

        Args:
            turns: The conversation, as objects of role and content.
            config: Length, temperature and seed.

        Raises:
            EgoUnavailableError: The API cannot be reached, gives no access, is busy or broken.
            ConchError: It refuses the request.
        """
        with self._explained():
            completion = self._request(turns, config, stream=False)
            try:
                choice = completion.choices[0]
                text, reason = choice.message.content, str(choice.finish_reason)
            except (AttributeError, IndexError, TypeError) as error:
                raise self._foreign() from error
            usage = getattr(completion, "usage", None)
        self._check_finish(reason)
        tokens = getattr(usage, "completion_tokens", None)
        return EgoAnswer(text or "", reason, tokens if isinstance(tokens, int) else None)

    def answers(self, conversations: Sequence[Turns], config: EgoConfig) -> list[EgoAnswer]:
        """Answer several conversations, some at once; each with the next seed.

        Raises:
            ConchError: The first that fails; EgoUnavailableError where the API is not there.
        """
        configs = [config.reseeded(number) for number in range(len(conversations))]
        with ThreadPoolExecutor(config.batch_size) as pool:
            waiting = [
                pool.submit(self.answer, turns, one)
                for turns, one in zip(conversations, configs, strict=True)
            ]
            try:
                return [future.result() for future in waiting]
            finally:
                # After a failure, what has not begun would only fail too.
                for future in waiting:
                    future.cancel()

    def stream(self, turns: Turns, config: EgoConfig) -> Iterator[str]:
        """Pieces of the answer as they come; closing the iterator hangs up.

        Raises:
            EgoUnavailableError: The API is not there, or the answer breaks off.
            ConchError: It refuses the request.
        """
        reason = None
        with self._explained():
            chunks = self._request(turns, config, stream=True)
            if not hasattr(chunks, "close"):
                raise self._foreign()
            try:
                for chunk in chunks:
                    for choice in getattr(chunk, "choices", None) or ():
                        if choice.delta and choice.delta.content:
                            yield choice.delta.content
                        reason = choice.finish_reason or reason
            finally:
                chunks.close()
        if reason is None:
            raise EgoUnavailableError(
                f"{self._config.name} broke off its answer: ask again, or look at the server's log"
            )
        self._check_finish(str(reason))

    def _request(self, turns: Turns, config: EgoConfig, *, stream: bool) -> Any:
        import openai

        limit = self._limit
        arguments: dict[str, Any] = {
            "model": config.remote_model,
            "messages": turns,
            "temperature": config.temperature,
            "seed": config.seed,
            limit: config.max_tokens,
        }
        try:
            return self._client.chat.completions.create(**arguments, stream=stream)
        except openai.BadRequestError as error:
            if limit == "max_completion_tokens" or "max_completion_tokens" not in str(error):
                raise
        self._limit = "max_completion_tokens"
        return self._request(turns, config, stream=stream)

    def _check_finish(self, reason: str) -> None:
        if reason not in ("stop", "length"):
            raise ConchError(
                f"{self._config.name} gave no whole answer (finish reason {reason}): reword the "
                "prompt"
            )

    def _foreign(self) -> EgoUnavailableError:
        return EgoUnavailableError(
            f"{self._config.name} does not answer as an OpenAI-compatible API does: check the "
            "address, which often ends in /v1"
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Tell the client's errors as ours."""
        import openai

        config = self._config
        try:
            yield
        except openai.APITimeoutError as error:
            raise EgoUnavailableError(
                f"{config.name} gave nothing for {config.timeout_s:g} s, {config.retries + 1} "
                "times: raise timeout_s, or check the server"
            ) from error
        except openai.APIConnectionError as error:
            raise EgoUnavailableError(
                f"{config.name} cannot be reached ({self._reason(error.__cause__ or error)}): "
                "check the address, and that the server runs"
            ) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            variable = config.api_key_env or "api_key_env, which is empty"
            raise EgoUnavailableError(
                f"{config.name} refuses access ({self._reason(error)}): check the key in {variable}"
            ) from error
        except openai.NotFoundError as error:
            raise EgoUnavailableError(
                f"{config.name} is not there ({self._reason(error)}): check remote_model, and the "
                "address, which often ends in /v1"
            ) from error
        except (openai.RateLimitError, openai.InternalServerError) as error:
            raise EgoUnavailableError(
                f"{config.name} is busy or broken ({self._reason(error)}), after "
                f"{config.retries + 1} tries: try again later, or raise retries"
            ) from error
        except openai.APIStatusError as error:
            raise ConchError(
                f"{config.name} refuses the request ({self._reason(error)}): change it"
            ) from error
        except openai.APIError as error:
            raise EgoUnavailableError(
                f"{config.name} failed ({self._reason(error)}): ask again, or look at its log"
            ) from error
        except (openai.OpenAIError, ValueError) as error:
            # The client lets through what its JSON parser says of a body that is none.
            raise self._foreign() from error

    def _reason(self, error: BaseException) -> str:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        return text.replace(self._key, "***") if self._key else text
