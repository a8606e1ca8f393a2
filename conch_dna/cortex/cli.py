"""The commands of CORTEX: ask neurons, talk to them, serve them, see what there is.

Parses, calls, prints; decides nothing. To add a command: a function here or in
commands/learning.py with help, an example, a line in README.md, and its name at the end.
"""

import sys
from typing import Any

import click

from conch_dna.command_parts import HELP, example, options_of
from conch_dna.cortex.commands.learning import calibrate, record, retrain, rollback
from conch_dna.cortex.commands.shared_options import (
    adapters_option,
    answer_options,
    ask_options,
    command,
    domain_argument,
    json_option,
    model_options,
    opened_suite,
    pipeline_of,
    print_tables,
    redact_option,
    remember_option,
    settings_of,
    write_figures,
)
from conch_dna.cortex.server.settings import ServerSettings
from conch_dna.errors import ConchError


@click.group(
    context_settings=HELP,
    epilog=example(
        'conch-dna cortex ask thinking "Should we rent or buy a printer?"',
        "conch-dna cortex chat thinking --ego mlx-community/Qwen2.5-7B-Instruct-4bit",
    ),
)
def cortex() -> None:
    """Use distilled adapters: one small model, a neuron for each domain, EGO when unsure."""


@command(
    'conch-dna cortex ask thinking "Should we rent or buy a printer?"',
    "conch-dna cortex ask task - --ego http://127.0.0.1:8080/v1 --ego-name qwen < plan.txt",
)
@domain_argument
@click.argument("prompt", help="The question; - reads it from standard input.")
@model_options()
@answer_options
@remember_option
@redact_option
@json_option
def ask(domain: str, prompt: str, json_file: str | None, **values: Any) -> None:
    """Ask a neuron; it hands over to EGO, if there is one, where it is not sure.

    The answer goes to standard output as it comes, who gave it and why to standard error.
    """
    options = ask_options(values)
    question = _question(prompt)
    from conch_dna.cortex.commands.terminal import Screen

    screen = Screen()
    with opened_suite(values, domains=[domain]) as suite:
        known = len(suite.notes)
        deltas = suite.stream(domain, question, **vars(options))
        answer = screen.show(deltas, f"{domain} answers")
        for note in suite.notes[known:]:
            screen.note(note)
        write_figures(json_file, answer.to_json())


def _question(prompt: str) -> str:
    """What is asked: the argument, or standard input."""
    if prompt != "-":
        return prompt
    from conch_dna.cortex.commands.terminal import decoded

    text = decoded(sys.stdin.buffer.read(), "standard input").rstrip("\n")
    if not text:
        raise ConchError("standard input is empty: there is nothing to answer")
    return text


@command(
    "conch-dna cortex chat thinking",
    "conch-dna cortex chat --ego mlx-community/Qwen2.5-7B-Instruct-4bit --redact",
)
@click.argument("domain", required=False, help="Who answers first. [default: the first neuron]")
@model_options()
@answer_options
@remember_option
@redact_option
def chat(domain: str | None, **values: Any) -> None:
    """Talk to neurons in the terminal; /help shows what else can be done there.

    Lines are also taken from a pipe: answers go to standard output, remarks to standard error.
    """
    options = ask_options(values)
    from conch_dna.cortex.commands.terminal import Screen, TerminalChat

    screen = Screen()
    with opened_suite(values) as suite:
        first = domain or suite.domains[0]
        pipeline = suite.pipeline or pipeline_of(values, suite.source.model_id, ego=suite.ego)
        TerminalChat(suite, first, options, pipeline=pipeline, screen=screen).run()


@command(
    "conch-dna cortex serve --ego mlx-community/Qwen2.5-7B-Instruct-4bit",
    "conch-dna cortex serve --port 8000 --api-key-env CONCH_DNA_KEY",
)
@model_options()
@options_of(ServerSettings)
@remember_option
@redact_option
def serve(**values: Any) -> None:
    """Serve all neurons, and EGO, to clients of the OpenAI chat API on this machine."""
    settings = settings_of(ServerSettings, values)
    from conch_dna.cortex.server.serving import serve as run

    with opened_suite(values) as suite:
        run(suite, settings)


@command("conch-dna cortex status", "conch-dna cortex status --adapters models/other")
@adapters_option
@click.option(
    "--min-new",
    type=int,
    default=50,
    show_default=True,
    help="Corrections and hand-overs from which a retraining is advised.",
)
@json_option
def status(min_new: int, json_file: str | None, **values: Any) -> None:
    """Show the neurons, how sure they are, and what was recorded; loads no model."""
    from conch_dna.cortex.commands.status import neuron_rows, status_table

    pipeline = pipeline_of(values, min_new=min_new)
    rows, notes = neuron_rows(pipeline)
    print_tables(status_table(pipeline.adapters_dir, rows))
    for note in notes:
        click.echo(note, err=True)
    write_figures(json_file, {"neurons": rows, "notes": notes})


COMMANDS = (ask, chat, serve, status, calibrate, retrain, rollback, record)
for each in COMMANDS:
    cortex.add_command(each)
