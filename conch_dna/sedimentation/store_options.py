"""What the commands of stores share: options of place, models and settings, and how they open one.

Knows click, the fields of ChelationConfig and the engine; no command. To give every command that
opens the models another setting: an entry of COMMON.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from conch_dna.command_parts import options_of, read_yaml
from conch_dna.errors import ConchError, Interrupted
from conch_dna.sedimentation.config import ChelationConfig

if TYPE_CHECKING:
    from conch_dna.sedimentation.engine import AntigravityEngine
    from conch_dna.sedimentation.stored_state import StoredState

F = TypeVar("F", bound=Callable[..., Any])
API_KEY = "QDRANT_API_KEY"
# Fields of ChelationConfig that are options of every command which opens the models.
COMMON = {"training_mode": "--mode", "teacher_weight": "--teacher-weight", "space": "--space"}
_FIELDS = {each.name: each for each in fields(ChelationConfig)}


def setting_options(options: Mapping[str, str]) -> Callable[[F], F]:
    """Options from fields of ChelationConfig; those not given are None.

    Args:
        options: Field to option.
    """
    names = {field: (option,) for field, option in options.items()}
    return options_of(ChelationConfig, only=tuple(options), names=names)


def place_options(command: F) -> F:
    """Where a store is."""
    for decorate in (
        click.option("--state", metavar="DIR", help="Where adapters, log and caches lie."),
        click.option(
            "--collection",
            metavar="NAME",
            default="documents",
            show_default=True,
            help="Of a server.",
        ),
        click.argument(
            "location",
            help=f"A folder, or the URL of a Qdrant server, whose key is taken from {API_KEY}.",
        ),
    ):
        command = decorate(command)
    return command


share_option = click.option(
    "--teacher-share",
    "teacher_shares",
    multiple=True,
    type=float,
    metavar="FLOAT",
    help="Weight of each of several teachers, in their order, above 0. [default: all the same]",
)


def model_options(command: F) -> F:
    """Who makes a store's vectors, who teaches, and by which settings."""
    for decorate in (
        click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a model."),
        click.option("--device", metavar="NAME", help="cpu, cuda or mps; else chosen."),
        click.option(
            "--config",
            "config_file",
            metavar="FILE",
            help="YAML with any settings of a store; the command line wins.",
        ),
        setting_options(COMMON),
        click.option(
            "--teacher",
            "teachers",
            multiple=True,
            metavar="MODEL",
            help="Hub id, folder or ollama:NAME; repeatable, then they teach together.",
        ),
        share_option,
        click.option(
            "--model",
            metavar="MODEL",
            help="The student, likewise. [default: the store's own]",
        ),
    ):
        command = decorate(command)
    return command


def place_of(location: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Where a store is, as stored_state.py wants it; the key goes to servers only."""
    key = os.environ.get(API_KEY) if "://" in location else None
    return {"state": given["state"], "collection": given["collection"], "api_key": key}


def settings(config_file: str | None, given: Mapping[str, Any], **implied: Any) -> ChelationConfig:
    """Settings of a file and the command line.

    Args:
        config_file: YAML, or None.
        given: What a command was given; what is no field of ChelationConfig is passed over.
        **implied: Fields that hold where neither names them.

    Raises:
        ConchError: The file cannot be read, or a setting is unknown or out of its range.
    """
    in_file = read_yaml(Path(config_file)) if config_file else {}
    named = {n: value for n, value in given.items() if n in _FIELDS and value is not None}
    written = {name.replace("-", "_") for name in in_file}
    missing = {name: value for name, value in implied.items() if name not in written}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if config_file:
            config = ChelationConfig.from_json(
                in_file, source=config_file, overriding={**missing, **named}
            )
        else:
            config = ChelationConfig(**{**missing, **named})
    for each in caught:
        click.echo(f"warning: {each.message}", err=True)
    return config


@contextmanager
def opened_engine(
    location: str, config: ChelationConfig, given: Mapping[str, Any], *, new: bool = False
) -> Iterator["AntigravityEngine"]:
    """The engine of a store.

    Args:
        location: Of the store.
        config: Its settings.
        given: The values of `place_options` and `model_options`.
        new: Whether there may be no store yet.

    Raises:
        ConchError: See `AntigravityEngine`; or there is no store.
        Interrupted: Ctrl-C.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from conch_dna.sedimentation.engine import DEFAULT_STUDENT, AntigravityEngine
    from conch_dna.sedimentation.stored_state import has_store, state_folder, stored_student

    place, teachers = place_of(location, given), given["teachers"]
    needs_teacher = config.training_mode != "baseline" or config.space != "symmetric"
    if needs_teacher and not teachers:
        raise ConchError(
            f"training mode {config.training_mode} in the {config.space} space needs a teacher: "
            "give --teacher MODEL"
        )
    folder = state_folder(location, place["state"], place["collection"])
    student = given["model"]
    if not new or (student is None and has_store(location, **place)):
        stored = stored_student(location, **place)
        student = student or stored
    try:
        with AntigravityEngine(
            location,
            student or DEFAULT_STUDENT,
            teacher_model_name=teachers or None,
            teacher_weights=given["teacher_shares"] or None,
            config=config,
            state_folder=folder,
            collection=place["collection"],
            api_key=place["api_key"],
            device=given["device"],
            trust_remote_code=given["trust_remote_code"],
        ) as engine:
            _echo_recovered(engine.recovered)
            yield engine
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped: what the store had acknowledged is there, and the same command goes on"
        ) from None


@contextmanager
def opened_without_models(location: str, given: Mapping[str, Any]) -> Iterator["StoredState"]:
    """What a store says of itself; see `opened_state`."""
    from conch_dna.sedimentation.stored_state import opened_state

    with opened_state(location, **place_of(location, given)) as opened:
        _echo_recovered(opened.recovered)
        yield opened


def _echo_recovered(lines: list[str]) -> None:
    for line in lines:
        click.echo(f"recovered: {line}", err=True)
