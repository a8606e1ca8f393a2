"""What the commands of CORTEX share: options of adapters, EGO and answers, and a suite.

Knows click and fields of settings; no command. To give every command that answers another option: a
field of `AskOptions`, and its name in ANSWERING.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from conch_dna.checkpoints import read_text
from conch_dna.cortex.options import AskOptions, DraftSettings
from conch_dna.errors import ConchError, Interrupted
from conch_dna.options.commands import options_of
from conch_dna.training.settings import KDConfig

if TYPE_CHECKING:
    from conch_dna.cortex.neuron import CortexSuite
    from conch_dna.ego.settings import EgoConfig
    from conch_dna.retraining.pipeline import TrainingPipeline

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S")
ANSWERING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "hand_over",
)


domain_argument = click.argument("domain", help="Whose neuron, such as thinking.")
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run code that comes with a model."
)
adapters_option = click.option(
    "--adapters",
    metavar="DIR",
    default=KDConfig.output_dir,
    show_default=True,
    help="Folder of all domains' adapters.",
)
redact_option = click.option(
    "--redact",
    is_flag=True,
    help="Replace keys, passwords, addresses and numbers of cards in what is recorded.",
)
remember_option = click.option(
    "--remember/--no-remember",
    default=True,
    show_default=True,
    help="Record what was handed over to EGO, to learn from it.",
)
draft_options = options_of(DraftSettings)


def model_options(*, ego: str | None = None) -> Callable[[F], F]:
    """Whose adapters they are, and who answers what neurons are not sure of.

    Args:
        ego: Who does so where nobody is named; nobody where None.
    """
    options = (
        adapters_option,
        click.option(
            "--student",
            metavar="MODEL",
            help="The base of all adapters. [default: that which they name]",
        ),
        click.option(
            "--ego",
            metavar="MODEL",
            default=ego,
            help="The big teacher: hub id, folder, embedded:teacher, or the URL of an "
            f"OpenAI-compatible API. [default: {ego or 'nobody'}]",
        ),
        click.option("--ego-name", metavar="NAME", help="What the API at that URL calls EGO."),
        click.option(
            "--ego-key-env",
            metavar="NAME",
            help="Environment variable with that API's key; empty sends none. [default: "
            "OPENAI_API_KEY]",
        ),
        trust_option,
    )

    def decorate(command: F) -> F:
        for each in reversed(options):
            command = each(command)
        return command

    return decorate


def answer_options(command: F) -> F:
    """How questions are answered; what is not given is None."""
    command = click.option(
        "--no-structured", is_flag=True, help="Ask for no JSON object of the domain's schema."
    )(command)
    command = click.option(
        "--no-constrained",
        is_flag=True,
        help="Let answers be written freely, and check them against the schema afterwards.",
    )(command)
    command = click.option(
        "--schema",
        metavar="FILE",
        type=click.Path(dir_okay=False, path_type=Path),
        help="JSON schema of an object that answers keep to, instead of the domain's.",
    )(command)
    command = click.option(
        "--stop", metavar="TEXT", multiple=True, help="End the answer before this; may be repeated."
    )(command)
    command = options_of(AskOptions, only=ANSWERING)(command)
    return click.option(
        "--system", metavar="TEXT", help="System prompt instead of the domain's own."
    )(command)


def settings_of(kind: type[S], values: Mapping[str, Any]) -> S:
    """A settings class by the options of a command; its defaults stand for what is None.

    Args:
        kind: A dataclass, some fields of which are options of the command.
        values: Of all options of the command, by name.
    """
    names = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: values[name] for name in names if values.get(name) is not None})


def ask_options(values: Mapping[str, Any]) -> AskOptions:
    """How a command is to answer, by the values of `answer_options`."""
    return replace(
        settings_of(AskOptions, {**values, "schema": None}),
        structured=not values["no_structured"],
        constrained=not values["no_constrained"],
        schema=read_text(values["schema"]) if values["schema"] else None,
    )


def ego_config(values: Mapping[str, Any]) -> "EgoConfig | None":
    """EGO's settings; None where there is nobody.

    Raises:
        ConchError: A setting is out of its range, or there is a name without an address.
    """
    # An answer's length is that of corrections too.
    named = {
        "remote_model": values["ego_name"],
        "api_key_env": values["ego_key_env"],
        "max_tokens": values.get("max_tokens"),
    }
    if values["ego"] is None:
        if values["ego_name"] is not None or values["ego_key_env"] is not None:
            raise ConchError("--ego-name and --ego-key-env go with --ego URL")
        return None
    from conch_dna.ego.settings import EgoConfig

    rest = {"model": values["ego"], "trust_remote_code": values["trust_remote_code"]}
    return settings_of(EgoConfig, {**named, **rest})


def pipeline_of(values: Mapping[str, Any], student: str = "", **more: Any) -> "TrainingPipeline":
    """Experience and versions of a folder of adapters.

    Args:
        values: Of a command's options: the folder, and whether to redact.
        student: The adapters' base, which only a retraining asks for.
        **more: Of `TrainingPipeline`.
    """
    from conch_dna.retraining.pipeline import TrainingPipeline

    folder = Path(values["adapters"]).expanduser()
    return TrainingPipeline(
        folder, student, redact=values.get("redact", False), report=_tell, **more
    )


def _tell(event: str, row: dict[str, Any]) -> None:
    if event in ("message", "warning"):
        click.echo(row["message"], err=True)


@contextmanager
def opened_suite(
    values: Mapping[str, Any], *, domains: Sequence[str] | None = None
) -> Iterator["CortexSuite"]:
    """The neurons of a folder of adapters, in memory.

    Args:
        values: Of a command's options: `model_options`, perhaps `draft_options`, and whether to
            remember.
        domains: Which; all where None.

    Raises:
        ConchError: There is no adapter, one belongs to another student, or a model or EGO cannot
            be had.
        Interrupted: Ctrl-C.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    ego = ego_config(values)
    draft = settings_of(DraftSettings, values)
    if ego is None and (values.get("draft") or values.get("draft_tokens")) is not None:
        raise ConchError("--draft and --draft-tokens go with --ego MODEL")
    from conch_dna.cortex.commands.terminal import Screen
    from conch_dna.cortex.neuron import CortexSuite

    try:
        with Screen().notes.status("loading the neurons"):
            suite = CortexSuite(
                Path(values["adapters"]),
                values["student"],
                ego=ego,
                domains=domains,
                draft=draft,
                trust_remote_code=values["trust_remote_code"],
            )
        with suite:
            if values.get("remember"):
                suite.pipeline = pipeline_of(values, suite.source.model_id, ego=suite.ego)
            yield suite
    except KeyboardInterrupt:
        raise Interrupted("stopped") from None
