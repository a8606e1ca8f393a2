"""What every command is made of: errors in one line, options from settings, YAML files.

Knows click and the fields of settings; no command. To turn another kind of field into an option:
its type in `field_option`.
"""

import errno
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click
from click.exceptions import NoArgsIsHelpError

from conch_dna.errors import ConchError, Interrupted, decoded, one_line, told
from conch_dna.options.fields import is_limited, kind_of, range_text

F = TypeVar("F", bound=Callable[..., Any])
INTERRUPTED_EXIT = 130
# Bytes of a YAML file; the parser takes about a second for so much.
MOST_YAML = 2**20
HELP = {"help_option_names": ["-h", "--help"]}


class OneLineUsageError(click.UsageError):
    """A mistake in how a command was called, told like any other: in one line."""

    def show(self, file: Any = None) -> None:
        """Print it on standard error."""
        more = f"; see {self.ctx.command_path} --help" if self.ctx else ""
        click.echo(f"error: {one_line(self.message).rstrip('.')}{more}", file=file, err=True)


@contextmanager
def _one_line_usage(ctx: click.Context | None = None) -> Iterator[None]:
    """Turns click's errors of usage, which take four lines, and Ctrl-C into one line each."""
    try:
        yield
    except (OneLineUsageError, NoArgsIsHelpError):
        raise
    except click.UsageError as error:
        raise OneLineUsageError(error.format_message(), error.ctx or ctx) from error
    except KeyboardInterrupt:
        resumes = ctx and any(option.name == "resume" for option in ctx.command.params)
        more = "; the same command with --resume goes on" if resumes else ""
        click.echo(f"stopped{more}", err=True)
        sys.exit(INTERRUPTED_EXIT)


class OneLineUsage(click.Command):
    """A command or group that tells in one line how it was called wrongly.

    Args:
        headings: For its help, the first option of each group of options by the group's heading.
    """

    def __init__(
        self, *args: Any, headings: Mapping[str, str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.headings = {first: heading for heading, first in (headings or {}).items()}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, in groups where there are headings."""
        groups: dict[str, list[tuple[str, str]]] = {}
        heading = "Options"
        for parameter in self.get_params(ctx):
            heading = self.headings.get(parameter.name or "", heading)
            heading = "Options" if parameter.name == "help" else heading
            record = parameter.get_help_record(ctx)
            if record and isinstance(parameter, click.Option):
                groups.setdefault(heading, []).append(record)
        for each, records in groups.items():
            with formatter.section(each):
                formatter.write_dl(records)
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)

    def get_short_help_str(self, limit: int = 45) -> str:
        """The first sentence, whole."""
        return super().get_short_help_str(max(limit, 200))

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the command line."""
        with _one_line_usage():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, or find it in the group."""
        with _one_line_usage(ctx):
            return super().invoke(ctx)


class OneLineGroup(OneLineUsage, click.Group):
    """A group of such commands."""


class OneLineErrors(OneLineUsage):
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
        except OSError as error:
            # A pipe that nobody reads any more is click's to answer.
            if error.errno == errno.EPIPE:
                raise
            click.echo(f"error: {one_line(error)}", err=True)
            sys.exit(2)


def command(
    *lines: str, name: str | None = None, headings: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function a command whose help ends with an example.

    Args:
        *lines: The example.
        name: Of the command; the function's by default.
        headings: The first option of each group of options by the group's heading.
    """
    return click.command(
        name, cls=OneLineErrors, context_settings=HELP, headings=headings, epilog=example(*lines)
    )


json_option = click.option("--json", "json_file", metavar="FILE", help="Write the figures there.")


def write_figures(json_file: str | None, document: Any) -> None:
    """Write what a command found where `--json` says, if it says."""
    if json_file:
        from conch_dna.checkpoints import write_json

        write_json(Path(json_file).expanduser(), document)


def options_of(
    settings: type,
    *,
    only: Sequence[str] | None = None,
    leave_out: Sequence[str] = (),
    names: Mapping[str, Sequence[str]] | None = None,
    several: Sequence[str] = (),
) -> Callable[[F], F]:
    """Give a command one option per field of a settings class; those not given are None.

    Args:
        settings: A dataclass whose fields were made by `options.fields.option`.
        only: The fields that become options; all by default.
        leave_out: Fields that mean nothing to the command.
        names: Other names on the command line, by field.
        several: Fields that take several values with commas, as a tuple.
    """

    def decorate(command: F) -> F:
        for each in reversed(fields(settings)):
            if "help" not in each.metadata or each.name in leave_out:
                continue
            if only is not None and each.name not in only:
                continue
            many = each.name in several
            command = field_option(each, *(names or {}).get(each.name, ()), many=many)(command)
        return command

    return decorate


class Several(click.ParamType):
    """Values of one type with commas between them, as a tuple.

    Args:
        single: The type of each.
    """

    name = "several"

    def __init__(self, single: click.ParamType) -> None:
        self.single = single

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """What the help shows for a value."""
        shown = self.single.get_metavar(param, ctx) or self.single.name.upper()
        return f"{shown}[,…]"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        """Each value by its own type."""
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(self.single.convert(part.strip(), param, ctx) for part in parts)


def field_option(
    each: Any, *names: str, metavar: str | None = None, many: bool = False
) -> Callable[[F], F]:
    """An option from a field of settings, told with its default and range; None where not given.

    Args:
        each: The field, made by `options.fields.option`.
        *names: On the command line; by default the field's own, and its aliases.
        metavar: What the help shows for a value; None for click's own.
        many: Take several values with commas.
    """
    dashed = each.name.replace("_", "-")
    if not names and kind_of(each) == "bool":
        names = (f"--{dashed}/--no-{dashed}",)
    choices = each.metadata["choices"]
    default = each.default if each.default != "" else "none"
    limits = f"; {range_text(each)}" if is_limited(each) else ""
    described = f"{each.metadata['help']} [default: {str(default).lower()}{limits}]"
    types: dict[str, Any] = {"float": click.FLOAT, "int": click.INT, "str": str, "bool": None}
    single = click.Choice(choices) if choices else types[kind_of(each)]
    return click.option(
        *(names or (f"--{dashed}",)),
        each.name,
        type=Several(single) if many else single,
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
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_YAML + 1)
    except (OSError, ValueError) as error:
        raise ConchError(f"cannot read {option} {path}: {error}") from error
    values = parse_yaml(content, str(path), option=option)
    if not isinstance(values, dict):
        raise ConchError(f"{path} is not a mapping of option names to values")
    return {str(name): value for name, value in values.items()}


def parse_yaml(content: bytes, source: str, *, option: str) -> Any:
    """What a YAML file holds; aliases, by which a short file becomes a huge value, are refused.

    Args:
        content: Of the file, or the first MOST_YAML bytes of it and more.
        source: Where it comes from, for the message.
        option: By which it was given, for the message.

    Raises:
        ConchError: It is no YAML, too long, nested too deeply, gives a key twice or has aliases.
    """
    import yaml

    from conch_dna.checkpoints import MOST_LEVELS, require_plain

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """Reads 1e-4 as the number it is in YAML 1.2, not as a text; a key stands once."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = Counter(key.value for key, _ in node.value if isinstance(key.value, str))
            if twice := [name for name, count in names.items() if count > 1]:
                line = node.start_mark.line + 1
                raise ConchError(
                    f"{source} gives {', '.join(twice)} twice in the mapping that begins on line "
                    f"{line}: leave one of each"
                )
            return super().construct_mapping(node, deep)

    number = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    if len(content) > MOST_YAML:
        raise ConchError(f"{source} has more than {MOST_YAML:,} bytes: settings are shorter")
    text = decoded(content, f"cannot read {option} {source}")
    # What dates and numbers are made of raises all kinds.
    with told(f"{source} is not YAML"):
        level = 0
        for event in yaml.parse(text, Loader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it has an alias (*): write the value out")
            level += isinstance(event, yaml.CollectionStartEvent)
            level -= isinstance(event, yaml.CollectionEndEvent)
            if level > MOST_LEVELS:
                raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels")
        values = yaml.load(text, Loader)
        require_plain(values)
    return values
