"""JSON schemas as grammars, by llguidance: an answer keeps to its form, token by token.

Knows token ids, log-probabilities and schemas as JSON texts; nothing of domains, text or servers.
Another kind of form than JSON: a branch in `Grammars._compiled`.
"""

import json
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from conch_dna.errors import ConchError, one_line

if TYPE_CHECKING:
    from llguidance import LLMatcher

# Grammars of so many schemas are kept; each takes some milliseconds to make.
KEPT = 64
MAX_SCHEMA_BYTES = 100_000
# Between the parts of an object a model may write one space, or break the line and indent: one that
# was never taught JSON would write spaces for ever.
WHITESPACE = r" |\n {0,12}"


class Grammars:
    """Grammars for one tokenizer; each is made once. For any thread.

    Args:
        tokenizer: As mlx_lm wraps it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: Any = None
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        # Of what is kept, and of making more.
        self._lock, self._making = threading.Lock(), threading.Lock()
        self.ends: frozenset[int] = frozenset(tokenizer.eos_token_ids)

    def matcher(self, form: str) -> "LLMatcher":
        """A grammar at its beginning.

        Args:
            form: A JSON schema as JSON text, or a grammar in llguidance's Lark. Keywords of a
                schema that no grammar can hold, such as uniqueItems, are left to whoever checks the
                whole answer; objects get no keys that it does not name, unless it speaks of others.

        Raises:
            ConchError: It is too long, cannot be compiled, or no text can keep to it; or the
                tokenizer is of a kind that llguidance does not read.
        """
        # Some take seconds to make; whoever asks for one that there is does not wait for those.
        if (kept := self._copy(form)) is not None:
            return kept
        with self._making:
            if (kept := self._copy(form)) is not None:
                return kept
            made = self._compiled(form)
            with self._lock:
                self._kept[form] = made
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
                copy: LLMatcher = made.deep_copy()
                return copy

    def _copy(self, form: str) -> "LLMatcher | None":
        with self._lock:
            if form not in self._kept:
                return None
            self._kept.move_to_end(form)
            return self._kept[form].deep_copy()

    def _compiled(self, form: str) -> "LLMatcher":
        from llguidance import LLMatcher

        size = len(form.encode())
        if size > MAX_SCHEMA_BYTES:
            raise ConchError(
                f"the answer's JSON schema has {size:,} bytes: at most {MAX_SCHEMA_BYTES:,} are "
                "taken; leave out what the answer does not need"
            )
        if self._tokens is None:
            self._tokens = self._read_tokenizer()
        try:
            forms = [self._grammar(each) for each in _forms(form)]
        except ValueError as error:
            raise ConchError(f"the answer's JSON schema is none: {one_line(error)}") from error
        matchers = (LLMatcher(self._tokens, grammar, log_level=0) for grammar in forms)
        for matcher in matchers:
            if not matcher.is_error():
                return matcher
        why = " ".join(matcher.get_error().split())
        raise ConchError(
            f"the answer's JSON schema cannot be kept to while an answer is written: {why}; "
            "change that part of it"
        )

    @staticmethod
    def _grammar(form: str) -> str:
        from llguidance import LLMatcher

        if not form.startswith("{"):
            return form
        options: Any = {"lenient": True, "whitespace_pattern": WHITESPACE}
        grammar: str = LLMatcher.grammar_from_json_schema(form, overrides=options)
        return grammar

    def _read_tokenizer(self) -> Any:
        from llguidance.hf import from_tokenizer

        inner = getattr(self._tokenizer, "_tokenizer", self._tokenizer)
        try:
            return from_tokenizer(inner, eos_token=sorted(self.ends))
        except (ValueError, TypeError, AttributeError) as error:
            raise ConchError(
                f"answers of this tokenizer ({type(inner).__name__}) cannot be held to a schema "
                f"while they are written ({one_line(error)}): ask for it with constrained off"
            ) from error


def _forms(form: str) -> list[str]:
    """What an answer is held to, and what else if no text can keep to that.

    An object may have to have keys that its schema does not name.
    """
    return list(dict.fromkeys([_closed(form), form])) if form.startswith("{") else [form]


# Parts of a schema that say together what an object may have.
_TOGETHER = {"allOf", "anyOf", "oneOf", "$ref", "not", "if", "dependentSchemas"}
_NO_OTHERS = {"additionalProperties": False}
_OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties"}


def _closed(schema: str) -> str:
    """A schema whose objects have no other keys than it names, where it does not speak of others.

    A model that is unsure would name new ones without end. Whatever keeps to it keeps to the schema
    as well.
    """
    try:
        found = json.loads(schema)
    except ValueError:
        return schema
    # What stands under these is one object with what stands beside them, perhaps by a reference.
    if any(f'"{word}"' in schema for word in ("allOf", "if", "not", "dependentSchemas")):
        return schema
    return json.dumps(_closed_part(found))


def _closed_part(part: Any) -> Any:
    if isinstance(part, list):
        return [_closed_part(each) for each in part]
    if not isinstance(part, dict) or ("properties" in part and _TOGETHER & part.keys()):
        return part
    closed = {
        name: {key: _closed_part(each) for key, each in value.items()}
        if name in ("properties", "$defs", "definitions") and isinstance(value, dict)
        else _closed_part(value)
        if name in ("items", "prefixItems", "anyOf", "oneOf", "additionalProperties")
        else value
        for name, value in part.items()
    }
    return closed | ({} if "properties" not in part or _OPEN & part.keys() else _NO_OTHERS)


class HeldSampler:
    """Draws one request's tokens from those that its grammar allows. For one answer.

    What it is given stays whole for others, so that an answer's log-probabilities are those of the
    model and not of the form.

    Args:
        matcher: At its beginning.
        draw: From log-probabilities `[1, tokens]`.
        ends: Tokens that end an answer.

    Attributes:
        removed: For each token, in their order, the share of probability that was not allowed:
            a scalar array. Whoever reads it takes it out.
    """

    def __init__(
        self,
        matcher: "LLMatcher",
        draw: Callable[[mx.array], mx.array],
        ends: Collection[int],
    ) -> None:
        self._matcher = matcher
        self._draw = draw
        self._ends = ends
        self._last: mx.array | None = None
        self._over = False
        self.removed: deque[mx.array] = deque()

    def __call__(self, log_probs: mx.array) -> mx.array:
        """The next token; what was drawn before is known by now, or is waited for."""
        if self._last is not None and not self._over:
            token = int(np.asarray(self._last)[0])
            self._over = token in self._ends or not self._matcher.consume_token(token)
        if self._over:
            # The batch is one token ahead of its end.
            self.removed.append(mx.array(0.0))
            return self._draw(log_probs)
        allowed = self._allowed(log_probs.shape[-1])
        kept = mx.where(allowed, log_probs.astype(mx.float32), -mx.inf)
        share = mx.logsumexp(kept, axis=-1, keepdims=True)
        self.removed.append(mx.maximum(0.0, 1.0 - mx.exp(share))[0, 0])
        self._last = self._draw(kept - share)
        return self._last

    def _allowed(self, width: int) -> mx.array:
        """Which tokens may come: `[tokens]`; where the grammar fails, only an end."""
        found = np.zeros(width, np.bool_)
        bias = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)[:width]
        found[: len(bias)] = bias > 0
        if not found.any():
            found[list(self._ends)] = True
        return mx.array(found)
