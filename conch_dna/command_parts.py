"""What every command is made of: errors in one line, options from settings, YAML files.

Knows click and the fields of settings; no command. To turn another kind of field into an option: a
branch in `config_options`.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from conch_dna.errors import ConchError, Interrupted
from conch_dna.training.settings import KDConfig, kind_of, range_text

F = TypeVar("F", bound=Callable[..., Any])
INTERRUPTED_EXIT = 130
HELP = {"help_option_names": ["-h", "--help"]}


class OneLineErrors(click.Command):
    """A command whose user errors are one line on standard error and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except Interrupted as error:
            click.echo(str(error), err=True)
            sys.exit(INTERRUPTED_EXIT)
        except ConchError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("stopped; the same command with --resume goes on", err=True)
            sys.exit(INTERRUPTED_EXIT)


def config_options(command: F, *, leave_out: Sequence[str] = ()) -> F:
    """Give a command one option per field of KDConfig; those not given are None.

    Args:
        command: The function that becomes a command.
        leave_out: Fields that mean nothing to it.
    """
    for option in reversed([each for each in fields(KDConfig) if each.name not in leave_out]):
        name = option.name.replace("_", "-")
        limits = range_text(option)
        default = option.default if option.default != "" else "none"
        described = f"{option.metadata['help']} [default: {str(default).lower()}"
        described += f"; {limits}]" if limits else "]"
        if kind_of(option) == "bool":
            decorate = click.option(
                f"--{name}/--no-{name}", option.name, default=None, help=described
            )
        else:
            kind: Any = {"float": float, "int": int, "str": str}[kind_of(option)]
            if option.metadata["choices"]:
                kind = click.Choice(option.metadata["choices"])
            names = ["--num-iters", "--iters"] if option.name == "num_iters" else [f"--{name}"]
            decorate = click.option(*names, option.name, type=kind, default=None, help=described)
        command = decorate(command)
    return command


def example(*lines: str) -> str:
    """The end of a help text; click keeps the lines of a paragraph that begins with a backspace."""
    return "\n  ".join(["\b\nExample:", *lines])


def read_yaml(path: Path, *, option: str = "--config") -> dict[str, Any]:
    """The settings in a YAML file.

    Args:
        path: The file.
        option: By which it was given, for the message.

    Raises:
        ConchError: It cannot be read, or is no mapping.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads 1e-4, which YAML 1.1 takes for text, as the number it is in YAML 1.2."""

    number = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConchError(f"cannot read {option} {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConchError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConchError(f"{path} is not a mapping of option names to values")
    return {str(name): value for name, value in values.items()}
