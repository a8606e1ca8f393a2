"""Embeddings from an Ollama server, by its /api/embed with truncation off.

Knows that HTTP interface and the prefixes of known models; nothing of what vectors are for.
To teach it a model that wants prefixes: a line in PREFIXES, as the model's card gives them.
"""

import ipaddress
import os
import time
import urllib.parse
from collections.abc import Sequence
from typing import Any

import numpy as np

from conch_dna.checkpoints import content_digest
from conch_dna.errors import ConchError
from conch_dna.sedimentation.embedders.contract import CheckedEmbedder

OLLAMA = "ollama:"
# The server adds none of its own. Model: before queries, before documents.
PREFIXES = {
    "embeddinggemma": ("task: search result | query: ", "title: none | text: "),
    "mxbai-embed-large": ("Represent this sentence for searching relevant passages: ", ""),
    "nomic-embed-text": ("search_query: ", "search_document: "),
    "snowflake-arctic-embed": ("Represent this sentence for searching relevant passages: ", ""),
    "snowflake-arctic-embed2": ("query: ", ""),
}
# Too long is 400 or 413, by version 500; what else is wrong with one text is 400 or 500.
_ABOUT_THE_TEXT = {400, 413, 500}
_BUSY = {429, 502, 503, 504}


def server_address(host: str | None) -> str:
    """The URL that OLLAMA_HOST means, by the rules of Ollama's own client.

    >>> server_address(None), server_address("0.0.0.0"), server_address("https://example.com")
    ('http://127.0.0.1:11434', 'http://127.0.0.1:11434', 'https://example.com:443')

    Raises:
        ConchError: It is no address.
    """
    text = (host or "").strip()
    scheme, _, rest = text.rpartition("://")
    try:
        port = {"": 11434, "http": 80, "https": 443}[scheme]
        parts = urllib.parse.urlsplit(f"//{rest}")
        port = parts.port or port
    except (KeyError, ValueError) as error:
        raise ConchError(
            f"OLLAMA_HOST is {text!r}, which is no address: write host, host:port or "
            "http://host:port"
        ) from error
    name = parts.hostname or "127.0.0.1"
    try:
        address = ipaddress.ip_address(name)
        if address.is_unspecified:
            # Servers listen on it; nobody can be reached there.
            address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
        name = f"[{address}]" if address.version == 6 else str(address)
    except ValueError:
        pass
    return f"{scheme or 'http'}://{name}:{port}{parts.path.rstrip('/')}"


class _Refused(Exception):
    """The server answered, and the answer is no; the message is its reason."""


class OllamaEmbedder(CheckedEmbedder):
    """A model on an Ollama server.

    A batch that is refused is sent again text by text, so that one too long text is an error of
    that text alone. A server that is down or busy is asked again after each wait.

    Args:
        model: Its name there, such as `nomic-embed-text`; without a tag it is `latest`.
        host: Address as in OLLAMA_HOST, which is read where this is None.
        batch_size: Texts in one request.
        timeout_s: Of one request; the first may have to load the model.
        waits_s: Seconds before each further try.

    Raises:
        ConchError: The server is down, has no such model, or the model gives no embeddings.
    """

    def __init__(
        self,
        model: str,
        *,
        host: str | None = None,
        batch_size: int = 64,
        timeout_s: float = 300.0,
        waits_s: Sequence[float] = (0.5, 1.0, 2.0),
    ) -> None:
        if not model:
            raise ConchError("ollama: names no model: write one, such as ollama:nomic-embed-text")
        self.model = model
        self.address = server_address(os.environ.get("OLLAMA_HOST") if host is None else host)
        self.batch_size = batch_size
        self._timeout_s = timeout_s
        self._waits_s = tuple(waits_s)
        self.prefixes = PREFIXES.get(model.split("/")[-1].split(":")[0], ("", ""))
        self._model_digest = self._find_model()
        try:
            self._dimension = self._request_vectors(["dimension"]).shape[1]
        except _Refused as error:
            raise ConchError(
                f"{self.name} gives no embeddings: {error}. Choose an embedding model"
            ) from error

    @property
    def name(self) -> str:
        """`ollama:` and the model's name."""
        return OLLAMA + self.model

    @property
    def dimension(self) -> int:
        """D, as the server's first answer had it."""
        return self._dimension

    @property
    def digest(self) -> str:
        """Content address: the server's digest of the model, and the prefixes."""
        return content_digest("ollama", self._model_digest, *self.prefixes)

    def _find_model(self) -> str:
        tagged = self.model if ":" in self.model.split("/")[-1] else f"{self.model}:latest"
        try:
            models = self._request("/api/tags").get("models", [])
            digests = {str(model["name"]): str(model["digest"]) for model in models}
        except (_Refused, TypeError, KeyError, AttributeError) as error:
            raise ConchError(
                f"{self.address} does not answer as Ollama does: check OLLAMA_HOST"
            ) from error
        if tagged not in digests:
            raise ConchError(
                f"Ollama at {self.address} has no model {tagged}: run `ollama pull {self.model}`; "
                f"it has {', '.join(sorted(digests)) or 'none'}"
            )
        return digests[tagged]

    def _encode(self, texts: list[str], *, queries: bool) -> tuple[np.ndarray, dict[int, str]]:
        prefix = self.prefixes[0 if queries else 1]
        rows = np.full((len(texts), self.dimension), np.nan)
        errors: dict[int, str] = {}
        for start in range(0, len(texts), self.batch_size):
            batch = [prefix + text for text in texts[start : start + self.batch_size]]
            try:
                rows[start : start + len(batch)] = self._same_dimension(batch)
            except _Refused:
                for number, text in enumerate(batch, start):
                    try:
                        rows[number] = self._same_dimension([text])[0]
                    except _Refused as error:
                        errors[number] = f"{self.name} refuses it: {error}"
        return rows, errors

    def _same_dimension(self, texts: list[str]) -> np.ndarray:
        vectors = self._request_vectors(texts)
        if vectors.shape[1] != self.dimension:
            raise ConchError(
                f"{self.name} now gives {vectors.shape[1]} dimensions and gave {self.dimension}: "
                "the model on the server was exchanged, open it again"
            )
        return vectors

    def _request_vectors(self, texts: list[str]) -> np.ndarray:
        answer = self._request(
            "/api/embed", {"model": self.model, "input": texts, "truncate": False}
        )
        try:
            vectors = np.asarray(answer["embeddings"], np.float64)
            if vectors.ndim != 2 or len(vectors) != len(texts):
                raise ValueError(f"shape {list(vectors.shape)} for {len(texts)} texts")
        except (KeyError, TypeError, ValueError) as error:
            raise ConchError(
                f"{self.address} does not answer as Ollama does ({error}): check OLLAMA_HOST"
            ) from error
        return vectors

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The server's JSON; asked again while it is down or busy."""
        import httpx

        reason = ""
        for wait_s in (0.0, *self._waits_s):
            time.sleep(wait_s)
            try:
                answer = httpx.request(
                    "GET" if body is None else "POST",
                    self.address + path,
                    json=body,
                    timeout=self._timeout_s,
                    follow_redirects=True,
                    # A proxy for the world outside must not be asked for a server on this machine.
                    trust_env=not _is_this_machine(self.address),
                )
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                reason = str(error) or type(error).__name__
                continue
            if answer.status_code not in _BUSY:
                return self._content(answer, is_about_text=body is not None)
            reason = _reason(answer)
        raise ConchError(
            f"Ollama at {self.address} does not answer ({reason}): start it with `ollama serve`, "
            "or let OLLAMA_HOST name where it runs"
        )

    def _content(self, answer: Any, *, is_about_text: bool) -> Any:
        if answer.is_success:
            try:
                return answer.json()
            except ValueError as error:
                raise ConchError(
                    f"{self.address} does not answer as Ollama does: check OLLAMA_HOST"
                ) from error
        if is_about_text and answer.status_code not in _ABOUT_THE_TEXT:
            raise ConchError(f"Ollama at {self.address} refuses {self.name}: {_reason(answer)}")
        raise _Refused(_reason(answer))


def _reason(answer: Any) -> str:
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {answer.status_code} {answer.text[:200]}".strip()


def _is_this_machine(address: str) -> bool:
    host = urllib.parse.urlsplit(address).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")
