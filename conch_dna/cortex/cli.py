"""The commands of CORTEX: ask neurons, talk to them, serve them, see what there is.

Parses, calls, prints; decides nothing. To add a command: a function here or in
commands/learning.py with help, an example, a line in README.md, and its name at the end.
"""

import os
import sys
from typing import Any

import click

from conch_dna.command_parts import HELP, example
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
    write_figures,
)
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
@model_options
@answer_options
@remember_option
@redact_option
@json_option
def ask(domain: str, prompt: str, json_file: str | None, **given: Any) -> None:
    """Ask a neuron; it hands over to EGO, if there is one, where it is not sure.

    The answer goes to standard output as it comes, who gave it and why to standard error.
    """
    options = ask_options(given)
    question = _question(prompt)
    from conch_dna.cortex.commands.terminal import Screen

    screen = Screen()
    with opened_suite(given, domains=[domain]) as suite:
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
@model_options
@answer_options
@remember_option
@redact_option
def chat(domain: str | None, **given: Any) -> None:
    """Talk to neurons in the terminal; /help shows what else can be done there.

    Lines are also taken from a pipe: answers go to standard output, remarks to standard error.
    """
    options = ask_options(given)
    from conch_dna.cortex.commands.terminal import Screen, TerminalChat

    screen = Screen()
    with opened_suite(given) as suite:
        first = domain or suite.domains[0]
        pipeline = suite.pipeline or pipeline_of(given, suite.source.model_id, ego=suite.ego)
        TerminalChat(suite, first, options, pipeline=pipeline, screen=screen).run()


@command(
    "conch-dna cortex serve --ego mlx-community/Qwen2.5-7B-Instruct-4bit",
    "conch-dna cortex serve --port 8000 --api-key-env CONCH_DNA_KEY",
)
@model_options
@click.option("--host", metavar="ADDRESS", help="Where to listen. [default: 127.0.0.1]")
@click.option("--port", type=int, help="Likewise; 0 takes a free one. [default: 8642]")
@click.option(
    "--api-key-env",
    metavar="NAME",
    help="Environment variable with the key that clients must send; needed where other machines "
    "can ask. [default: none]",
)
@click.option("--max-body-bytes", type=int, help="Largest request. [default: 1048576]")
@click.option(
    "--max-queue", type=int, help="Most requests waiting or answered at once. [default: 256]"
)
@click.option("--max-batch", type=int, help="Most that are computed together. [default: 32]")
@click.option(
    "--request-timeout-s", type=float, help="Longest time for one request. [default: 600]"
)
@click.option(
    "--grace-s",
    type=float,
    help="Time to finish what is under way when it is stopped. [default: 30]",
)
@click.option(
    "--poll-s",
    type=float,
    help="Time between looks for new versions of adapters; 0 does not look. [default: 3]",
)
@click.option(
    "--keep-alive-s",
    type=float,
    help="Silence of a stream after which a comment keeps it open. [default: 10]",
)
@remember_option
@redact_option
def serve(
    host: str | None,
    port: int | None,
    api_key_env: str | None,
    max_body_bytes: int | None,
    max_queue: int | None,
    max_batch: int | None,
    request_timeout_s: float | None,
    grace_s: float | None,
    poll_s: float | None,
    keep_alive_s: float | None,
    **given: Any,
) -> None:
    """Serve all neurons, and EGO, to clients of the OpenAI chat API on this machine."""
    asked = {
        "host": host,
        "port": port,
        "api_key_env": api_key_env,
        "max_body_bytes": max_body_bytes,
        "max_queue": max_queue,
        "max_batch": max_batch,
        "request_timeout_s": request_timeout_s,
        "grace_s": grace_s,
        "poll_s": poll_s,
        "keep_alive_s": keep_alive_s,
    }
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from conch_dna.cortex.options import ServerSettings
    from conch_dna.cortex.server.serving import serve as run

    named: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    settings = ServerSettings(**named)
    with opened_suite(given) as suite:
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
def status(min_new: int, json_file: str | None, **given: Any) -> None:
    """Show the neurons, how sure they are, and what was recorded; loads no model."""
    from conch_dna.cortex.commands.status import neuron_rows, status_table

    pipeline = pipeline_of(given, min_new=min_new)
    rows, notes = neuron_rows(pipeline)
    print_tables(status_table(pipeline.adapters_dir, rows))
    for note in notes:
        click.echo(note, err=True)
    write_figures(json_file, {"neurons": rows, "notes": notes})


COMMANDS = (ask, chat, serve, status, calibrate, retrain, rollback, record)
for each in COMMANDS:
    cortex.add_command(each)
