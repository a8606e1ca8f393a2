"""What the commands of stores share: their options, and how they open a store.

Knows click, the fields of ChelationConfig and the engine; no command. To give every command that
opens the models another setting: an entry of COMMON.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from conch_dna.errors import ConchError, Interrupted
from conch_dna.options.commands import options_of, read_yaml
from conch_dna.screen.presentation import print_tables
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.documents import MOST_DIGITS
from conch_dna.sedimentation.results import ChangeResult, change_table

if TYPE_CHECKING:
    from conch_dna.sedimentation.engine import AntigravityEngine
    from conch_dna.sedimentation.retrieval import Judgements
    from conch_dna.sedimentation.stored_state import StoredState, StorePlace

F = TypeVar("F", bound=Callable[..., Any])
API_KEY = "QDRANT_API_KEY"
# Fields of ChelationConfig that are options of every command which opens the models.
COMMON = ("training_mode", "teacher_weight", "space")


def place_options(command: F) -> F:
    """Where a store is."""
    for decorate in (
        click.option("--state", metavar="DIR", help="Where adapters, log and caches lie."),
        click.option(
            "--collection",
            metavar="NAME",
            default="documents",
            show_default=True,
            help="Collection of a Qdrant server.",
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


def setting_options(command: F) -> F:
    """By which settings a store's models are opened."""
    for decorate in (
        click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a model."),
        click.option("--device", metavar="NAME", help="cpu, cuda or mps; else chosen."),
        click.option(
            "--config",
            "config_file",
            metavar="FILE",
            help="YAML with any settings of a store; the command line wins.",
        ),
    ):
        command = decorate(command)
    return command


def model_options(command: F) -> F:
    """Who makes a store's vectors, who teaches, and by which settings."""
    for decorate in (
        setting_options,
        options_of(ChelationConfig, only=COMMON, names={"training_mode": ("--mode",)}),
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
            help="The student: hub id, folder or ollama:NAME. [default: the store's own]",
        ),
    ):
        command = decorate(command)
    return command


def judgement_options(command: F) -> F:
    """Judged queries for the gate, in place of those made from the documents."""
    for decorate in (
        click.option(
            "--split", default="test", show_default=True, help="Whose judgements of the folder."
        ),
        click.option(
            "--judgements",
            metavar="DIR",
            help="Ask these judged queries: a folder with queries.jsonl and "
            "qrels/<split>.tsv in BEIR layout. [default: queries made from held-out documents]",
        ),
    ):
        command = decorate(command)
    return command


def judged_by(options: Mapping[str, Any]) -> "tuple[dict[str, str], Judgements] | None":
    """Queries and judgements of the folder that `judgement_options` names; None without one.

    Raises:
        ConchError: They cannot be read.
    """
    from conch_dna.sedimentation.benchmark.collections import read_judgements

    folder = options["judgements"]
    return read_judgements(Path(folder).expanduser(), split=options["split"]) if folder else None


def place_of(options: Mapping[str, Any]) -> "StorePlace":
    """Where a store is, by the values of `place_options`; the key goes to servers only."""
    from conch_dna.sedimentation.stored_state import StorePlace

    location = options["location"]
    key = os.environ.get(API_KEY) if "://" in location else None
    return StorePlace(location, options["state"], options["collection"], key)


def settings(options: Mapping[str, Any], **implied: Any) -> ChelationConfig:
    """Settings of a file and the command line.

    Args:
        options: What a command was given: `config_file`, a YAML file or None, and fields of
            ChelationConfig; others are passed over.
        **implied: Fields that hold where neither names them.

    Raises:
        ConchError: The file cannot be read, or a setting is unknown or out of its range.
    """
    config_file = options["config_file"]
    in_file = read_yaml(Path(config_file)) if config_file else {}
    names = {each.name for each in fields(ChelationConfig)}
    on_line = {n: value for n, value in options.items() if n in names and value is not None}
    in_file_names = {name.replace("-", "_") for name in in_file}
    missing = {name: value for name, value in implied.items() if name not in in_file_names}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if config_file:
            config = ChelationConfig.from_json(
                in_file, source=config_file, overriding={**missing, **on_line}
            )
        else:
            config = ChelationConfig(**{**missing, **on_line})
    for each in caught:
        click.echo(f"warning: {each.message}", err=True)
    return config


@contextmanager
def opened_engine(
    config: ChelationConfig, options: Mapping[str, Any], *, new: bool = False
) -> Iterator["AntigravityEngine"]:
    """The engine of a store.

    Args:
        config: The store's settings.
        options: The values of `place_options` and `model_options`.
        new: Whether there may be no store yet.

    Raises:
        ConchError: See `AntigravityEngine`; or there is no store.
        Interrupted: Ctrl-C.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from conch_dna.sedimentation.engine import DEFAULT_STUDENT, AntigravityEngine

    teachers, student = options["teachers"], options["model"]
    needs_teacher = config.training_mode != "baseline" or config.space != "symmetric"
    if needs_teacher and not teachers:
        raise ConchError(
            f"training mode {config.training_mode} in the {config.space} space needs a teacher: "
            "give --teacher MODEL"
        )
    place = place_of(options)
    folder = place.folder
    if not new or (student is None and place.has_store()):
        # Asked for where the student is named too: a query of a store that is not there makes none.
        stored_student = place.student()
        folder_of_student = Path(stored_student)
        if student is None and folder_of_student.is_absolute() and not folder_of_student.is_dir():
            raise ConchError(
                f"the student of {place.location} was in {stored_student}, and is not there: "
                "name its folder with --model"
            )
        student = student or stored_student
    try:
        with AntigravityEngine(
            place.location,
            student or DEFAULT_STUDENT,
            teacher_model_name=teachers or None,
            teacher_weights=options["teacher_shares"] or None,
            config=config,
            state_folder=folder,
            collection=place.collection,
            api_key=place.api_key,
            device=options["device"],
            trust_remote_code=options["trust_remote_code"],
        ) as engine:
            _echo_recovered(engine.recovered)
            yield engine
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped: what the store had acknowledged is there, and the same command goes on"
        ) from None


@contextmanager
def opened_without_models(options: Mapping[str, Any]) -> Iterator["StoredState"]:
    """What a store says of itself, with a line for everything that opening it put right."""
    with place_of(options).opened() as stored:
        _echo_recovered(stored.recovered)
        yield stored


def _echo_recovered(lines: list[str]) -> None:
    for line in lines:
        click.echo(f"recovered: {line}", err=True)


def show_change(result: ChangeResult) -> None:
    """The gate's verdict on a change, what it took, and which version answers."""
    if result.candidate is None:
        click.echo(f"nothing was built: {result.reason}")
    else:
        print_tables(change_table(result))
        click.echo(result.reason)
        stages = ", ".join(f"{name} {value:.1f}" for name, value in result.seconds.items())
        click.echo(f"learned from {result.documents:,} documents; seconds: {stages}")
        for reason in result.reasons:
            click.echo(f"warning: {reason}", err=True)
    click.echo(f"active: {result.version}")


def where_of(conditions: tuple[str, ...]) -> dict[str, list[Any]] | None:
    """The filter that `--where FIELD=VALUE` options make; None without any.

    Raises:
        ConchError: One is no condition, or a number that no store keeps.
    """
    where: dict[str, list[Any]] = {}
    for each in conditions:
        name, equals, text = each.partition("=")
        if not (name and equals):
            raise ConchError(f"--where {each} is no condition: give FIELD=VALUE")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            # Python reads integers of some thousands of digits, and no longer ones.
            if len(text) > MOST_DIGITS and text.lstrip("-").isdecimal():
                raise ConchError(
                    f"--where {name} is a number of {len(text)} digits, and a store keeps 64 bits: "
                    f"write it in double quotes where it is a text"
                ) from error
            value = text
        # A float, null, list or object is no value that a store filters by.
        where.setdefault(name, []).append(value if isinstance(value, str | int) else text)
    return where or None
