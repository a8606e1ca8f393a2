"""The commands of distillation: parse, call, print; they decide nothing.

Options of `distill` are made from the fields of KDConfig, so a new field is a new option.
To add a command: a function here, with help, an example, a line in conch_dna/cli.py and README.md.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from conch_dna.command_parts import HELP, OneLineErrors, example, options_of, read_yaml
from conch_dna.errors import ConchError
from conch_dna.metrics import BETTER
from conch_dna.presentation import pairs_table, print_tables
from conch_dna.training.cross_tokenizer.alignments import INDEX
from conch_dna.training.distillation import DOMAIN_PROMPTS
from conch_dna.training.settings import (
    DEFAULT_STUDENT,
    DEFAULT_TEACHER,
    KDConfig,
    KDResult,
)

if TYPE_CHECKING:
    from conch_dna.training.true_kd import TrueKnowledgeDistiller

RUN_KEYS = ("domain", "teacher", "student", "data", "prompts")


@click.command(
    cls=OneLineErrors,
    context_settings=HELP,
    epilog=example(
        "python -m conch_dna.training.true_kd --domain thinking",
        "python -m conch_dna.training.true_kd --domain stories \\",
        "  --teacher embedded:teacher --student embedded:student --prompts openings.txt",
    ),
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
    help=f"Hub id, folder, or embedded:teacher. [default: {DEFAULT_TEACHER}]",
)
@click.option(
    "--student",
    metavar="MODEL",
    help=f"Hub id, folder, or embedded:student. [default: {DEFAULT_STUDENT}]",
)
@click.option(
    "--data",
    metavar="FILE",
    help="JSONL of messages, prompt and completion, or text, instead of the teacher's answers.",
)
@click.option(
    "--prompts",
    metavar="FILE",
    help="Prompts for the teacher to answer, one a line (or JSONL), instead of the domain's own.",
)
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    help="YAML with any of these options; the command line wins.",
)
@click.option("--resume", is_flag=True, help="Go on with a stopped run.")
@click.option("--overwrite", is_flag=True, help="Start again over an unfinished run.")
@click.option(
    "--require-gain",
    is_flag=True,
    help="Exit with 1 unless every student is shown to be better than it was.",
)
@click.option("--dry-run", is_flag=True, help="Show what would run, and do nothing.")
@options_of(
    KDConfig,
    names={"num_iters": ("--num-iters", "--iters"), "learning_rate": ("--learning-rate", "--lr")},
)
def distill(
    domain: str | None,
    all_domains: bool,
    teacher: str | None,
    student: str | None,
    data: str | None,
    prompts: str | None,
    config_file: str | None,
    resume: bool,
    overwrite: bool,
    require_gain: bool,
    dry_run: bool,
    **given: Any,
) -> None:
    """Distil a teacher's distributions into a LoRA adapter of a student."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    named = {
        name: value
        for name, value in zip(RUN_KEYS, (domain, teacher, student, data, prompts), strict=True)
        if value is not None
    }
    values = {name: value for name, value in given.items() if value is not None}
    if config_file:
        in_file = read_yaml(Path(config_file))
        run_keys = {key: in_file.pop(key) for key in RUN_KEYS if key in in_file}
        wrong = [
            f"{k} is {v!r}: it must be text" for k, v in run_keys.items() if type(v) is not str
        ]
        if wrong:
            raise ConchError(f"{config_file}: {'; '.join(wrong)}")
        named = run_keys | named
        config = KDConfig.from_json(in_file, source=config_file, overriding=values)
    else:
        config = KDConfig(**values)
    if all_domains == ("domain" in named):
        raise ConchError("give either --domain NAME or --all")
    if all_domains and ("data" in named or "prompts" in named):
        raise ConchError("--data and --prompts go with one --domain, not with --all")
    if resume and overwrite:
        raise ConchError("give either --resume to go on or --overwrite to start again")
    if "data" in named and "prompts" in named:
        raise ConchError("give either --data or --prompts: with data the teacher answers nothing")
    models = (named.get("teacher", DEFAULT_TEACHER), named.get("student", DEFAULT_STUDENT))
    source = _read_source(named)
    if dry_run:
        _print_plan(models, config, named.get("domain"), source)
        return
    from conch_dna.progress import Progress
    from conch_dna.training.settings import validate_domain

    if not all_domains:
        validate_domain(named["domain"], with_own_data=bool(source))
    with Progress() as progress:
        # The libraries alone take seconds to load.
        progress("loading", {"name": "loading libraries and the models' descriptions"})
        from conch_dna.training.true_kd import TrueKnowledgeDistiller

        distiller = TrueKnowledgeDistiller(*models, config, report=progress)
        if all_domains:
            summary = distiller.distill_all(resume=resume, overwrite=overwrite)
        else:
            result = distiller.distill_domain(
                named["domain"], **source, resume=resume, overwrite=overwrite
            )
            summary = {"results": {result.domain: result}, "failures": {}}
    _print_summary(distiller, summary)
    gained = all(r.evaluation["verdict"]["verdict"] == BETTER for r in summary["results"].values())
    if summary["failures"] or (require_gain and not gained):
        sys.exit(1)


@click.command(
    cls=OneLineErrors,
    context_settings=HELP,
    epilog=example(
        "conch-dna vocab Qwen/Qwen2.5-7B-Instruct HuggingFaceTB/SmolLM2-360M-Instruct",
        "conch-dna vocab embedded:teacher embedded:student --text answers.txt",
    ),
)
@click.argument("teacher", help="Hub id, folder (a tokenizer alone will do) or embedded name.")
@click.argument("student", help="Hub id, folder (a tokenizer alone will do) or embedded name.")
@click.option(
    "--text",
    "text_file",
    metavar="FILE",
    help="UTF-8 texts, one a line: also show how much of them could be aligned.",
)
@click.option("--json", "json_file", metavar="FILE", help="Write the figures there too.")
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
    if json_file:
        from conch_dna.checkpoints import write_json

        write_json(Path(json_file), figures)


def _read_source(named: dict[str, str]) -> dict[str, Any]:
    from conch_dna.training.data.records import read_prompts, read_records

    if "data" in named:
        return {"data": read_records(Path(named["data"]))}
    if "prompts" in named:
        return {"prompts": read_prompts(Path(named["prompts"]))}
    return {}


def _size(count: int | None) -> str:
    if count is None:
        return "not here yet"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _print_plan(
    models: tuple[str, str], config: KDConfig, domain: str | None, source: dict[str, Any]
) -> None:
    from conch_dna.language_model import ModelSource
    from conch_dna.training.fit.shown import fit_table
    from conch_dna.training.true_kd import plan_domain

    trust = config.trust_remote_code
    teacher, student = (
        ModelSource(name, trust_remote_code=trust, weights=False) for name in models
    )
    plans = {}
    for name in [domain] if domain else DOMAIN_PROMPTS:
        plan = plans[name] = plan_domain(teacher, student, config, name, **source)
        bound = "" if plan["counted_tokens_exact"] else "at most "
        aligned, counted = "by index, the tokenizers are the same", ""
        if plan["alignment"] != INDEX:
            aligned, counted = f"{plan['alignment']}, the tokenizers differ", " of the teacher"
        if "coverage" in plan:
            covered = 1 - plan["coverage"]["uncovered"]
            aligned += f"; {covered:.1%} of the student's tokens are covered"
        rows = {
            "teacher": f"{plan['teacher']} ({_size(plan['teacher_bytes'])})",
            "student": f"{plan['student']} ({_size(plan['student_bytes'])})",
            "data": plan["data"],
            "examples": f"{plan['examples']}, of which {plan['heldout_examples']} held out",
            "alignment": aligned,
            "teacher's tokens to compute": f"{bound}{plan['counted_tokens']:,}{counted}",
            "longest example": f"{bound}{plan['longest_example']} tokens",
            "training": f"{config.num_iters} steps, {plan['epochs']:.1f} times the data",
            "soft targets on disk": f"{bound}{_size(plan['disk_bytes'])}",
            "logits of a chunk in memory": _size(plan["logits_bytes"]),
            "output folder": str(Path(config.output_dir) / name),
        }
        print_tables(pairs_table(f"{name}: dry run, nothing was done", rows))
        for warning in plan["warnings"]:
            click.echo(f"warning: {warning}", err=True)
    longest = max(plans, key=lambda name: plans[name]["longest_example"])
    print_tables(fit_table(longest, teacher, student, config, plans[longest]["workload"]))


def _print_summary(distiller: "TrueKnowledgeDistiller", summary: dict[str, Any]) -> None:
    from rich.console import Console

    from conch_dna.training.runs.report import advice, evaluation_table, verdict_text

    console = Console(highlight=False)
    results: dict[str, KDResult] = summary["results"]
    for name, result in results.items():
        console.print(evaluation_table(name, result.evaluation, width=console.width))
    for result in results.values():
        console.print(
            f"adapter: {result.adapter_path} (kept: step {result.metadata['best_step']} of "
            f"{distiller.config.num_iters})",
            soft_wrap=True,
            markup=False,
        )
        word = result.evaluation["verdict"]["verdict"]
        console.print(
            f"{result.domain}: {verdict_text(result.evaluation)}",
            style=None if word == BETTER else "bold red",
            soft_wrap=True,
            markup=False,
        )
        if word != BETTER:
            console.print(advice(result, distiller.config), soft_wrap=True, markup=False)
    better = [r for r in results.values() if r.evaluation["verdict"]["verdict"] == BETTER]
    if better:
        student, path = distiller.student.folder, better[0].adapter_path
        shown = distiller.student_model_id if "/" in distiller.student_model_id else student
        console.print(
            f"try it: mlx_lm.generate --model {shown} --adapter-path {path} --prompt …",
            soft_wrap=True,
            markup=False,
        )
    for name, reason in summary["failures"].items():
        click.echo(f"error: domain {name}: {reason}", err=True)
