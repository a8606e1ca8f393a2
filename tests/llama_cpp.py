"""llama.cpp, as its package xllamacpp has it, for tests and benchmarks of GGUF files."""

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class LlamaCpp:
    """llama.cpp in this process, on one thread, with whole numbers wherever it can.

    Args:
        model: A GGUF file.
        lora: An adapter's GGUF file.
        plain: A token that is text by itself, such as a letter.
    """

    def __init__(self, model: Path, lora: Path | None = None, *, plain: int = 5) -> None:
        import xllamacpp as llama

        params = llama.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.verbosity, params.warmup = 512, 1, -1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if lora:
            params.lora_adapters = [llama.CommonAdapterLoraInfo(str(lora), 1.0)]
        self.server = llama.Server(params)
        self._plain = plain

    def likeliest(self, ids: Sequence[int], count: int) -> dict[int, float]:
        """Log-probabilities of the likeliest tokens after a text."""
        # A negative temperature is llama.cpp's word for log-probabilities as they are. What is
        # drawn matters to none of them, but an end or a part of a letter is told without any.
        found = self.ask(
            "completion",
            prompt=list(ids),
            n_predict=1,
            n_probs=count,
            temperature=-1.0,
            logit_bias=[[self._plain, 1000.0]],
        )
        (first,) = found["completion_probabilities"]
        return {each["id"]: each["logprob"] for each in first["top_logprobs"]}

    def log_probabilities(self, ids: Sequence[int], size: int) -> np.ndarray:
        """Of all tokens after each of a text: `[tokens, size]`."""
        rows = np.full((len(ids), size), np.nan)
        for place, row in enumerate(rows):
            for token, value in self.likeliest(ids[: place + 1], size).items():
                row[token] = value
        return rows

    def tokens(self, text: str) -> list[int]:
        """How it reads a text."""
        found = self.ask("tokenize", content=text, add_special=True, parse_special=True)
        return list(found["tokens"])

    def ask(self, path: str, **body: Any) -> Any:
        """What its server answers."""
        request = urllib.request.Request(
            f"{self.server.listening_address}/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as found:
            return json.load(found)
