"""The commands that take an adapter out of the house: parse, call, print; they decide nothing.

To add a command: a function here, with help and an example, and a line in docs/leaving.md.
"""

import os
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from conch_dna.cortex.commands.shared_options import adapters_option, settings_of, trust_option
from conch_dna.exporting.settings import GGUF_KINDS, FuseSettings, MergeSettings
from conch_dna.options.commands import command, json_option, options_of, write_figures

if TYPE_CHECKING:
    from conch_dna.exporting.source import AdapterSource
    from conch_dna.screen.progress import Progress

_MODEL = click.option(
    "--model", default="", help="The model it is for. [default: what the adapter's folder says]"
)


def _opened(
    adapter: str, model: str, report: "Progress", *, trust_remote_code: bool
) -> "AdapterSource":
    from conch_dna.exporting.source import AdapterSource

    path = Path(adapter).expanduser()
    return AdapterSource.open(path, model=model, trust_remote_code=trust_remote_code, report=report)


@command(
    "conch-dna fuse models/distilled_neurons/thinking/adapters_kd models/thinking-3b --bits 4",
    headings={"Which": "model", "How": "bits", "Whether": "max_kl"},
)
@click.argument("adapter", help="Folder of an adapter.")
@click.argument("folder", help="Folder of the model that is made.")
@_MODEL
@click.option(
    "--data",
    metavar="FILE",
    help="Texts of its domain, a share of which is held out. [default: the adapter's own]",
)
@options_of(FuseSettings)
@click.option("--resume", is_flag=True, help="Go on with what was interrupted or refused.")
@click.option("--overwrite", is_flag=True, help="Replace the folder, and what was interrupted.")
@json_option
@trust_option
def fuse(
    adapter: str,
    folder: str,
    model: str,
    data: str | None,
    resume: bool,
    overwrite: bool,
    json_file: str | None,
    trust_remote_code: bool,
    **values: Any,
) -> None:
    """Make an adapter part of its model, in few bits, and keep what it learned.

    The folder is an ordinary model of mlx_lm. It is measured on held-out texts beside the adapter,
    and only if it is near enough it is there; else exit code 2.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    settings = settings_of(FuseSettings, values)
    from conch_dna.exporting.fuse import Fusing
    from conch_dna.exporting.judging import fuse_table, kept_share, part_text
    from conch_dna.screen.presentation import print_tables
    from conch_dna.screen.progress import Progress

    with Progress() as progress:
        source = _opened(adapter, model, progress, trust_remote_code=trust_remote_code)
        place = Path(folder).expanduser()
        texts = Path(data).expanduser() if data else None
        rows = Fusing(source, place, settings, data=texts, report=progress).fused(
            resume=resume, overwrite=overwrite
        )
    print_tables(fuse_table(f"{adapter} in its model", rows))
    if lost := part_text(rows[-1]):
        click.echo(lost)
    share = kept_share(rows[1], rows[-1])
    kept = "the adapter changes nothing"
    if share is not None:
        kept = f"{share:.1%} of the adapter is left" if share > 0 else "nothing of it is left"
    click.echo(f"model: {folder} ({kept})")
    write_figures(json_file, {"figures": [row.to_json() for row in rows], "kept_share": share})


@command(
    "conch-dna export models/distilled_neurons/thinking/adapters_kd thinking_peft --to peft \\",
    "  --base Qwen/Qwen2.5-3B-Instruct",
)
@click.argument("adapter", help="Folder of an adapter.")
@click.argument("output", help="What is made: a folder with peft, a file with the others.")
@click.option(
    "--to",
    "form",
    type=click.Choice(("peft", "gguf-lora", "gguf")),
    required=True,
    help="PEFT's folder, LoRA for llama.cpp, or the adapter in its model for llama.cpp.",
)
@click.option(
    "--type",
    "kind",
    type=click.Choice(GGUF_KINDS),
    default="f16",
    show_default=True,
    help="Numbers of a gguf file's matrices.",
)
@click.option("--base", default="", help="What PEFT opens the model by. [default: its own name]")
@_MODEL
@trust_option
def export(
    adapter: str,
    output: str,
    form: str,
    kind: str,
    base: str,
    model: str,
    trust_remote_code: bool,
) -> None:
    """Write an adapter as other programs open one."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from conch_dna.exporting.adapter_files import (
        export_gguf,
        export_gguf_lora,
        export_peft,
        modelfile_path,
    )
    from conch_dna.screen.progress import Progress

    place = Path(output).expanduser()
    with Progress() as progress:
        source = _opened(adapter, model, progress, trust_remote_code=trust_remote_code)
        if form == "peft":
            export_peft(source, place, name=base)
        elif form == "gguf":
            export_gguf(source, place, kind, progress)
        else:
            export_gguf_lora(source, place)
    click.echo(f"{form}: {output}")
    if form == "gguf":
        click.echo(f"for Ollama: ollama create NAME -f {quote(str(modelfile_path(place)))}")


@command(
    "conch-dna import thinking_peft models/thinking --model Qwen/Qwen2.5-3B-Instruct", name="import"
)
@click.argument("folder", help="That PEFT saved, with adapter_model.safetensors.")
@click.argument("output", help="Folder of the adapter that is made.")
@click.option("--model", required=True, help="The model that it is for, as mlx_lm opens it.")
@trust_option
def import_(folder: str, output: str, model: str, trust_remote_code: bool) -> None:
    """Write an adapter that PEFT saved as mlx_lm opens one."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from conch_dna.exporting.adapter_files import import_peft
    from conch_dna.language_model import ModelSource
    from conch_dna.screen.progress import Progress

    with Progress() as progress:
        base = ModelSource(model, trust_remote_code=trust_remote_code, report=progress)
        import_peft(Path(folder).expanduser(), Path(output).expanduser(), base)
    click.echo(f"adapter: {output}")


@command(
    "conch-dna merge thinking task debug --into one",
    headings={"Which": "into", "How": "rank"},
)
@click.argument(
    "domains",
    nargs=-1,
    required=True,
    help="Whose adapters; NAME=FOLDER is one that lies elsewhere.",
)
@click.option("--into", required=True, metavar="NAME", help="Domain of the merged adapter.")
@adapters_option
@options_of(MergeSettings)
@click.option("--resume", is_flag=True, help="Go on with what was interrupted or refused.")
@click.option("--overwrite", is_flag=True, help="Replace the adapter, and what was interrupted.")
@json_option
@trust_option
def merge(
    domains: tuple[str, ...],
    into: str,
    adapters: str,
    resume: bool,
    overwrite: bool,
    json_file: str | None,
    trust_remote_code: bool,
    **values: Any,
) -> None:
    """Make one adapter of several, each of which teaches it its own domain.

    It takes its place only if it recalls every domain about as well as that domain's own adapter;
    else exit code 2.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    settings = settings_of(MergeSettings, values)
    from conch_dna.exporting.merging import Merging, adapters_of, merge_table
    from conch_dna.retraining.domain import distillation_folder
    from conch_dna.screen.presentation import print_tables
    from conch_dna.screen.progress import Progress
    from conch_dna.training.settings import validate_domain

    validate_domain(into, with_own_data=True)
    root = Path(adapters).expanduser()
    place = distillation_folder(root, into)
    with Progress() as progress:
        sources = adapters_of(domains, root, trust_remote_code=trust_remote_code, report=progress)
        verdicts = Merging(sources, place, settings, report=progress).merged(
            resume=resume, overwrite=overwrite
        )
    print_tables(merge_table(verdicts))
    for each in verdicts.values():
        click.echo(each.reason)
    click.echo(f"adapter: {place}")
    write_figures(json_file, {name: each.figures for name, each in verdicts.items()})
