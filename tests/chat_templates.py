"""Chat templates as well-known models have them, written down for the smallest tokenizer.

Each keeps what is peculiar to its model: where the system prompt goes, what becomes of thoughts and
tools, what ends a turn. `family_tokenizer` makes a tokenizer in which their markers are tokens.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from conch_dna.language_model import ASSETS, load_tokenizer


class Family(NamedTuple):
    """A template, its markers, and those that end a turn."""

    template: str
    markers: tuple[str, ...]
    ends: tuple[str, ...]


_TURNS = "{% for m in messages %}"
_CHATML = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
_CHATML_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_IM = ("<|im_start|>", "<|im_end|>")

LLAMA3 = (
    _TURNS + "{% set c = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
    "+ m.content | trim + '<|eot_id|>' %}"
    "{% if loop.first %}{% set c = '<|begin_of_text|>' + c %}{% endif %}{{ c }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# The system prompt and the tools stand in the last user turn, and only if that is still the last
# turn but for results of tools.
MISTRAL3 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% set users = rest | selectattr('role', 'equalto', 'user') | list %}"
    "{{ '<s>' }}{% for m in rest %}{% if m.role == 'user' %}"
    "{% if tools and m == users[-1] %}"
    "{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m.content }}"
    "{% else %}{{ '[INST] ' + m.content }}{% endif %}{{ '[/INST]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] ' + m.tool_calls | tojson + '</s>' }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}"
    "{% else %}{{ ' ' + m.content | trim + '</s>' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ '<bos>' }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    + _TURNS
    + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Thoughts of answers before the last question are dropped, and the last answer always gets some.
QWEN3 = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}"
    "{{ messages[0].content + '\n\n' }}{% endif %}{{ '# Tools\n' }}"
    "{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}"
    "{% set ns = namespace(last=0) %}" + _TURNS + "{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}" + _TURNS + "{% if m.role == 'user' %}"
    "{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{% set c = m.content %}{% set thought = '' %}"
    "{% if '</think>' in c %}"
    "{% set thought = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ c }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}" + _CHATML_ASK
)
_DEEPSEEK = (
    "{{ '<｜begin▁of▁sentence｜>' }}" + _TURNS + "{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% else %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}%s{% endif %}"
)
# Nothing ends an answer: the model stops by asking for the next turn.
GLM4 = (
    "{{ '[gMASK]<sop>' }}" + _TURNS + "{% if m.role == 'assistant' %}{% set c = m.content %}"
    "{% set thought = '' %}{% if '</think>' in c %}"
    "{% set thought = c.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ '<|assistant|>\n<think>' + (thought if loop.last else '') + '</think>\n' + c.strip() }}"
    "{% else %}{{ '<|' + m.role + '|>\n' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PHI = (
    _TURNS + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
_SEEK_MARKERS = (
    "<｜begin▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>",
)
_GLM_MARKERS = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

FAMILIES = {
    "ChatML": Family(_TURNS + _CHATML + "{% endfor %}" + _CHATML_ASK, _IM, ("<|im_end|>",)),
    "Llama 3": Family(
        LLAMA3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ("<|eot_id|>",),
    ),
    "Mistral v0.3": Family(MISTRAL3, ("<s>", "</s>", "[INST]", "[/INST]"), ("</s>",)),
    "Gemma": Family(GEMMA, ("<bos>", "<start_of_turn>", "<end_of_turn>"), ("<end_of_turn>",)),
    "Qwen3": Family(QWEN3, (*_IM, "<think>", "</think>"), ("<|im_end|>",)),
    "R1-Distill": Family(
        _DEEPSEEK.replace("%s", "{{ '<think>\n' }}"),
        (*_SEEK_MARKERS, "<think>", "</think>"),
        ("<｜end▁of▁sentence｜>",),
    ),
    "DeepSeek-V3": Family(_DEEPSEEK.replace("%s", ""), _SEEK_MARKERS, ("<｜end▁of▁sentence｜>",)),
    "GLM-4": Family(GLM4, (*_GLM_MARKERS, "<think>", "</think>"), ("<|user|>", "<|observation|>")),
    "Phi": Family(PHI, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), ("<|end|>",)),
}


def family_tokenizer(folder: Path, name: str) -> Any:
    """The embedded tokenizer with a family's markers and template, as mlx_lm wraps it."""
    family = FAMILIES[name]
    folder.mkdir(parents=True)
    whole = json.loads((ASSETS / "student" / "tokenizer.json").read_text())
    first = len(whole["model"]["vocab"])
    whole["added_tokens"] += [
        {**whole["added_tokens"][0], "id": first + number, "content": marker}
        for number, marker in enumerate(family.markers)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    settings = json.loads((ASSETS / "student" / "tokenizer_config.json").read_text())
    settings["chat_template"] = family.template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ends = [0, *(first + family.markers.index(end) for end in family.ends)]
    config = {"model_type": "llama", "eos_token_id": ends}
    (folder / "config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)
