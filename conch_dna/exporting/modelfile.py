"""A Modelfile: what Ollama is told beside a GGUF file, so that it asks as CORTEX does.

Knows Ollama's syntax, and a chat template by what it writes; Ollama itself was never run on it.
Another parameter: a line in `modelfile`.
"""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from conch_dna.cortex.options import AskOptions
from conch_dna.errors import ConchError
from conch_dna.exporting.source import AdapterSource
from conch_dna.retraining.adapter_config import written_down
from conch_dna.retraining.domain import read_systems
from conch_dna.training.chats.conversations import common_prefix
from conch_dna.training.chats.templates import Turn, dated, render
from conch_dna.training.settings import LINES, SYSTEMS, KDConfig, domain_systems

ROLES = ("system", "user", "assistant")
# What templates trim, and what those of Qwen3 and DeepSeek drop of earlier answers.
_TEXTS = ("text", ' {{ x }} "\n\n""" ü\n', "<think>\nso\n</think>\n\ntext")


@dataclass(frozen=True)
class Pieces:
    """What a chat template writes around the contents of turns.

    Attributes:
        begin: Before everything.
        default: Before a first turn that is not the system's, such as a prompt of its own.
        roles: Before and behind a content, by role.
        ask: Behind everything.
    """

    begin: str
    default: str
    roles: dict[str, tuple[str, str]]
    ask: str

    def written(self, turns: list[Turn]) -> str:
        """A conversation that waits for its answer."""
        default = "" if turns[0]["role"] == "system" else self.default
        inner = "".join(turn["content"].join(self.roles[turn["role"]]) for turn in turns)
        return self.begin + default + inner + self.ask

    def to_go(self) -> str:
        """The same as a template of Go; Ollama calls the conversation `.Messages`."""
        text = _literal(self.begin) + "{{ range $i, $_ := .Messages }}"
        if default := _literal(self.default):
            text += f'{{{{ if and (eq $i 0) (ne .Role "system") }}}}{default}{{{{ end }}}}'
        for role, word in zip(ROLES, ("if", "else if", "else if"), strict=True):
            around = "{{ .Content }}".join(map(_literal, self.roles[role]))
            text += f'{{{{ {word} eq .Role "{role}" }}}}{around}'
        return text + "{{ end }}{{ end }}" + _literal(self.ask)


# Of a tokenizer without a chat template; see `plain_prompt`.
_AROUND = {"system": ("", "\n\n"), "user": ("", ""), "assistant": ("\n\n", "\n\n")}
PLAIN = Pieces("", "", _AROUND, "")


def pieces_of(tokenizer: Any) -> Pieces:
    """What a tokenizer's chat template writes around contents, held against it to the character.

    Raises:
        ConchError: It changes contents, takes no system turn, puts it elsewhere, or writes a date.
    """
    if not tokenizer.has_chat_template:
        return PLAIN
    pieces = _cut_out(tokenizer)
    for text, length, start in product(_TEXTS, (2, 4, 6), (0, 1)):
        roles = ("system", *("user", "assistant") * 3)[start:length]
        turns = [{"role": role, "content": text} for role in roles]
        # On another day, or a date would look like any other piece.
        with dated("2001-02-03"):
            if pieces.written(turns) != render(tokenizer, turns, generation_prompt=True):
                raise ConchError(f"the chat template changes turns such as {text!r}")
    return pieces


def modelfile(adapter: AdapterSource, name: str) -> tuple[str, list[str]]:
    """The text of a Modelfile for the GGUF file of that name, and what it lacks, in words.

    Raises:
        ConchError: What the adapter's folder says of its system prompt cannot be read.
    """
    tokenizer, lacks, lines = adapter.base.tokenizer, [], [f"FROM ./{name}"]
    try:
        pieces, bos = pieces_of(tokenizer), _added_bos(tokenizer)
        if tokenizer.has_chat_template and not pieces.begin.startswith(bos):
            lacks.append(f"Ollama puts {bos} first, without which the adapter learned")
        pieces = replace(pieces, begin=pieces.begin.removeprefix(bos))
        lines.append(f'TEMPLATE """{pieces.to_go()}"""')
    except ConchError as error:
        # From 0.30 on it runs that, unless it knows one like it; before that it may ask without.
        lacks.append(f"there is no TEMPLATE, and Ollama uses the one in {name}: {error}")
    system = student_system(adapter)
    # Its reader drops what cannot be printed, and ends a text at quotes with a line's end behind.
    bad = ['"""'] * ('"""' in system)
    bad += [c for c in system if not (c.isprintable() or c in "\n\r\t")]
    if bad:
        lacks.append(f"there is no SYSTEM, send it yourself: a Modelfile cannot hold {bad[0]!a}")
    elif system:
        lines.append(f'SYSTEM """{system}"""')
    ends = tokenizer.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids))
    lines += [f'PARAMETER stop "{end}"' for end in ends if end and end.isprintable()]
    # As CORTEX draws; Ollama's own are 0.8 and 1.1, and the signs of JSON repeat.
    lines += [f"PARAMETER temperature {AskOptions.temperature:g}", "PARAMETER repeat_penalty 1"]
    return "\n".join([*(f"# {lack}" for lack in lacks), *lines, ""]), lacks


def student_system(adapter: AdapterSource) -> str:
    """The system prompt that an adapter learned with, as CORTEX finds it; empty for none.

    Raises:
        ConchError: What its folder says of that cannot be read.
    """
    folder = adapter.folder.resolve()
    if not adapter.domain and folder.parent.parent.name == LINES:
        return read_systems(folder.parent.parent.parent, folder.parent.name)[1]
    config = written_down(adapter.document).get("config")
    given = {n: config[n] for n in SYSTEMS.values() if isinstance(config, dict) and n in config}
    return domain_systems(adapter.domain, KDConfig.from_json(given, source=str(folder)))[1]


def _cut_out(tokenizer: Any) -> Pieces:
    """Pieces by what stands between contents; wrong ones where a template is not made of them."""
    first, asking = _between(tokenizer, "user")
    _, there, back, _ = _between(tokenizer, "user", "assistant", "user")
    opening, joint, _ = _between(tokenizer, "system", "user")
    ended = _between(tokenizer, "user", "assistant", ask=False)[-1]
    answer_end = back[: common_prefix(back, ended)]
    user_end = asking[: common_prefix(asking, _between(tokenizer, "user", ask=False)[-1])]
    user_begin = back.removeprefix(answer_end)
    default, bos = first.removesuffix(user_begin), _added_bos(tokenizer)
    begin = default[: common_prefix(default, opening)]
    begin = begin if begin == default else bos if begin.startswith(bos) else ""
    roles = {
        "system": (opening.removeprefix(begin), joint.removesuffix(user_begin)),
        "user": (user_begin, user_end),
        "assistant": (there.removeprefix(user_end), answer_end),
    }
    return Pieces(begin, default.removeprefix(begin), roles, asking.removeprefix(user_end))


def _between(tokenizer: Any, *roles: str, ask: bool = True) -> list[str]:
    """What a chat template writes before, between and behind the contents of turns."""
    turns = [{"role": role, "content": f"conch0{role}"} for role in roles]
    text, pieces = render(tokenizer, turns, generation_prompt=ask), []
    for turn in turns:
        before, content, text = text.partition(turn["content"])
        if not content:
            raise ConchError(f"the chat template drops or moves a turn of the {turn['role']}")
        pieces.append(before)
    return [*pieces, text]


def _added_bos(tokenizer: Any) -> str:
    """What Ollama puts before any prompt, whatever it begins with, by add_bos_token; or nothing."""
    read = tokenizer.encode("a")
    return str(tokenizer.bos_token) if read and read[0] == tokenizer.bos_token_id else ""


def _literal(text: str) -> str:
    """A text in a template of Go that stands within triple quotes."""
    if "{" not in text and '"""' not in text and text.replace("\n", "").isprintable():
        return text
    signs = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return '{{ "' + "".join(signs) + '" }}'
