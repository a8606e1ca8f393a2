"""What a run was asked for, by the command line and by a settings file, before anything is read.

Knows names and which of them go together; no models. To add one that is no setting of `KDConfig`:
its name in `RUN_KEYS`, its option in training/cli.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from conch_dna.errors import ConchError, decoded, told
from conch_dna.options.commands import read_yaml
from conch_dna.options.fields import changed, named_settings
from conch_dna.training.data.forms import parse_mapping
from conch_dna.training.data.sources import Given
from conch_dna.training.data.views import taught_by
from conch_dna.training.distillation import DOMAIN_PROMPTS
from conch_dna.training.runs.mlx_lm_names import NAMES, understood
from conch_dna.training.runs.reporters import parse_names
from conch_dna.training.runs.run_file import own_steps
from conch_dna.training.settings import (
    DEFAULT_STUDENT,
    DEFAULT_TEACHER,
    OF_DOMAIN,
    SYSTEMS,
    KDConfig,
    domain_folder,
)

SOURCES = ("data", "prompts", "valid_data", "test_data", "data_split", "demonstrations")
RUN_KEYS = ("domain", "teacher", "student", *SOURCES, "map", "test", "report_to", "project_name")

# A longer text is no name of a file.
LONGEST_NAME = 1_024
NEVER_EMPTY = ("domain", "teacher", "student", *SOURCES)
MAY_BE_NULL = ("report_to", "project_name", "test")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run as it was asked for.

    Attributes:
        domain: Its name; None for all.
        models: Teacher and student.
        given: What it learns from and is judged by.
        config: Everything else that shapes it.
        reporters: Where its figures are sent, besides.
        project: What they are called there.
        notes: What a user should know of how the settings file was understood.
        with_steps: Whether it says how many steps; a run that goes on has its own number.
    """

    domain: str | None
    models: tuple[str, str]
    given: Given
    config: KDConfig
    reporters: tuple[str, ...] = ()
    project: str | None = None
    notes: list[str] = field(default_factory=list)
    with_steps: bool = True

    @property
    def domains(self) -> list[str]:
        """The names of its domains."""
        return [self.domain] if self.domain else list(DOMAIN_PROMPTS)

    def given_to(self, domain: str) -> Given:
        """What one of its domains learns from and is judged by."""
        return replace(self.given, domain=domain)

    def going_on(self) -> "Request":
        """The same with the number of steps of the runs that lie there, where it gives none.

        Raises:
            ConchError: They have several.
        """
        folders = [domain_folder(name, self.config) for name in self.domains]
        steps = {found for folder in folders if (found := own_steps(folder)) is not None}
        if self.with_steps or not steps:
            return self
        if len(steps) > 1:
            shown = " and ".join(map(str, sorted(steps)))
            raise ConchError(f"the runs to go on with have {shown} steps: give --iters")
        return replace(self, config=replace(self.config, num_iters=steps.pop()))


def requested(
    named: Mapping[str, Any],
    values: Mapping[str, Any],
    *,
    config_file: str | None,
    all_domains: bool,
) -> Request:
    """Put together what was asked for; the command line wins over the file.

    Args:
        named: Those of RUN_KEYS that the command line gave.
        values: Those of KDConfig's fields that it gave.
        config_file: A YAML file with either, or with the names of `mlx_lm.lora`.
        all_domains: Whether it asks for all domains.

    Raises:
        ConchError: A name is unknown, a value is none, or two do not go together.
    """
    if config_file == "":
        raise ConchError("--config: an empty name; give a file, or leave the option out")
    in_file, notes = settings_in(Path(config_file)) if config_file else ({}, [])
    asked = {key: in_file.pop(key) for key in RUN_KEYS if key in in_file} | dict(named)
    if empty := [key for key in NEVER_EMPTY if asked.get(key) == ""]:
        shown = " and ".join(f"--{key.replace('_', '-')}" for key in empty)
        raise ConchError(f"{shown}: an empty name; give another, or leave the option out")
    in_file, values = with_texts(in_file), with_texts(values)
    config = KDConfig.from_json(in_file, source=str(config_file), overriding=values)
    if all_domains == ("domain" in asked):
        raise ConchError("give either --domain NAME or --all")
    own = [key for key in SOURCES if key in asked]
    if asked.get("demonstrations") == OF_DOMAIN:
        own.remove("demonstrations")
    if all_domains and own:
        shown = " and ".join(f"--{key.replace('_', '-')}" for key in own)
        shown = shown.replace("--demonstrations", "--demonstrations other than domain")
        raise ConchError(f"{shown} cannot go with --all, only with one --domain")
    notes += without_effect(config)
    return Request(
        domain=asked.get("domain"),
        models=named_models(asked),
        given=given_in(asked),
        config=config,
        reporters=parse_names(asked.get("report_to", "")),
        project=asked.get("project_name"),
        notes=notes,
        with_steps="num_iters" in in_file or "num_iters" in values,
    )


def without_effect(config: KDConfig) -> list[str]:
    """Settings of a student's own answers in a run that has none, in a sentence."""
    if config.on_policy:
        return []
    names = [each.name for each in fields(KDConfig) if each.name.startswith("rollout")]
    given = changed(config, [*names, "resident"])
    return [f"{' and '.join(given)} without effect: on_policy is 0"] if given else []


def named_models(asked: Mapping[str, Any]) -> tuple[str, str]:
    """Teacher and student of what was asked for by its RUN_KEYS."""
    student = asked.get("student", DEFAULT_STUDENT)
    return taught_by(asked.get("teacher", DEFAULT_TEACHER), student), student


def given_in(asked: Mapping[str, Any]) -> Given:
    """What is learned from and judged by, of what was asked for by its RUN_KEYS.

    Raises:
        ConchError: There are data and prompts, or a mapping is none.
    """
    if "data" in asked and "prompts" in asked:
        raise ConchError("give either --data or --prompts: with data the teacher answers nothing")
    sources = {key: asked[key] for key in SOURCES if key in asked}
    mapping = parse_mapping(asked.get("map", []))
    return Given(
        **sources, domain=asked.get("domain", ""), mapping=mapping, with_test=asked.get("test")
    )


def with_texts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which a file that holds a system prompt is replaced by its text.

    Raises:
        ConchError: Such a file cannot be read, is empty, or is a folder.
    """
    found = dict(values)
    for name in SYSTEMS.values():
        value = found.get(name)
        if isinstance(value, str) and 0 < len(value) < LONGEST_NAME and "\n" not in value:
            found[name] = _text_of(value, f"--{name.replace('_', '-')} {value}")
    return found


def _text_of(value: str, said: str) -> str:
    """The text in a file of that name, or the value itself where there is none."""
    path = Path(value).expanduser()
    if path.is_dir():
        raise ConchError(f"{said} is a folder: give a text, or a file with it")
    if not path.is_file():
        if path.suffix in (".txt", ".md"):
            raise ConchError(f"{said}: there is no such file")
        return value
    with told(f"cannot read {said}"):
        content = path.read_bytes()
    text = decoded(content, f"cannot read {said}").strip()
    if not text:
        raise ConchError(f"{said} is empty: write the system prompt into it, or give none")
    return text


def settings_in(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The settings in a file by their own names, and how mlx-lm's were understood.

    Raises:
        ConchError: It cannot be read, or has an unknown name, or a value of another kind.
    """
    own = [*RUN_KEYS, *(each.name for each in fields(KDConfig))]
    values = named_settings(read_yaml(path), own, source=str(path), also=NAMES)
    values, notes = understood(values, source=str(path))
    # mlx-lm writes null for what there is not.
    values = {k: v for k, v in values.items() if v is not None or k not in MAY_BE_NULL}
    mapping = values.get("map")
    if isinstance(mapping, dict):
        values["map"] = [f"{key}={name}" for key, name in mapping.items()]
    if isinstance(values.get("report_to"), list):
        values["report_to"] = ",".join(map(str, values["report_to"]))
    wrong = [
        f"{key} is {values[key]!r}: it must be text"
        for key in RUN_KEYS
        if key not in ("map", "test") and key in values and type(values[key]) is not str
    ]
    if not isinstance(values.get("map", []), list):
        wrong.append(f"map is {mapping!r}: it must be a mapping such as prompt: question")
    if not isinstance(values.get("test", True), bool):
        wrong.append(f"test is {values['test']!r}: it must be true or false")
    if wrong:
        raise ConchError(f"{path}: {'; '.join(wrong)}")
    return values, notes
