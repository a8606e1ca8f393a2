"""The commands of stores that learn: documents in, answers out, changes judged by a gate.

Parses, calls, prints; decides nothing. To add a command: a function here under `sediment`, with
help, an example, and a line in docs/sedimentation.md.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from conch_dna.errors import ConchError
from conch_dna.options.commands import (
    HELP,
    OneLineGroup,
    command,
    example,
    json_option,
    options_of,
    passed_on,
    write_figures,
)
from conch_dna.screen.presentation import print_tables
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.documents import (
    FORMATS,
    count_lines,
    embedded_text,
    read_document_files,
)
from conch_dna.sedimentation.results import (
    delete_table,
    history_table,
    hits_table,
    ingest_table,
    status_table,
    verify_table,
)
from conch_dna.sedimentation.store_options import (
    judged_by,
    judgement_options,
    model_options,
    opened_engine,
    opened_without_models,
    place_of,
    place_options,
    settings,
    show_change,
    where_of,
)
from conch_dna.sedimentation.upgrade_command import upgrade

# The groups of options that all commands which open models have.
OF_STORE = {"Store": "collection", "Models": "model"}
ERRORS_SHOWN = 5
REPORT_EVERY = 100
REPORT_S = 1.0
LOADING = "loading the models and the store"
# Fields of ChelationConfig that are options of a learning command.
OF_CYCLE = ("threshold", "learning_rate", "epochs")
OF_DISTILLATION = (
    "batch_size",
    "offline_learning_rate",
    "offline_epochs",
    "adapter",
    "train_student",
    "table_strength",
)
OFFLINE_NAMES = {"offline_learning_rate": ("--learning-rate",), "offline_epochs": ("--epochs",)}


@click.group(
    cls=OneLineGroup,
    context_settings=HELP,
    epilog=example(
        "conch-dna sediment ingest papers corpus.jsonl",
        'conch-dna sediment query papers "how do cells divide"',
    ),
)
def sediment() -> None:
    """Keep documents in an embedding store that learns, each change judged by a gate.

    Guaranteed, at the gate's confidence for each change: it answers held-out queries at most
    gate_margin (0.005 nDCG@10) worse than raw vectors, however many changes there were, and than
    the version before. Each change is asked queries that judged none before; where there are no
    more, a warning says so. Not guaranteed: single queries, other kinds of queries, documents that
    join later; that of many worse changes none passes; and judged queries (--judgements) come
    again for every change.
    """


@command(
    "conch-dna sediment ingest papers corpus.jsonl",
    "conch-dna sediment ingest papers notes.txt --model models/student",
    headings={**OF_STORE, "Documents": "batch_size"},
)
@place_options
@click.argument(
    "files",
    nargs=-1,
    required=True,
    metavar="FILES...",
    help="JSONL (text, and id or _id, title, payload), an array of them in a .json file, or "
    "texts one a line; - is standard input.",
)
@model_options
@options_of(ChelationConfig, only=("batch_size",))
@click.option(
    "--format",
    "form",
    metavar=f"[{'|'.join(FORMATS)}]",
    default=FORMATS[0],
    show_default=True,
    help="Format of the files; auto: JSONL where a file is named so or begins with a brace.",
)
@click.option("--replace", is_flag=True, help="A known id with another text replaces the old one.")
@json_option
def ingest(
    files: tuple[str, ...],
    form: str,
    replace: bool,
    json_file: str | None,
    **options: Any,
) -> None:
    """Take documents in; the same command goes on with what was stopped.

    Exit code 1 says that some documents could not be embedded.
    """
    config = settings(options)
    from conch_dna.screen.progress import Progress

    # Before a store is made: a mistake here shall leave none.
    total, documents = count_lines(files), read_document_files(files, form=form)
    with Progress() as progress:
        progress("loading", {"name": LOADING})
        with opened_engine(config, options, new=True) as engine:
            progress("phase", {"name": "documents", "total": total, "unit": "documents"})
            result = engine.ingest(_counted(documents, progress), replace_changed=replace)
    print_tables(ingest_table(result))
    write_figures(json_file, asdict(result))
    for name, reason in list(result.errors.items())[:ERRORS_SHOWN]:
        click.echo(f"not embedded: {name}: {reason}", err=True)
    if len(result.errors) > ERRORS_SHOWN:
        more = len(result.errors) - ERRORS_SHOWN
        click.echo(f"not embedded: {more} more, which --json FILE names", err=True)
    if result.errors:
        sys.exit(1)


def _counted(documents: Iterator[Any], report: Callable[[str, dict[str, Any]], None]) -> Any:
    """The same documents, told to the report a part at a time: bars are slower than stores."""
    waiting, told = 0, time.monotonic()
    for document in documents:
        yield document
        waiting += 1
        if waiting == REPORT_EVERY or time.monotonic() - told >= REPORT_S:
            report("advance", {"by": waiting})
            waiting, told = 0, time.monotonic()
    report("advance", {"by": waiting})


@command(
    'conch-dna sediment query papers "how do cells divide" --top-k 5',
    'conch-dna sediment query papers "how do cells divide" --fusion rrf --where year=1999',
    headings={**OF_STORE, "Answers": "fusion"},
)
@place_options
@click.argument(
    "queries", nargs=-1, required=True, metavar="QUERIES...", help="Each an argument of its own."
)
@model_options
@options_of(ChelationConfig, only=("top_k", "fusion", "fusion_share"))
@click.option(
    "--where",
    "conditions",
    multiple=True,
    metavar="FIELD=VALUE",
    help="What a payload must have; repeatable, and of one field any value will do. Numbers, true "
    "and false are taken as such, '\"1999\"' as text.",
)
@json_option
def query(
    queries: tuple[str, ...],
    conditions: tuple[str, ...],
    json_file: str | None,
    top_k: int | None,
    **options: Any,
) -> None:
    """Show the documents nearest to queries; a collapsed neighbourhood is logged."""
    config = settings(options)
    where = where_of(conditions)
    with opened_engine(config, options) as engine:
        if not engine.store.count():
            raise ConchError(
                f"the store {options['store']} holds no documents: take some in with "
                "`conch-dna sediment ingest`"
            )
        results = engine.run_inferences(list(queries), top_k, where=where)
        if where and not any(hits.ids for hits in results):
            _refuse_unknown(*engine.store.fields_missing(where))
    answers = list(zip(queries, results, strict=True))
    print_tables(*(hits_table(text, hits) for text, hits in answers))
    write_figures(json_file, [{"query": text, **asdict(hits)} for text, hits in answers])


def _refuse_unknown(missing: list[str], known: list[str]) -> None:
    """A filter that finds nothing since nobody has its field is a slip, not an answer."""
    if missing:
        raise ConchError(
            f"no document has a field {' or '.join(missing)}: correct --where; fields of the first "
            f"documents: {', '.join(known) or 'none'}"
        )


@command(
    "conch-dna sediment cycle papers",
    "conch-dna sediment cycle papers --mode hybrid --teacher all-MiniLM-L6-v2 --threshold 2",
    headings={
        "Store": "collection",
        "Models": "model",
        "Learning": "threshold",
        "Gate": "judgements",
    },
)
@place_options
@model_options
@options_of(ChelationConfig, only=OF_CYCLE)
@judgement_options
@json_option
def cycle(json_file: str | None, **options: Any) -> None:
    """Learn from the documents that collapsed neighbourhoods were logged with.

    Exit code 1 says that the gate refused the change.
    """
    _change("cycle", settings(options), json_file, options)


@command(
    "conch-dna sediment distill papers --teacher all-MiniLM-L6-v2",
    "conch-dna sediment distill papers --teacher all-MiniLM-L6-v2 --space asymmetric",
    "conch-dna sediment distill papers --teacher all-MiniLM-L6-v2 --train-student",
    headings={
        "Store": "collection",
        "Models": "model",
        "Learning": "batch_size",
        "Gate": "judgements",
    },
)
@place_options
@model_options
@options_of(ChelationConfig, only=OF_DISTILLATION, names=OFFLINE_NAMES)
@judgement_options
@json_option
def distill(json_file: str | None, **options: Any) -> None:
    """Learn from a teacher's vectors of all documents; the mode is offline unless named.

    With --train-student the teacher's weight is 1 unless named. Exit code 1 says that the gate
    refused the change.
    """
    config = settings(options, training_mode="offline")
    if config.train_student:
        config = settings(options, training_mode="offline", teacher_weight=1.0)
    _change("distillation", config, json_file, options)


def _change(
    kind: str, config: ChelationConfig, json_file: str | None, options: dict[str, Any]
) -> None:
    """Run a change, print the gate's verdict, and end with 1 if it refused."""
    from conch_dna.screen.progress import Progress

    # Before the models: a mistake here shall not cost their loading.
    judged = judged_by(options)
    with Progress() as progress:
        progress("loading", {"name": LOADING})
        with opened_engine(config, options) as engine:
            engine.report = progress
            if judged:
                engine.set_judgements(*judged)
            progress("phase", {"name": f"{kind} of {engine.store.count():,} documents"})
            if kind == "cycle":
                result = engine.run_sedimentation_cycle()
            else:
                result = engine.run_offline_distillation()
    show_change(result)
    write_figures(json_file, asdict(result))
    if result.candidate and not result.activated:
        sys.exit(1)


@command("conch-dna sediment status papers")
@place_options
@json_option
def status(json_file: str | None, **options: Any) -> None:
    """Show a store's documents, versions, log and gate history; loads no model."""
    with opened_without_models(options) as opened:
        document = opened.to_json()
    print_tables(status_table(document))
    if document["gate_history"]:
        print_tables(history_table(document["gate_history"]))
    else:
        click.echo("the gate has judged nothing yet")
    write_figures(json_file, document)


@command("conch-dna sediment rollback papers")
@place_options
def rollback(**options: Any) -> None:
    """Let the version before the active one answer again; loads no model."""
    with opened_without_models(options) as opened:
        before = opened.versions.active
        after = opened.versions.rollback()
    click.echo(f"active was {before} and is {after}")


@command("conch-dna sediment delete papers doc-17 doc-18")
@place_options
@click.argument(
    "ids",
    nargs=-1,
    required=True,
    metavar="IDS...",
    help="As given at ingest; a number means the number where no text is so called.",
)
@json_option
def delete(ids: tuple[str, ...], json_file: str | None, **options: Any) -> None:
    """Forget documents in every version and in the log; loads no model.

    With an id that is not there nothing is deleted.
    """
    from conch_dna.sedimentation.upkeep import deletion

    with opened_without_models(options) as opened:
        result = deletion.delete(opened.store, opened.log, deletion.named(opened.store, ids))
    print_tables(delete_table(result))
    write_figures(json_file, asdict(result))


@command("conch-dna sediment verify papers")
@place_options
@json_option
def verify(json_file: str | None, **options: Any) -> None:
    """Compare everything that a store keeps with its digest; loads no model.

    Exit code 1 says that something is not whole; the table names it.
    """
    from conch_dna.sedimentation.upkeep.verification import verified

    parts = verified(place_of(options))
    print_tables(verify_table(options["location"], parts))
    whole = all(each.whole for each in parts)
    document = {"location": options["location"], "whole": whole}
    write_figures(json_file, {**document, "parts": [asdict(each) for each in parts]})
    for each in parts:
        if not each.whole:
            click.echo(f"not whole: {each.name}: {each.detail}", err=True)
    if not whole:
        sys.exit(1)


@command("conch-dna sediment export papers models/papers")
@place_options
@click.argument("folder", help="Where to; it must not exist.")
@click.option("--version", metavar="NAME", help="Default: the active one.")
@click.option("--device", metavar="NAME", help="cpu, cuda or mps; else chosen.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the student.")
def export(folder: str, version: str | None, **options: Any) -> None:
    """Write student and adapter as one sentence-transformers model."""
    from conch_dna.sedimentation.adapters.export import export_sentence_transformer
    from conch_dna.sedimentation.changes.versions import OF_TEACHER
    from conch_dna.sedimentation.embedders.local import LocalEmbedder
    from conch_dna.sedimentation.stores.contract import RAW

    options |= {"model": None, "teachers": (), "teacher_shares": ()}
    with opened_engine(ChelationConfig(), options) as engine:
        name = version or engine.versions.active
        names = [RAW, *engine.store.versions()]
        if name not in names:
            raise ConchError(f"the store has no version {name}: it has {', '.join(names)}")
        engine.store.check(name)
        student = engine.versions.student(name)
        if not isinstance(student, LocalEmbedder):
            raise ConchError(
                f"the student {student.name} is no model of this machine: only those of "
                "sentence-transformers and model2vec can be exported"
            )
        adapter = engine.versions.query_adapter(name)
        origin = engine.versions.origin(name)
        export_sentence_transformer(student.model, adapter, Path(folder).expanduser())
    click.echo(f"{name} is a sentence-transformers model in {folder}")
    if origin["documents"] == OF_TEACHER:
        click.echo(f"it embeds queries; the documents' vectors are those of {origin['teacher']}")


@command("conch-dna sediment snapshot papers backups/papers-1")
@place_options
@click.argument("copy", help="The folder to make; it is a store again.")
@json_option
def snapshot(json_file: str | None, copy: str, **options: Any) -> None:
    """Copy a store whole, while nobody writes; loads no model.

    The copy is verified before it stands. To go back to it, use it, or copy it to where it was.
    """
    from conch_dna.sedimentation.upkeep.snapshot import snapshot as take

    size = take(place_of(options), Path(copy))
    click.echo(f"{copy}: {size:,} bytes, verified")
    write_figures(json_file, {"folder": copy, "bytes": size})


@command(
    "conch-dna sediment make-student all-MiniLM-L6-v2 models/student",
    "conch-dna sediment make-student all-MiniLM-L6-v2 models/student \\",
    "  --vocabulary-from corpus.jsonl",
    name="make-student",
)
@click.argument("teacher", help="Hub id or folder of a sentence-transformers model.")
@click.argument("folder", help="Where to; a folder that stands there is replaced.")
@click.option(
    "--dimension", default=256, show_default=True, help="Dimensions of the student's vectors."
)
@click.option(
    "--vocabulary-from",
    "vocabulary_files",
    multiple=True,
    metavar="FILE",
    help="Texts or JSONL whose frequent words get a vector of their own; repeatable.",
)
@click.option("--least-count", default=2, show_default=True, help="How often such a word occurs.")
@click.option(
    "--most-words",
    default=20_000,
    show_default=True,
    help="Most words that the student's vocabulary has.",
)
@click.option("--device", metavar="NAME", help="cpu or cuda; else chosen.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the teacher.")
@json_option
def make_student_command(
    teacher: str,
    folder: str,
    vocabulary_files: tuple[str, ...],
    json_file: str | None,
    **options: Any,
) -> None:
    """Make a small, fast student from a teacher: a vector for each of its tokens."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from conch_dna.screen.progress import Progress
    from conch_dna.sedimentation.embedders.make_student import make_student

    texts = (
        row if isinstance(row, str) else embedded_text(row)
        for row in read_document_files(vocabulary_files)
    )
    with Progress() as progress:
        progress("loading", {"name": f"reading the vectors of words by {teacher}"})
        student = make_student(teacher, folder, vocabulary_from=texts, **options)
    added = f"{student.words_added:,} of {student.words_found:,} words added, "
    click.echo(
        f"{student.folder}: {student.tokens:,} tokens in {student.dimension} dimensions from "
        f"{student.teacher}, {added if vocabulary_files else ''}{student.seconds:.1f} s"
    )
    write_figures(json_file, {**asdict(student), "folder": str(student.folder)})


@passed_on(
    sediment,
    "conch_dna.sedimentation.benchmark_distillation",
    "conch-dna sediment benchmark --task scifact --model models/student \\",
    "  --teacher all-MiniLM-L6-v2",
)
def benchmark(arguments: tuple[str, ...]) -> None:
    """Measure students, modes and teacher on judged queries; --help shows its options."""
    from conch_dna.sedimentation.benchmark_distillation import main

    main.main(list(arguments), prog_name="conch-dna sediment benchmark", standalone_mode=False)


_CHANGES = (ingest, query, cycle, distill, upgrade, rollback, delete)
for each in (*_CHANGES, status, verify, snapshot, export, make_student_command):
    sediment.add_command(each)
