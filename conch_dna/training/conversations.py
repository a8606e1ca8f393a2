"""Prompts as conversations that a tokenizer can be given.

Knows turns of text; nothing of tokenizers or models. Another thing that no tokenizer takes: a
refusal in `checked_turns`.
"""

from conch_dna.errors import ConchError
from conch_dna.training.records import Prompt, prompt_turns


def checked_turns(prompt: Prompt, system: str) -> list[dict[str, str]]:
    """A conversation that waits for its answer; see `prompt_turns`.

    Raises:
        ConchError: It is none, does not wait for an answer, or has what is no character.
    """
    turns = prompt_turns(prompt, system)
    try:
        "".join(turn["content"] for turn in turns).encode()
    except UnicodeEncodeError as error:
        raise ConchError(
            "a prompt has half a surrogate pair (\\ud800 to \\udfff), which is no character: "
            "leave it out"
        ) from error
    return turns
