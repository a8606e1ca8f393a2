"""The commands of CORTEX: ask, chat, serve, status, and those by which neurons learn.

Parses, calls, prints; decides nothing. To add a command: a function with help, an example, a line
in docs/cortex.md, and its name at the end.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click

from conch_dna.cortex.calibration.settings import CalibrationSettings
from conch_dna.cortex.commands.shared_options import (
    adapters_option,
    answer_options,
    ask_options,
    domain_argument,
    draft_options,
    model_options,
    opened_suite,
    pipeline_of,
    redact_option,
    remember_option,
    settings_of,
    trust_option,
)
from conch_dna.cortex.options import ServerSettings
from conch_dna.errors import ConchError, Interrupted, one_line
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


@click.group(
    cls=OneLineGroup,
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
    headings={"Models": "adapters", "Answer": "system", "Experience": "remember"},
)
@domain_argument
@click.argument("prompt", help="The question; - reads it from standard input.")
@model_options()
@draft_options
@answer_options
@remember_option
@redact_option
@json_option
def ask(domain: str, prompt: str, json_file: str | None, **values: Any) -> None:
    """Ask a neuron; it hands over to EGO, if there is one, where it is not sure.

    The answer goes to standard output as it comes, who gave it and why to standard error. Exit
    code 1 says that it does not keep to the domain's schema.
    """
    options = ask_options(values)
    if options.hand_over == "always" and values["ego"] is None:
        raise ConchError("--hand-over always asks EGO, and there is none: give --ego MODEL")
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
    if answer.valid is False:
        why = f"the answer does not keep to the schema of {domain}: {answer.problems[0]}"
        click.echo(f"error: {one_line(why)}; --no-structured asks for plain text", err=True)
        sys.exit(1)


def _question(prompt: str) -> str:
    """What is asked: the argument, or standard input."""
    if prompt != "-":
        if not prompt.strip():
            raise ConchError("the prompt is empty: there is nothing to answer")
        return prompt
    from conch_dna.cortex.commands.terminal import decoded

    text = decoded(sys.stdin.buffer.read(), "standard input").rstrip("\n")
    if not text:
        raise ConchError("standard input is empty: there is nothing to answer")
    return text


@command(
    "conch-dna cortex chat thinking",
    "conch-dna cortex chat --ego mlx-community/Qwen2.5-7B-Instruct-4bit --redact",
    headings={"Models": "adapters", "Answers": "system", "Experience": "remember"},
)
@click.argument("domain", required=False, help="Who answers first. [default: the first neuron]")
@model_options()
@draft_options
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
    headings={"Models": "adapters", "Server": "host", "Experience": "remember"},
)
@model_options()
@draft_options
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
    from conch_dna.cortex.commands.status import drift_table, neuron_rows, status_table

    pipeline = pipeline_of(values, min_new=min_new)
    rows, notes = neuron_rows(pipeline)
    tables = [status_table(pipeline.adapters_dir, rows), drift_table(rows)]
    print_tables(*(table for table in tables if table is not None))
    for note in notes:
        click.echo(note, err=True)
    write_figures(json_file, {"neurons": rows, "notes": notes})


@command(
    "conch-dna cortex calibrate thinking --ego mlx-community/Qwen2.5-7B-Instruct-4bit",
    "conch-dna cortex calibrate --all --ego embedded:teacher --max-risk 0.2",
    headings={"Neurons": "all_domains", "Models": "adapters", "Calibration": "prompts"},
)
@click.argument("domain", required=False, help="The neuron whose confidence is calibrated.")
@click.option("--all", "all_domains", is_flag=True, help="Every neuron, one after the other.")
@model_options()
@click.option(
    "--prompts",
    metavar="FILE",
    help="Prompts that it was not trained on, one a line (or JSONL). [default: its held-out data]",
)
@click.option(
    "--data",
    metavar="FILE",
    help="JSONL records that it was not trained on. [default: its held-out data]",
)
@options_of(CalibrationSettings)
@json_option
def calibrate(
    domain: str | None,
    all_domains: bool,
    prompts: str | None,
    data: str | None,
    json_file: str | None,
    **values: Any,
) -> None:
    """Measure how often a neuron agrees with EGO, and from which confidence it may answer itself.

    The result, and its picture, lie in the domain's folder and hold for the adapter in use.
    """
    if all_domains == (domain is not None):
        raise ConchError("give either a domain or --all")
    if values["ego"] is None:
        raise ConchError("a neuron is calibrated on its agreement with EGO: give --ego MODEL")
    if all_domains and (prompts or data):
        raise ConchError("--prompts and --data go with one domain, not with --all")
    settings = settings_of(CalibrationSettings, values)
    from conch_dna.cortex.calibration.calibrating import calibrate_domain
    from conch_dna.cortex.commands.status import calibration_table
    from conch_dna.screen.progress import Progress
    from conch_dna.training.data.records import read_prompts, read_records
    from conch_dna.training.data.views import prompt_text

    texts = list(map(prompt_text, read_prompts(Path(prompts)))) if prompts else None
    records = read_records(Path(data)) if data else None
    calibrations, details, failures = {}, {}, {}
    with (
        opened_suite(values, domains=None if domain is None else [domain]) as suite,
        Progress() as progress,
    ):
        for name in suite.domains:
            try:
                calibrations[name], details[name] = calibrate_domain(
                    suite, name, settings, prompts=texts, data=records, report=progress
                )
            except Interrupted:
                raise
            except ConchError as error:
                if not all_domains:
                    raise
                failures[name] = str(error)
    if calibrations:
        print_tables(calibration_table(calibrations))
    for name, calibration in calibrations.items():
        click.echo(f"{name}: {calibration.verdict}")
    for name, reason in failures.items():
        click.echo(f"error: {name}: {reason}", err=True)
    results = {
        name: {**each.to_json(), "details": details[name]} for name, each in calibrations.items()
    }
    write_figures(json_file, {"calibrations": results, "failures": failures})
    if failures:
        sys.exit(1)


@command(
    "conch-dna cortex retrain thinking --ego mlx-community/Qwen2.5-7B-Instruct-4bit",
    "conch-dna cortex retrain thinking --config retraining.yaml --resume",
)
@domain_argument
@adapters_option
@click.option(
    "--student", metavar="MODEL", help="The base of the adapter. [default: that which it names]"
)
@click.option(
    "--ego",
    metavar="MODEL",
    help="Teaches by its distributions, or, where it is a URL, by its recorded answers alone. "
    "[default: nobody]",
)
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    help="YAML with parts of a generation's manifest: training_params, stabilizers, evaluation, "
    "gates and laws. [default: as the domain was distilled]",
)
@click.option(
    "--old-data",
    metavar="FILE",
    help="JSONL that the domain was distilled from, where its folder does not keep it.",
)
@click.option("--with-refused", is_flag=True, help="Try again what the gates refused before.")
@click.option("--resume", is_flag=True, help="Go on with a stopped retraining.")
@click.option("--overwrite", is_flag=True, help="Start again over an unfinished one.")
@trust_option
@json_option
def retrain(
    domain: str,
    student: str | None,
    ego: str | None,
    config_file: str | None,
    old_data: str | None,
    trust_remote_code: bool,
    json_file: str | None,
    adapters: str,
    **flags: bool,
) -> None:
    """Teach a neuron what was recorded of it; the gates decide whether it answers from then on.

    Exit code 1 says that they refused it, and it is archived.
    """
    if flags["resume"] and flags["overwrite"]:
        raise ConchError("give either --resume to go on or --overwrite to start again")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from dataclasses import asdict

    from conch_dna.cortex.neuron import student_of
    from conch_dna.generations.tables import verdict_table
    from conch_dna.retraining.domain import active_adapter, settings_over
    from conch_dna.screen.progress import Progress
    from conch_dna.training.data.records import read_records

    manifest = read_yaml(Path(config_file)) if config_file else {}
    records = read_records(Path(old_data)) if old_data else None
    folder = {"adapters": adapters}
    student = student or student_of(active_adapter(Path(adapters).expanduser(), domain))
    pipeline = pipeline_of(folder, student, ego=ego)
    if config_file or trust_remote_code:
        config = settings_over(
            pipeline.settings_for(domain),
            manifest,
            source=config_file or "the command line",
            trust_remote_code=trust_remote_code,
        )
        pipeline = pipeline_of(folder, student, ego=ego, config=config)
    with Progress() as progress:
        result = pipeline.retrain(domain, old_data=records, report=progress, **flags)
    print_tables(verdict_table(result.version, [asdict(verdict) for verdict in result.verdicts]))
    for reason, count in Counter(result.left_out.values()).items():
        click.echo(f"left out: {count} experiences, since {reason}")
    head = pipeline.line(domain).head
    click.echo(
        f"{domain} learned from {result.experiences} experiences and answers by {head}; the new "
        f"version is in {result.path}"
    )
    write_figures(json_file, {**asdict(result), "path": str(result.path)})
    if not result.promoted:
        sys.exit(1)


@command(
    "conch-dna cortex rollback thinking",
    "conch-dna cortex rollback thinking --to G000",
)
@domain_argument
@adapters_option
@click.option("--to", metavar="VERSION", help="An earlier one. [default: the one before]")
def rollback(domain: str, to: str | None, **values: Any) -> None:
    """Let an earlier version of a neuron answer again; nothing is deleted."""
    pipeline = pipeline_of(values)
    line = pipeline.line(domain)
    before = line.head if line.exists else ""
    now = pipeline.rollback(domain, to)
    click.echo(f"{domain} answered by {before} and answers by {now}")


@command(
    'conch-dna cortex record task --prompt "Plan a move." --answer "Pack." \\',
    '  --better "First sort, then pack." --problem "too short"',
    "conch-dna cortex record task --from corrections.jsonl",
)
@domain_argument
@adapters_option
@click.option("--prompt", metavar="TEXT", help="What was asked.")
@click.option("--answer", metavar="TEXT", help="What was answered.")
@click.option(
    "--better", metavar="TEXT", help="What should have been said. [default: the answer was good]"
)
@click.option("--problem", metavar="TEXT", help="What was wrong with the answer.")
@click.option(
    "--from",
    "file",
    metavar="FILE",
    help="JSONL with prompt or messages, answer, and where it was not good better and problem.",
)
@redact_option
def record(
    domain: str,
    prompt: str | None,
    answer: str | None,
    better: str | None,
    problem: str | None,
    file: str | None,
    **values: Any,
) -> None:
    """Keep answers that were good, or what should have been said, to learn from them."""
    one = {"prompt": prompt, "answer": answer, "better": better, "problem": problem}
    one = {name: value for name, value in one.items() if value is not None}
    if bool(file) == bool(one) or (one and not {"prompt", "answer"} <= set(one)):
        raise ConchError("give --prompt and --answer, or --from FILE")
    if problem is not None and better is None:
        raise ConchError("--problem goes with --better: say what should have been said")
    from conch_dna.retraining.domain import active_adapter
    from conch_dna.retraining.experience import experience_of, read_experiences

    pipeline = pipeline_of(values)
    active_adapter(pipeline.adapters_dir, domain)
    if file:
        experiences = read_experiences(Path(file), domain)
    else:
        experiences = [experience_of(json.dumps(one), domain)]
    added = pipeline.buffer.add_many(experiences)
    known = len(experiences) - added
    click.echo(
        f"{domain}: {added} recorded, {known} known already; "
        f"{pipeline.should_retrain(domain).reason}"
    )


COMMANDS = (ask, chat, serve, status, calibrate, retrain, rollback, record)
for each in COMMANDS:
    cortex.add_command(each)
