"""What every command is made of: errors in one line, options from settings, YAML files.

Knows click and the fields of settings; no command. To turn another kind of field into an option:
its type in `field_option`.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from conch_dna.errors import ConchError, Interrupted
from conch_dna.option_fields import is_limited, kind_of, range_text

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
            resumes = any(option.name == "resume" for option in ctx.command.params)
            more = "; the same command with --resume goes on" if resumes else ""
            click.echo(f"stopped{more}", err=True)
            sys.exit(INTERRUPTED_EXIT)


def options_of(
    settings: type,
    *,
    only: Sequence[str] | None = None,
    leave_out: Sequence[str] = (),
    names: Mapping[str, Sequence[str]] | None = None,
) -> Callable[[F], F]:
    """Give a command one option per field of a settings class; those not given are None.

    Args:
        settings: A dataclass whose fields were made by `option_fields.option`.
        only: The fields that become options; all by default.
        leave_out: Fields that mean nothing to the command.
        names: Other names on the command line, by field.
    """

    def decorate(command: F) -> F:
        for each in reversed(fields(settings)):
            if "help" not in each.metadata or each.name in leave_out:
                continue
            if only is not None and each.name not in only:
                continue
            command = field_option(each, *(names or {}).get(each.name, ()))(command)
        return command

    return decorate


def field_option(each: Any, *names: str, metavar: str | None = None) -> Callable[[F], F]:
    """An option from a field of settings, told with its default and range; None where not given.

    Args:
        each: The field, made by `option_fields.option`.
        *names: On the command line; by default the field's own, and its aliases.
        metavar: What the help shows for a value; None for click's own.
    """
    dashed = each.name.replace("_", "-")
    if not names and kind_of(each) == "bool":
        names = (f"--{dashed}/--no-{dashed}",)
    choices = each.metadata["choices"]
    default = each.default if each.default != "" else "none"
    limits = f"; {range_text(each)}" if is_limited(each) else ""
    described = f"{each.metadata['help']} [default: {str(default).lower()}{limits}]"
    types: dict[str, Any] = {"float": float, "int": int, "str": str, "bool": None}
    return click.option(
        *(names or (f"--{dashed}",)),
        each.name,
        type=click.Choice(choices) if choices else types[kind_of(each)],
        metavar=metavar,
        default=None,
        help=described,
    )


def example(*lines: str) -> str:
    """The end of a help text; click keeps the lines of a paragraph that begins with a backspace."""
    return "\n  ".join(["\b\nExample:", *lines])


def passed_on(
    group: click.Group, module: str, *lines: str
) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function a command that gives all its arguments to another module's command.

    Args:
        group: Where it belongs.
        module: Whose command, for the help.
        *lines: The example.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        arguments = click.argument(
            "arguments", nargs=-1, type=click.UNPROCESSED, help=f"As of python -m {module}."
        )
        command: click.Command = group.command(
            cls=OneLineErrors,
            add_help_option=False,
            context_settings={"ignore_unknown_options": True},
            epilog=example(*lines),
        )(arguments(function))
        return command

    return decorate


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
