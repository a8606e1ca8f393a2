"""What the commands of CORTEX share: options of adapters, EGO and answers, and what they open.

Knows click and the fields of AskOptions; no command. To give every command that answers another
option: a field of `AskOptions`, and its name in ANSWERING.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from conch_dna.command_parts import HELP, OneLineErrors, example, options_of
from conch_dna.cortex.options import AskOptions
from conch_dna.errors import ConchError, Interrupted
from conch_dna.training.settings import KDConfig

if TYPE_CHECKING:
    from conch_dna.cortex.neuron import CortexSuite
    from conch_dna.ego.settings import EgoConfig
    from conch_dna.retraining.pipeline import TrainingPipeline

F = TypeVar("F", bound=Callable[..., Any])
ANSWERING = ("max_tokens", "temperature", "top_p", "seed", "hand_over")


def command(*lines: str) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function a command whose help ends with an example.

    Args:
        *lines: The example.
    """
    return click.command(cls=OneLineErrors, context_settings=HELP, epilog=example(*lines))


domain_argument = click.argument("domain", help="Whose neuron, such as thinking.")
json_option = click.option("--json", "json_file", metavar="FILE", help="Write it there too.")


def print_tables(*tables: Any) -> None:
    """Show tables on standard output."""
    from rich.console import Console

    console = Console(highlight=False)
    for table in tables:
        console.print(table)


def write_figures(json_file: str | None, document: Any) -> None:
    """Write what `--json` asks for, if it was given."""
    if json_file:
        from conch_dna.checkpoints import write_json

        write_json(Path(json_file).expanduser(), document)


def adapters_option(command: F) -> F:
    """Where the adapters lie."""
    return click.option(
        "--adapters",
        metavar="DIR",
        default=KDConfig().output_dir,
        show_default=True,
        help="Folder of all domains' adapters.",
    )(command)


def redact_option(command: F) -> F:
    """What is not to be kept."""
    return click.option(
        "--redact",
        is_flag=True,
        help="Replace keys, passwords, addresses and numbers of cards in what is recorded.",
    )(command)


def model_options(command: F) -> F:
    """Whose adapters they are, and who answers what neurons are not sure of."""
    for decorate in (
        click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a model."),
        click.option(
            "--ego-key-env",
            metavar="NAME",
            help="Environment variable with that API's key; empty sends none. [default: "
            "OPENAI_API_KEY]",
        ),
        click.option("--ego-name", metavar="NAME", help="What the API at that URL calls EGO."),
        click.option(
            "--ego",
            metavar="MODEL",
            help="The big teacher: hub id, folder, embedded:teacher, or the URL of an "
            "OpenAI-compatible API. [default: nobody]",
        ),
        click.option(
            "--student",
            metavar="MODEL",
            help="The base of all adapters. [default: that which they name]",
        ),
        adapters_option,
    ):
        command = decorate(command)
    return command


def remember_option(command: F) -> F:
    """Whether hand-overs become experience."""
    return click.option(
        "--remember/--no-remember",
        default=True,
        show_default=True,
        help="Record what was handed over to EGO, to learn from it.",
    )(command)


def answer_options(command: F) -> F:
    """How questions are answered; what is not given is None."""
    command = click.option(
        "--no-structured", is_flag=True, help="Ask for no JSON object of the domain's schema."
    )(command)
    command = options_of(AskOptions, only=ANSWERING)(command)
    return click.option(
        "--system", metavar="TEXT", help="System prompt instead of the domain's own."
    )(command)


def ask_options(given: Mapping[str, Any]) -> AskOptions:
    """What `answer_options` were given."""
    named = {n: given[n] for n in (*ANSWERING, "system") if given[n] is not None}
    return AskOptions(**named, structured=not given["no_structured"])


def ego_config(given: Mapping[str, Any]) -> "EgoConfig | None":
    """EGO's settings; None where there is nobody.

    Raises:
        ConchError: See `EgoConfig`; or there is a name without an address.
    """
    named = {"remote_model": given["ego_name"], "api_key_env": given["ego_key_env"]}
    named = {name: value for name, value in named.items() if value is not None}
    if given["ego"] is None:
        if named:
            raise ConchError("--ego-name and --ego-key-env go with --ego URL")
        return None
    if given.get("max_tokens") is not None:
        # Corrections too.
        named["max_tokens"] = given["max_tokens"]
    from conch_dna.ego.settings import EgoConfig

    return EgoConfig(model=given["ego"], trust_remote_code=given["trust_remote_code"], **named)


def pipeline_of(given: Mapping[str, Any], student: str = "", **more: Any) -> "TrainingPipeline":
    """Experience and versions of a folder of adapters.

    Args:
        given: What a command was given: the folder, and whether to redact.
        student: The adapters' base, which only a retraining asks for.
        **more: Of `TrainingPipeline`.
    """
    from conch_dna.retraining.pipeline import TrainingPipeline

    folder = Path(given["adapters"]).expanduser()
    return TrainingPipeline(
        folder, student, redact=given.get("redact", False), report=_tell, **more
    )


def _tell(event: str, row: dict[str, Any]) -> None:
    if event in ("message", "warning"):
        click.echo(row["message"], err=True)


@contextmanager
def opened_suite(
    given: Mapping[str, Any], *, domains: Sequence[str] | None = None, **more: Any
) -> Iterator["CortexSuite"]:
    """The neurons of a folder of adapters, in memory.

    Args:
        given: What `model_options` were given, and whether to remember.
        domains: Which; all where None.
        **more: Of `CortexSuite`.

    Raises:
        ConchError: See `CortexSuite` and `EgoConfig`.
        Interrupted: Ctrl-C.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    ego = ego_config(given)
    from conch_dna.cortex.commands.terminal import Screen
    from conch_dna.cortex.neuron import CortexSuite

    try:
        with Screen().waiting("loading the neurons"):
            suite = CortexSuite(
                Path(given["adapters"]),
                given["student"],
                ego=ego,
                domains=domains,
                trust_remote_code=given["trust_remote_code"],
                **more,
            )
        with suite:
            if given.get("remember"):
                suite.pipeline = pipeline_of(given, suite.source.model_id, ego=suite.ego)
            yield suite
    except KeyboardInterrupt:
        raise Interrupted("stopped") from None
