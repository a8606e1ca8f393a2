"""Embedding models for tests: a tiny random BERT, a static model, and a server that speaks Ollama.

Random weights are for contracts only; what a test claims of meaning stands on MiniLM.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu")
WORDS = tuple(first + second for first in SYLLABLES for second in SYLLABLES)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_tiny_teacher(
    folder: Path, *, seed: int = 0, hidden: int = 32, prompts: dict[str, str] | None = None
) -> Path:
    """A random sentence-transformers BERT of 100 words and their syllables, padded as MiniLM is."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    pieces = [*SPECIAL, *WORDS, *SYLLABLES, *(f"##{part}" for part in SYLLABLES), "query", ":"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=16, pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(max_length=16)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        bert = BertModel(config)
    inner = folder.with_name(folder.name + "-bert")
    bert.save_pretrained(inner)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    ).save_pretrained(inner)
    transformer = Transformer(str(inner), max_seq_length=64)
    model = SentenceTransformer(
        modules=[transformer, Pooling(hidden, pooling_mode="mean")], device="cpu", prompts=prompts
    )
    model.save(str(folder), create_model_card=False)
    return folder


def tiny_texts(count: int, *, seed: int = 0, length: int = 5) -> list[str]:
    """Texts of the tiny teacher's words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, length)) for _ in range(count)]


class OllamaServer:
    """What an Ollama server answers, and what it was asked.

    Attributes:
        model: The only model it has.
        dimension: Of its vectors.
        context: Words of the longest input.
        nan: Words whose vector is broken.
        busy: Requests that are yet to be answered with 503.
        requests: Every body that came to /api/embed.
    """

    def __init__(self) -> None:
        self.model, self.digest = "tiny-embed:latest", "a" * 64
        self.dimension, self.context = 8, 20
        self.nan = {"broken"}
        self.busy = 0
        self.requests: list[dict[str, Any]] = []
        self.address = ""

    def vector(self, text: str) -> list[float]:
        """Unnormalised, from the words of the text."""
        total = np.zeros(self.dimension)
        for word in text.split():
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
            total += np.random.default_rng(seed).standard_normal(self.dimension)
        return total.tolist()

    def answer(self, path: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        """Status and JSON."""
        if self.busy:
            self.busy -= 1
            return 503, {"error": "server busy, please try again"}
        if path == "/api/tags":
            return 200, {"models": [{"name": self.model, "digest": self.digest}]}
        assert path == "/api/embed" and body is not None
        self.requests.append(body)
        if body["model"] not in (self.model, self.model.removesuffix(":latest")):
            return 404, {"error": f'model "{body["model"]}" not found, try pulling it first'}
        if any(len(text.split()) > self.context for text in body["input"]):
            assert body["truncate"] is False
            return 400, {"error": "the input length exceeds the context length"}
        if any(self.nan & set(text.split()) for text in body["input"]):
            return 500, {"error": "failed to encode response: json: unsupported value: NaN"}
        return 200, {"embeddings": [self.vector(text) for text in body["input"]]}


@contextmanager
def ollama_server() -> Iterator[OllamaServer]:
    """A server on a free port of this machine, in a thread."""
    server = OllamaServer()

    class Handler(BaseHTTPRequestHandler):
        def _send(self, body: dict[str, Any] | None) -> None:
            status, document = server.answer(self.path, body)
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._send(None)

        def do_POST(self) -> None:
            self._send(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    server.address = f"http://127.0.0.1:{http.server_port}"
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
