"""The commands of model lines: begin, evolve, look, go back, and answer together.

Parses, calls, prints; decides nothing. To add a command: a function here under `generations`, with
help, an example, and a line in docs/generations.md.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from conch_dna.errors import ConchError
from conch_dna.generations.settings import UNUSED, EvolveConfig, requested
from conch_dna.options.commands import (
    HELP,
    OneLineGroup,
    command,
    example,
    json_option,
    options_of,
    read_yaml,
    write_figures,
)
from conch_dna.screen.presentation import print_tables
from conch_dna.training.settings import KDConfig

if TYPE_CHECKING:
    from conch_dna.generations.line import Line


@click.group(
    cls=OneLineGroup,
    context_settings=HELP,
    epilog=example(
        "conch-dna generations init tales --model embedded:student --data stories.jsonl",
        "conch-dna generations evolve tales --data sums.jsonl",
    ),
)
def generations() -> None:
    """Grow a line of models, in which a child must earn its place."""


def _command(
    *lines: str, named: bool = True, headings: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function a command of the group whose first argument is a line.

    Args:
        *lines: The example with which its help ends.
        named: Whether the line's name must be given; else the function gets the name, which may be
            None, and the folder of all lines instead.
        headings: As of `options.commands.command`.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        @wraps(function)
        def on_line(name: str | None, root: str, **options: Any) -> None:
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            from conch_dna.generations.line import Line

            folder = Path(root).expanduser()
            if named:
                function(Line(folder, str(name)), **options)
            else:
                function(name, folder, **options)

        add_root = click.option(
            "--root",
            metavar="DIR",
            default="generations",
            show_default=True,
            help="Folder of all lines.",
        )
        add_name = click.argument(
            "name",
            required=named,
            help="Name of the line." if named else "Name of the line; else the manifest says it.",
        )
        made = command(*lines, headings=headings)(add_name(add_root(on_line)))
        generations.add_command(made)
        return made

    return decorate


def _print_verdicts(name: str, verdicts: Sequence[Any]) -> None:
    from conch_dna.generations.tables import verdict_table

    print_tables(verdict_table(name, [asdict(verdict) for verdict in verdicts]))


@_command("conch-dna generations init tales --model embedded:student --data stories.jsonl")
@click.option("--model", required=True, metavar="MODEL", help="Hub id, folder or embedded name.")
@click.option(
    "--data",
    required=True,
    metavar="FILE",
    help="JSONL of what it can do: later generations replay it and are measured on it.",
)
@click.option("--adapter", metavar="DIR", help="Folder of an adapter that belongs to the model.")
def init(line: "Line", model: str, data: str, adapter: str | None) -> None:
    """Begin a line with a model as generation 0."""
    from conch_dna.generations.data import init_line
    from conch_dna.training.data.records import read_records

    records = read_records(Path(data))
    first = init_line(line, model, records, adapter=Path(adapter) if adapter else None)
    click.echo(f"{line.name}: {first} is {model}, with {len(records)} records, in {line.folder}")


def _manifest(path: str | None) -> dict[str, Any]:
    """The manifest that a user gives, of which nothing but its parts is known."""
    return read_yaml(Path(path), option="--manifest") if path else {}


@_command(
    "conch-dna generations evolve tales --data sums.jsonl --iters 200",
    "conch-dna generations evolve --manifest evolution.yaml --resume",
    "conch-dna generations evolve tales --data sums.jsonl --method sdft --demonstrations answer",
    named=False,
    headings={
        "What to learn": "data",
        "Loss and stability": "alpha",
        "Teachers": "critic",
        "How to run": "json_file",
        "Targets": "temperature",
        "With --method sdft": "teacher_system",
        "What is trained": "lora_rank",
        "Steps": "learning_rate",
        "Held-out data": "val_fraction",
        "Examples and answers": "max_seq_length",
        "Memory and seed": "loss_memory",
    },
)
@click.option("--data", metavar="FILE", help="JSONL of the new data; else the manifest says it.")
@click.option(
    "--manifest",
    "manifest_file",
    metavar="FILE",
    help="YAML or JSON with the parts of a generation's manifest: evolution_request (line, data), "
    "teachers, training_params, stabilizers, evaluation, gates and laws.",
)
@click.option("--laws", metavar="FILE", help="YAML of what every answer must keep to.")
@click.option(
    "--taboo", "taboo_words", multiple=True, metavar="WORD", help="Taught by nobody; repeatable."
)
@options_of(EvolveConfig, leave_out=("replay_size", "measured", "answers"))
@json_option
@click.option("--resume", is_flag=True, help="Go on with a stopped run.")
@click.option("--overwrite", is_flag=True, help="Start again over an unfinished run.")
@options_of(
    KDConfig,
    leave_out=[n for n in UNUSED if n != "trust_remote_code"],
    names={"num_iters": ("--num-iters", "--iters")},
)
def evolve(
    name: str | None,
    root: Path,
    data: str | None,
    manifest_file: str | None,
    laws: str | None,
    json_file: str | None,
    resume: bool,
    overwrite: bool,
    **options: Any,
) -> None:
    """Learn from parent and grandparent, or by itself; replace the parent if every gate passes.

    Exit code 1 says that the child was refused and archived.
    """
    if resume and overwrite:
        raise ConchError("give either --resume to go on or --overwrite to start again")
    from conch_dna.generations.evolve import train_generation_with_teachers
    from conch_dna.generations.laws import read_laws
    from conch_dna.generations.line import Line
    from conch_dna.screen.progress import Progress
    from conch_dna.training.data.records import read_records

    source = manifest_file or "the command line"
    manifest = _manifest(manifest_file)
    names = requested(manifest, source, line=name, data=data)
    named = {option: value for option, value in options.items() if value not in (None, ())}
    own = {each.name: named.pop(each.name) for each in fields(EvolveConfig) if each.name in named}
    if laws:
        own["laws"] = tuple(read_laws(Path(laws)))
    config = EvolveConfig.from_manifest(manifest, source=source, training=named, overriding=own)
    line = Line(root, names["line"])
    _ = line.head
    records = read_records(Path(names["data"]))
    with Progress() as progress:
        outcome = train_generation_with_teachers(
            line, records, config, report=progress, resume=resume, overwrite=overwrite
        )
    _print_verdicts(outcome.name, outcome.verdicts)
    write_figures(json_file, asdict(outcome))
    click.echo(f"HEAD of {line.name} is {line.head}; the child is in {line.path(outcome.name)}")
    if not outcome.promoted:
        sys.exit(1)


@_command("conch-dna generations validate tales", "conch-dna generations validate tales G002")
@click.argument("generation", required=False, help="Default: the current one.")
@click.option("--manifest", "manifest_file", metavar="FILE", help="YAML or JSON with other gates.")
def validate(line: "Line", generation: str | None, manifest_file: str | None) -> None:
    """Judge a generation again by its stored measures, with its own or with other gates.

    Exit code 1 says that a gate fails.
    """
    from conch_dna.checkpoints import read_json, require_keys
    from conch_dna.generations.manifest import METRICS_FILE
    from conch_dna.generations.promotion import gate_verdicts

    name = generation or line.head
    manifest = line.manifest(name)
    if "verdicts" not in manifest:
        raise ConchError(f"{name} is the first generation: it was not judged")
    request = _manifest(manifest_file) or manifest
    gates = EvolveConfig.from_manifest(request, source=manifest_file or name).gates
    metrics_path = line.path(name) / METRICS_FILE
    scores = read_json(metrics_path, needs={"scores": dict})["scores"]
    require_keys(scores, metrics_path, needs={"child": dict, "parent": dict})
    verdicts = gate_verdicts(scores["child"], scores["parent"], gates)
    _print_verdicts(name, verdicts)
    if not all(verdict.passed for verdict in verdicts):
        sys.exit(1)


@_command("conch-dna generations show tales G002")
@click.argument("generation", required=False, help="Default: the current one.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest instead.")
def show(line: "Line", generation: str | None, as_json: bool) -> None:
    """Show what a generation grew from, what it was taught, and how it was judged."""
    from conch_dna.checkpoints import json_text
    from conch_dna.generations.tables import manifest_table, verdict_table

    name = generation or line.head
    manifest = line.manifest(name)
    if as_json:
        click.echo(json_text(manifest), nl=False)
        return
    print_tables(manifest_table(name, manifest))
    if "verdicts" in manifest:
        print_tables(verdict_table(name, manifest["verdicts"]))


@_command("conch-dna generations log tales --picture tales.png")
@click.option("--picture", metavar="FILE", help="Draw the line there, as PNG, PDF or SVG.")
def log(line: "Line", picture: str | None) -> None:
    """Show the line as a tree: what grew from what, what was refused, and what is current."""
    from conch_dna.checkpoints import write_atomically
    from conch_dna.generations.tables import draw_line, line_tree, nodes_of

    head = line.head
    nodes = nodes_of(line)
    print_tables(line_tree(line.name, nodes, head))
    if picture:
        path = Path(picture)
        write_atomically(path, partial(draw_line, title=line.name, nodes=nodes, head=head))
        click.echo(f"drawn in {path}")


@_command("conch-dna generations verify tales")
def verify(line: "Line") -> None:
    """Check every generation and the log against what was written."""
    _ = line.head
    problems = line.problems()
    if problems:
        raise ConchError(f"line {line.name!r} is not as it was written: {'; '.join(problems)}")
    count = len(line.generations())
    click.echo(f"{line.name}: {count} generations and {len(line.log())} log entries are whole")


@_command("conch-dna generations rollback tales", "conch-dna generations rollback tales --to G001")
@click.option("--to", metavar="GENERATION", help="An ancestor. [default: the parent]")
def rollback(line: "Line", to: str | None) -> None:
    """Let an ancestor be current again; nothing is deleted."""
    _ = line.head
    with line.lock():
        for text in line.recover():
            click.echo(text)
        before = line.head
        target = line.rollback(to)
    click.echo(f"HEAD of {line.name} was {before} and is {target}")


@_command('conch-dna generations ensemble tales --prompt "Once upon a time"')
@click.option("--prompt", required=True, help="The prompt to answer.")
@click.option(
    "--use",
    "names",
    metavar="G001,G002",
    help="Which generations. [default: the current one and its parent]",
)
@click.option(
    "--weights", metavar="W,W", help="Weight of each of them. [default: each token's confidence]"
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Longest answer in tokens.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Temperature at which tokens are drawn; 0 takes the likeliest one.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the random draw of tokens."
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def ensemble(
    line: "Line",
    prompt: str,
    names: str | None,
    weights: str | None,
    max_tokens: int,
    temperature: float,
    seed: int,
    trust_remote_code: bool,
) -> None:
    """Let several generations answer a prompt together."""
    from conch_dna.generations.ensemble import ensemble_answer, load_generations
    from conch_dna.language_model import ModelSource
    from conch_dna.training.chats.conversations import prompt_ids
    from conch_dna.training.data.answers import continuation_text

    head = line.head
    members = names.split(",") if names else [head, *line.ancestors(head)[:1]]
    shares = _numbers(weights) if weights else None
    base = ModelSource(line.base(head)["model"], trust_remote_code=trust_remote_code)
    models = load_generations(base, [line.adapter(each.strip()) for each in members])
    ids = prompt_ids(base.tokenizer, prompt, "")
    answer = ensemble_answer(
        ids, models, shares, max_tokens=max_tokens, temperature=temperature, seed=seed
    )
    if answer[-1] in base.tokenizer.eos_token_ids:
        answer = answer[:-1]
    click.echo(continuation_text(base.tokenizer, ids, answer).strip())


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConchError(f"--weights {text} are no numbers with commas, such as 2,1") from error
