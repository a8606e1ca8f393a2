"""Chat templates: programs of whoever published a model, run within bounds and on one date.

Knows a tokenizer and turns; nothing of which tokens count. To bound another thing that a template
takes: a limit in `_TRIAL`.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import date, datetime
from functools import lru_cache
from typing import Any

from conch_dna.errors import ConchError, one_line

Turn = dict[str, Any]
# What a template may take for a short conversation; the time is the processor's, and what the trial
# takes by the clock is bounded only in case that it hangs.
TRIAL_SECONDS, TRIAL_BYTES, TRIAL_LENGTH = 1, 2**31, 1_000_000
TRIAL_CLOCK_SECONDS = 15


# Run by a process of its own, whose time and memory are bounded; what a template raises is not for
# this trial to say.
_TRIAL = """
import resource, signal, sys
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
# Whose signal ends the process, whatever it is at.
signal.setitimer(signal.ITIMER_PROF, SECONDS)
if sys.platform == "linux":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
template = sys.stdin.read()
turn = lambda role: {"role": role, "content": "Hi"}
talk = [turn(role) for role in ("system", "user", "assistant", "user")]
def refuse(message): raise TemplateError(message)
environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
)
environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
for turns in (talk, talk[1:], talk[1:2]):
    try:
        rendered = environment.from_string(template).render(
            messages=turns, add_generation_prompt=True, bos_token="", eos_token="", tools=None
        )
    except MemoryError:
        sys.exit(3)
    except Exception:
        continue
    if len(rendered) > LENGTH:
        sys.exit(3)
"""


@lru_cache(maxsize=64)
def _require_bounded(template: str) -> None:
    """Refuse a template that does not come to its end, or fills the memory.

    It is a program of whoever published the model, so it is tried on a short conversation first.

    Raises:
        ConchError: It took too much.
    """
    limits = {"SECONDS": TRIAL_SECONDS, "MEMORY": TRIAL_BYTES, "LENGTH": TRIAL_LENGTH}
    program = _TRIAL
    for name, value in limits.items():
        program = program.replace(name, str(value))
    command = [sys.executable, "-c", program]
    with suppress(subprocess.TimeoutExpired):
        trial = subprocess.run(
            command, input=template, text=True, capture_output=True, timeout=TRIAL_CLOCK_SECONDS
        )
        if trial.returncode in (0, 1):
            return
    raise ConchError(
        f"the tokenizer's chat template takes more than {TRIAL_SECONDS} s, "
        f"{TRIAL_BYTES / 2**30:g} GiB or {TRIAL_LENGTH:,} characters for four short turns: it is "
        "broken, or means harm; use another model, or mend its chat_template"
    )


_DATE: ContextVar[date | None] = ContextVar("date that chat templates write", default=None)


@contextmanager
def dated(day: str) -> Iterator[None]:
    """Let chat templates write that day as today's, as Llama 3's and SmolLM3's do.

    A run that was stopped before midnight goes on with the text it began with.

    Args:
        day: ISO 8601, such as 2026-11-29.
    """
    token = _DATE.set(date.fromisoformat(day))
    try:
        yield
    finally:
        _DATE.reset(token)


def _prepare(tokenizer: Any, tools: Sequence[Turn] | None) -> None:
    """Try the template, and give it the date to write.

    transformers keeps compiled templates by their text.
    """
    from transformers.utils import chat_template_utils

    source = tokenizer.get_chat_template(None, tools)
    _require_bounded(source)
    day = _DATE.get()
    now = (lambda form: datetime.now().strftime(form)) if day is None else day.strftime
    if "strftime_now" in source:
        compiled = chat_template_utils._compile_jinja_template(source)
        compiled.environment.globals["strftime_now"] = now


def render(
    tokenizer: Any,
    turns: Sequence[Turn],
    *,
    generation_prompt: bool,
    tools: Sequence[Turn] | None = None,
) -> str:
    """A conversation as its tokenizer's chat template writes it.

    Args:
        tokenizer: With a chat template.
        turns: Of `plain_turns`.
        generation_prompt: End with what asks for an answer.
        tools: JSON schemas of functions that the model may call.

    Raises:
        ConchError: The template refuses the conversation, or breaks off.
    """
    try:
        _prepare(tokenizer, tools)
        text = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns],
            tools=list(tools) if tools else None,
            add_generation_prompt=generation_prompt,
            tokenize=False,
        )
    except ConchError:
        raise
    except Exception as error:
        # A template is a program of whoever published the model: it may raise whatever it likes.
        roles = ", ".join(turn["role"] for turn in turns)
        raise ConchError(
            f"the tokenizer's chat template refuses a conversation of {roles}: {one_line(error)}"
        ) from error
    return str(text)
