"""The commands of distillation: parse, call, print; they decide nothing.

Options of `distill` are made from the fields of KDConfig, so a new field is a new option.
To add a command: a function here, with help, an example, a line in conch_dna/cli.py and README.md.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from conch_dna.errors import ConchError, number_of
from conch_dna.metrics import BETTER
from conch_dna.options.commands import command, json_option, options_of, write_figures
from conch_dna.screen.presentation import bytes_text, pairs_table, print_tables
from conch_dna.training.cross_tokenizer.alignments import INDEX
from conch_dna.training.distillation import DOMAIN_PROMPTS
from conch_dna.training.machines.ranks.start import led_by_the_first
from conch_dna.training.settings import (
    DEFAULT_STUDENT,
    DEFAULT_TEACHER,
    TEACHER,
    KDConfig,
    KDResult,
    domain_folder,
    validate_domain,
)

if TYPE_CHECKING:
    from conch_dna.training.runs.request import Request
    from conch_dna.training.true_kd import TrueKnowledgeDistiller

# The size of a model that is still on the hub.
NOT_HERE = "not here yet"
# The groups of options that KDConfig's fields are.
OF_KD_CONFIG = {
    "Loss": "temperature",
    "The teacher, and what is read": "teacher_tokenizer",
    "The student's own answers": "on_policy",
    "Another tokenizer": "alignment",
    "What is trained": "lora_rank",
    "Steps": "learning_rate",
    "Held-out data and reports": "val_fraction",
    "Examples and the teacher's answers": "max_seq_length",
    "Memory, seed and folders": "loss_memory",
}


@command(
    "python -m conch_dna.training.true_kd --domain thinking",
    "python -m conch_dna.training.true_kd --domain stories \\",
    "  --teacher embedded:teacher --student embedded:student --prompts openings.txt",
    headings={"What to distil": "domain", "How to run": "config_file", **OF_KD_CONFIG},
)
@click.option(
    "--domain",
    metavar="NAME",
    help=f"What to distil: {', '.join(DOMAIN_PROMPTS)}; any plain name with --data or --prompts.",
)
@click.option("--all", "all_domains", is_flag=True, help="All six domains, one after the other.")
@click.option(
    "--teacher",
    metavar="MODEL",
    help="Hub id, folder, .gguf file, embedded:teacher, the URL of a server, or self for the "
    f"student, which then has to read more as a teacher. [default: {DEFAULT_TEACHER}]",
)
@click.option(
    "--student",
    metavar="MODEL",
    help=f"Hub id, folder, .gguf file, or embedded:student. [default: {DEFAULT_STUDENT}]",
)
@click.option(
    "--data",
    metavar="SOURCE",
    help="Records to train on, instead of the teacher's answers: a JSONL file, a folder with "
    "train.jsonl (and valid.jsonl, test.jsonl), a data set of the hub (OWNER/NAME or "
    "OWNER/NAME:CONFIG), or - for standard input.",
)
@click.option(
    "--valid-data",
    metavar="SOURCE",
    help="Records to hold out and choose the best step by, instead of a share of the data.",
)
@click.option(
    "--test-data",
    metavar="SOURCE",
    help="Records to measure once, at the end, with a verdict of their own.",
)
@click.option(
    "--data-split",
    metavar="SPLIT",
    help="What of a hub data set to train on, such as 'train[:1000]'. [default: train]",
)
@click.option(
    "--map",
    "mapped",
    multiple=True,
    metavar="KEY=FIELD",
    help="Which field of the records is which, such as --map prompt=question --map "
    "completion=answer. The fields of Alpaca and ShareGPT need none.",
)
@click.option(
    "--prompts",
    metavar="FILE",
    help="Prompts for the teacher to answer, one a line (or JSONL), instead of the domain's own; - "
    "for standard input.",
)
@click.option(
    "--demonstrations",
    metavar="FILE",
    help="Records that only the teacher reads, as turns before every prompt; domain takes the "
    "domain's own three, answer shows it each record's own answer.",
)
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    help="YAML with any of these options, or with those of mlx_lm.lora; the command line wins.",
)
@click.option(
    "--report-to",
    metavar="NAMES",
    help="Also send the figures to tensorboard, wandb or swanlab; several with commas.",
)
@click.option(
    "--project-name", metavar="NAME", help="Name of the project there. [default: conch_dna]"
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with a stopped run to its number of steps; with more --iters with a finished one "
    "too.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Start again over an unfinished run, or replace a finished one.",
)
@click.option(
    "--require-gain",
    is_flag=True,
    help="Exit with 1 unless every student is shown to be better than it was.",
)
@click.option(
    "--targets-only",
    is_flag=True,
    help="Make the teacher's answers and targets and no adapter, for a machine without it.",
)
@click.option("--dry-run", is_flag=True, help="Show what would run, and do nothing.")
@options_of(
    KDConfig,
    names={"num_iters": ("--num-iters", "--iters"), "learning_rate": ("--learning-rate", "--lr")},
)
@led_by_the_first
def distill(
    domain: str | None,
    all_domains: bool,
    teacher: str | None,
    student: str | None,
    data: str | None,
    valid_data: str | None,
    test_data: str | None,
    data_split: str | None,
    mapped: tuple[str, ...],
    prompts: str | None,
    demonstrations: str | None,
    config_file: str | None,
    report_to: str | None,
    project_name: str | None,
    resume: bool,
    overwrite: bool,
    require_gain: bool,
    targets_only: bool,
    dry_run: bool,
    **given: Any,
) -> None:
    """Distil a teacher's distributions into a LoRA adapter of a student."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from conch_dna.training.runs.request import requested

    named = {
        "domain": domain,
        "teacher": teacher,
        "student": student,
        "data": data,
        "valid_data": valid_data,
        "test_data": test_data,
        "data_split": data_split,
        "map": mapped or None,
        "prompts": prompts,
        "demonstrations": demonstrations,
        "report_to": report_to,
        "project_name": project_name,
    }
    request = requested(
        {name: value for name, value in named.items() if value is not None},
        {name: value for name, value in given.items() if value is not None},
        config_file=config_file,
        all_domains=all_domains,
    )
    if targets_only and (require_gain or dry_run or request.config.on_policy):
        raise ConchError(
            "--targets-only makes no adapter and scores no answers of a student: leave out "
            "--require-gain, --dry-run and --on-policy"
        )
    if resume and overwrite:
        raise ConchError("give either --resume to go on or --overwrite to start again")
    if request.domain:
        own = request.given.data is not None or request.given.prompts is not None
        validate_domain(request.domain, with_own_data=own)
    from conch_dna.training.runs.run_file import require_no_file

    for name in request.domains:
        require_no_file(domain_folder(name, request.config))
    request = request.going_on() if resume else request
    from conch_dna.training.data.sources import read_given

    for note in request.notes:
        click.echo(f"note: {note}", err=True)
    sources = {
        name: read_given(request.given_to(name), lambda note: click.echo(f"note: {note}", err=True))
        for name in request.domains
    }
    config = request.config
    if dry_run:
        _print_plan(request, sources, resume=resume, overwrite=overwrite)
        return
    from conch_dna.screen.progress import Progress
    from conch_dna.training.runs.reporters import Reporting

    with (
        Progress() as progress,
        Reporting(progress, request.reporters, request.project) as report,
    ):
        # The libraries alone take seconds to load.
        progress("loading", {"name": "loading libraries and the models' descriptions"})
        from conch_dna.training.true_kd import TrueKnowledgeDistiller

        distiller = TrueKnowledgeDistiller(*request.models, config, report=report)
        if targets_only:
            made = [
                distiller.make_targets(name, **sources[name], overwrite=overwrite)
                for name in request.domains
            ]
        elif request.domain is None:
            asked = {name: source.get("prompts") for name, source in sources.items()}
            summary = distiller.distill_all(prompts=asked, resume=resume, overwrite=overwrite)
        else:
            result = distiller.distill_domain(
                request.domain, **sources[request.domain], resume=resume, overwrite=overwrite
            )
            summary = {"results": {result.domain: result}, "failures": {}}
    if targets_only:
        for folder in made:
            click.echo(_how_to_go_on(folder))
        return
    _print_summary(distiller, summary)
    gained = all(
        judged["verdict"]["verdict"] == BETTER
        for result in summary["results"].values()
        for judged in (result.evaluation, result.evaluation.get("test", result.evaluation))
    )
    if summary["failures"] or (require_gain and not gained):
        sys.exit(1)


@command(
    "conch-dna vocab Qwen/Qwen2.5-7B-Instruct HuggingFaceTB/SmolLM2-360M-Instruct",
    "conch-dna vocab embedded:teacher embedded:student --text answers.txt",
)
@click.argument("teacher", help="Hub id, folder (a tokenizer alone will do) or embedded name.")
@click.argument("student", help="Hub id, folder (a tokenizer alone will do) or embedded name.")
@click.option(
    "--text",
    "text_file",
    metavar="FILE",
    help="UTF-8 texts, one a line: also show how much of them could be aligned.",
)
@json_option
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a tokenizer.")
def vocab(
    teacher: str,
    student: str,
    text_file: str | None,
    json_file: str | None,
    trust_remote_code: bool,
) -> None:
    """Compare the tokenizers of two models."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from dataclasses import asdict

    from conch_dna.language_model import open_tokenizer
    from conch_dna.training.cross_tokenizer.records import text_coverage
    from conch_dna.training.cross_tokenizer.vocabulary import DIFFERENT, compare_tokenizers
    from conch_dna.training.data.examples import resolve_alignment
    from conch_dna.training.data.records import read_lines
    from conch_dna.training.runs.report import comparison_table

    texts = read_lines(Path(text_file), "--text") if text_file else []
    (first, first_rows), (second, second_rows) = (
        open_tokenizer(name, trust_remote_code=trust_remote_code) for name in (teacher, student)
    )
    comparison = compare_tokenizers(
        first, second, teacher_rows=first_rows, student_rows=second_rows
    )
    resolved = resolve_alignment("auto", same=comparison.verdict != DIFFERENT)
    rows = {"--alignment auto": resolved}
    figures: dict[str, Any] = {**asdict(comparison), "auto": resolved}
    if texts:
        covered = text_coverage(texts, first, second).to_json()
        figures["coverage"] = covered
        rows["student's tokens"] = ", ".join(
            f"{covered[name]:.1%} {name.replace('_', ' ')}" for name in covered
        )
    print_tables(comparison_table(teacher, student, comparison, rows))
    write_figures(json_file, figures)


def _print_plan(
    request: "Request", sources: dict[str, dict[str, Any]], *, resume: bool, overwrite: bool
) -> None:
    from conch_dna.training.runs.run_file import outlook

    config = request.config
    how = {"resume": resume, "overwrite": overwrite}
    folders = {name: domain_folder(name, config) for name in request.domains}
    there = {
        name: outlook(folder, config.adapter_subdir, config.to_json(), **how)
        for name, folder in folders.items()
    }
    from conch_dna.language_model import ModelSource
    from conch_dna.training.fit.shown import fit_table
    from conch_dna.training.machines.ranks.leading import run_teacher
    from conch_dna.training.true_kd import plan_domain

    trust = config.trust_remote_code
    teacher = run_teacher(request.models[0], config, weights=False)
    student = ModelSource(request.models[1], trust_remote_code=trust, weights=False)
    elsewhere = "behind a URL" if teacher.is_far else NOT_HERE
    if teacher.is_weightless:
        elsewhere = "without its weights: what it has not said yet cannot be asked"
    plans = {}
    for name, folder in folders.items():
        plan = plans[name] = plan_domain(teacher, student, config, name, **sources[name])
        bound = "" if plan["counted_tokens_exact"] else "at most "
        aligned, counted = "by index, the tokenizers are the same", ""
        if plan["alignment"] != INDEX:
            aligned, counted = f"{plan['alignment']}, the tokenizers differ", " of the teacher"
        if "coverage" in plan:
            covered = 1 - plan["coverage"]["uncovered"]
            aligned += f"; {covered:.1%} of the student's tokens are covered"
        rows = {
            "teacher": f"{plan['teacher']} ({bytes_text(plan['teacher_bytes'], elsewhere)})",
            "student": f"{plan['student']} ({bytes_text(plan['student_bytes'], NOT_HERE)})",
            "data": plan["data"],
            "examples": f"{plan['examples']}, of which {plan['heldout_examples']} held out"
            + (f"; {plan['test_examples']} to test" if plan["test_examples"] else ""),
            "alignment": aligned,
            "teacher's tokens to compute": f"{bound}{plan['counted_tokens']:,}{counted}",
            "longest example": f"{bound}{plan['longest_example']} tokens",
            "training": f"{config.num_iters} steps"
            + (f", {plan['epochs']:.1f} times the data" if plan["epochs"] else ""),
            **({"its own answers": _own_answers(plan, config)} if config.on_policy else {}),
            "soft targets on disk": f"{bound}{bytes_text(plan['disk_bytes'])}",
            "logits of a chunk in memory": bytes_text(plan["logits_bytes"]),
            "output folder": str(folder),
            **({"that folder": there[name]} if there[name] else {}),
        }
        print_tables(pairs_table(f"{name}: dry run, nothing was done", rows))
        for warning in plan["warnings"]:
            click.echo(f"warning: {warning}", err=True)
    longest = max(plans, key=lambda name: plans[name]["longest_example"])
    print_tables(fit_table(longest, teacher, student, config, plans[longest]["workload"]))


def _own_answers(plan: dict[str, Any], config: KDConfig) -> str:
    own = plan["own_answers"]
    batches = config.own_batches + config.given_batches
    return (
        f"{config.own_batches} of {batches} batches: {own['answers']} answers of at most "
        f"{config.rollout_tokens} tokens to {own['prompts']} prompts, in "
        f"{number_of(own['rounds'], 'round')}; their time is not estimated"
    )


def _how_to_go_on(folder: Path) -> str:
    from conch_dna.training.data.target_files import DATA_FOLDER

    teacher, data = (shlex.quote(str(folder / name)) for name in (TEACHER, DATA_FOLDER))
    return (
        f"{folder}: take it to the other machine, into the same output folder, and go on there "
        f"with --domain {folder.name} --teacher {teacher} --data {data}, the same student and "
        "settings, and no --prompts or --demonstrations"
    )


def name_for_mlx_lm(model_id: str, folder: Path) -> str:
    """What mlx_lm knows a model by: its hub id or folder, of a GGUF file that of its conversion."""
    own = "/" in model_id and not Path(model_id).expanduser().is_file()
    return model_id if own else str(folder)


def _print_summary(distiller: "TrueKnowledgeDistiller", summary: dict[str, Any]) -> None:
    from rich.console import Console

    from conch_dna.training.runs.report import (
        advice,
        evaluation_table,
        judged_sets,
        own_answers_table,
        slice_text,
        verdict_text,
    )

    console = Console(highlight=False)
    results: dict[str, KDResult] = summary["results"]
    for name, result in results.items():
        for title, judged in judged_sets(name, result.evaluation).items():
            console.print(evaluation_table(title, judged, width=console.width))
        if (table := own_answers_table(name, result.evaluation)) is not None:
            console.print(table)
    for result in results.values():
        console.print(
            f"adapter: {result.adapter_path} (kept: step {result.metadata['best_step']} of "
            f"{distiller.config.num_iters})",
            soft_wrap=True,
            markup=False,
        )
        for extension in result.metadata["extensions"]:
            console.print(
                f"from step {extension['step']} on {extension['told']}",
                soft_wrap=True,
                markup=False,
            )
        for title, judged in judged_sets(result.domain, result.evaluation).items():
            console.print(
                f"{title}: {verdict_text(judged)}",
                style=None if judged["verdict"]["verdict"] == BETTER else "bold red",
                soft_wrap=True,
                markup=False,
            )
            if told := slice_text(judged):
                style = "bold red" if judged["slice"]["lost"] else None
                console.print(f"{title}: {told}", style=style, soft_wrap=True, markup=False)
        word = result.evaluation["verdict"]["verdict"]
        if word != BETTER:
            console.print(advice(result, distiller.config), soft_wrap=True, markup=False)
    better = [r for r in results.values() if r.evaluation["verdict"]["verdict"] == BETTER]
    if better:
        shown = name_for_mlx_lm(distiller.student_model_id, distiller.student.folder)
        path = better[0].adapter_path
        console.print(
            f"try it: mlx_lm.generate --model {shown} --adapter-path {path} --prompt …",
            soft_wrap=True,
            markup=False,
        )
    for name, reason in summary["failures"].items():
        click.echo(f"error: domain {name}: {reason}", err=True)
