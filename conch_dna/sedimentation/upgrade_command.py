"""The command that lets a store go over to another embedding model.

Knows options, tables and the engine; decides nothing.
"""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from conch_dna.options.commands import command, json_option, write_figures
from conch_dna.screen.presentation import print_tables, text_table
from conch_dna.sedimentation.store_options import (
    judged_by,
    judgement_options,
    opened_engine,
    place_options,
    setting_options,
    settings,
    show_change,
)

if TYPE_CHECKING:
    from conch_dna.sedimentation.changes.forecast import Forecast, Outlook


@command(
    "conch-dna sediment upgrade papers --to all-MiniLM-L6-v2",
    "conch-dna sediment upgrade papers --to all-MiniLM-L6-v2 --do bridge",
)
@place_options
@click.option("--to", "to", metavar="MODEL", required=True, help="The other model.")
@click.option(
    "--do",
    "way",
    type=click.Choice(["bridge", "reembed"]),
    help="Do it, under the gate; else it is only foretold.",
)
@click.option(
    "--sample",
    type=click.IntRange(100, 100_000),
    default=500,
    show_default=True,
    help="Documents drawn at random that the other model reads.",
)
@click.option(
    "--questions",
    type=click.IntRange(20, 10_000),
    default=100,
    show_default=True,
    help="Held-out queries that are asked.",
)
@click.option(
    "--price",
    type=click.FloatRange(0, 1e6),
    default=0.0,
    show_default=True,
    help="What 1,000 documents cost at the other model, in any currency.",
)
@setting_options
@judgement_options
@json_option
def upgrade(json_file: str | None, to: str, way: str | None, **options: Any) -> None:
    """Tell what another embedding model would be worth, before all documents are embedded.

    Queries go to the other model then. --do bridge brings the documents' vectors to it by a map,
    --do reembed embeds them all; the version before stays for rollback. Exit code 1 says that the
    gate refused.
    """
    from conch_dna.screen.progress import Progress

    sample, judged = options["sample"], judged_by(options)
    options |= {"model": None, "teachers": (to,), "teacher_shares": ()}
    config = settings(options, training_mode="offline")
    with Progress() as progress:
        progress("loading", {"name": "the store and its models"})
        with opened_engine(config, options) as engine:
            engine.report = progress
            if judged:
                engine.set_judgements(*judged)
            if way is None:
                found = engine.forecast_upgrade(sample, options["questions"], options["price"])
            else:
                result = engine.run_upgrade(way, sample)
    if way is None:
        show_forecast(found)
        write_figures(json_file, asdict(found))
        return
    show_change(result)
    write_figures(json_file, asdict(result))
    if not result.activated:
        sys.exit(1)


def show_forecast(found: "Forecast") -> None:
    """Print the three ways, and from how much they were told."""
    seconds, price = found.per_thousand
    columns = ["", "nDCG@10", "agreement", "to embed", "takes", *(["costs"] if price else [])]
    rows = [
        (
            way.name,
            _interval(way.ndcg),
            _interval(way.agreement),
            f"{way.documents:,}",
            f"{way.seconds:,.0f} s",
            *([f"{way.price:,.2f}"] if price else []),
        )
        for way in found.ways
    ]
    never_broken = [each for each in columns if each not in ("nDCG@10", "agreement")]
    print_tables(text_table(f"to {found.model}", columns, rows, numbers=never_broken))
    kind = "judged queries" if found.judged else "titles and sentences of documents as queries"
    click.echo(
        f"{found.queries:,} {kind}; agreement is with what the other model finds among all; "
        "95% intervals over queries. The other model read "
        f"{found.read:,} of {found.documents:,} documents. 1,000 documents: {seconds:,.1f} s here"
        + (f", {price:,.2f}" if price else "")
    )


def _interval(outlook: "Outlook") -> str:
    return f"{outlook.mean:.3f} [{outlook.low:.3f}, {outlook.high:.3f}]"
