"""Files of answers and of what should have been said, as a user brings them.

Knows JSON lines and the fields of an experience; nothing of where experience is kept.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from conch_dna.errors import ConchError
from conch_dna.option_fields import refuse_unknown
from conch_dna.retraining.experience import Experience
from conch_dna.training.records import read_lines

# What a line may say: the rest of an experience follows from where and when it is recorded.
_OWN = {each.name for each in fields(Experience)} - {"domain", "time"}
FIELDS = ("prompt", *sorted(_OWN))


def read_experiences(path: Path, domain: str) -> list[Experience]:
    """Read a JSONL file of answers.

    Each line has `prompt` (a text) or `messages` (the conversation up to the answer), `answer`,
    and, where that was not good, `better` and `problem`; further fields see `Experience`. What has
    a better answer is a correction, the rest are successes, unless `kind` says otherwise.

    Raises:
        ConchError: The file cannot be read, or a line is none of these; all such lines are named.
    """
    found, problems = [], []
    for number, line in enumerate(read_lines(path, "--from"), 1):
        try:
            found.append(experience_of(line, domain))
        except ConchError as error:
            problems.append(f"record {number}: {error}")
    if problems:
        shown = "; ".join(problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConchError(f"{path}: {shown}{more}. Nothing was recorded")
    return found


def experience_of(line: str, domain: str) -> Experience:
    """One line of such a file.

    Raises:
        ConchError: See `read_experiences`.
    """
    try:
        given: Any = json.loads(line)
    except ValueError as error:
        raise ConchError(f"not JSON ({error})") from error
    if not isinstance(given, dict):
        raise ConchError("not a JSON object with prompt and answer")
    refuse_unknown(given, FIELDS, source="it")
    if ("prompt" in given) == ("messages" in given):
        raise ConchError("give either prompt or messages")
    if "answer" not in given:
        raise ConchError("it has no answer")
    prompt = given.pop("prompt", None)
    turns = given.pop("messages", None) or [{"role": "user", "content": prompt}]
    if not isinstance(turns, list):
        raise ConchError(f"messages is {turns!r}, not a list of turns")
    kind = given.pop("kind", "correction" if given.get("better") is not None else "success")
    return Experience(domain=domain, messages=tuple(turns), kind=kind, **given)
