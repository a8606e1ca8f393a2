"""TRUE knowledge distillation in five short functions, offline, each in about a minute on a CPU.

Runs on the embedded pair. Run one by its name: python examples/true_kd.py one_domain
For models of your own: replace TEACHER and STUDENT by hub ids or folders, and give more steps.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import click

from conch_dna.language_model import ASSETS
from conch_dna.screen.presentation import print_tables
from conch_dna.screen.progress import Progress
from conch_dna.training.runs.report import evaluation_table, verdict_text
from conch_dna.training.settings import KDConfig, KDResult
from conch_dna.training.sweeps.grid import grid_runs
from conch_dna.training.sweeps.report import choice_text, sweep_table
from conch_dna.training.sweeps.sweep import Sweep
from conch_dna.training.true_kd import TrueKnowledgeDistiller

TEACHER, STUDENT = "embedded:teacher", "embedded:student"
# So small a student learns most where its embedding is trained too, by a high learning rate.
SETTINGS: dict[str, Any] = {
    "num_iters": 60,
    "learning_rate": 5e-3,
    "warmup_iters": 4,
    "batch_size": 8,
    "temperature": 1.0,
    "alpha": 1.0,
    "lora_keys": "all,model.embed_tokens",
    "lora_scale": 4.0,
    "max_tokens": 64,
    "samples_per_prompt": 4,
    "val_fraction": 0.2,
    "steps_per_eval": 20,
    "steps_per_save": 20,
}
FRIENDS = ("cat", "dog", "frog", "bear", "duck", "pig", "mouse", "hen", "fox", "bird")


def one_domain(folder: Path) -> KDResult:
    """The teacher answers prompts, and the student learns from its distributions."""
    openings = (ASSETS / "story_openings.txt").read_text().splitlines()
    config = KDConfig(**SETTINGS, output_dir=str(folder))
    with Progress() as progress:
        distiller = TrueKnowledgeDistiller(TEACHER, STUDENT, config, report=progress)
        records = distiller.generate_training_data(openings, "stories")
        result = distiller.train_with_kd(records, "stories")
    width = shutil.get_terminal_size().columns
    print_tables(evaluation_table("stories", result.evaluation, width=width))
    click.echo(f"stories: {verdict_text(result.evaluation)}")
    return result


def all_domains(folder: Path) -> None:
    """Each of the six domains gets an adapter; the teacher works for all of them first."""
    quick = {"num_iters": 6, "max_tokens": 16, "samples_per_prompt": 1, "batch_size": 4}
    config = KDConfig(**{**SETTINGS, **quick}, output_dir=str(folder))
    with Progress() as progress:
        distiller = TrueKnowledgeDistiller(TEACHER, STUDENT, config, report=progress)
        summary = distiller.distill_all()
    for name, result in summary["results"].items():
        click.echo(f"{name}: {verdict_text(result.evaluation)}")
    for name, reason in summary["failures"].items():
        click.echo(f"{name}: failed, {reason}")
    click.echo(f"summary: {folder / 'kd_summary.json'}")


def own_prompts(folder: Path) -> None:
    """A domain of your own: its name, and what the teacher is asked in it."""
    prompts = [f"{name} saw a little {friend}." for name in ("Tom", "Lily") for friend in FRIENDS]
    config = KDConfig(**SETTINGS, output_dir=str(folder))
    with Progress() as progress:
        distiller = TrueKnowledgeDistiller(TEACHER, STUDENT, config, report=progress)
        result = distiller.distill_domain("friends", prompts=prompts)
    click.echo(f"friends: {verdict_text(result.evaluation)}")
    click.echo((Path(result.adapter_path) / "samples.md").read_text())


def comparison(folder: Path) -> None:
    """Temperatures and alphas beside each other: one cache, a table, the choice on test data."""
    openings = (ASSETS / "story_openings.txt").read_text().splitlines()
    compared = {"temperature": (1.0, 2.0), "alpha": (0.5, 1.0)}
    quick = {"num_iters": 20, "samples_per_prompt": 1, "learning_rate": 5e-4}
    values = {**SETTINGS, **quick, **compared, "output_dir": str(folder)}
    shared, runs = grid_runs("stories", values, most=4)
    with Progress() as progress:
        distiller = TrueKnowledgeDistiller(TEACHER, STUDENT, shared, report=progress)
        test = distiller.generate_training_data([f"The {name} ran" for name in FRIENDS], "test")
        sweep = Sweep(
            distiller.teacher, distiller.student, shared, runs, "stories", report=progress
        )
        document = sweep.run(prompts=openings, test_data=test)
    print_tables(sweep_table(document))
    click.echo("\n".join(choice_text(document)))


def adapter(folder: Path) -> None:
    """An adapter loaded with mlx-lm, looked at, and used."""
    import mlx_lm

    from conch_dna.checkpoints import read_folder

    path = Path(one_domain(folder).adapter_path)
    arrays, documents = read_folder(path)
    click.echo(f"{path} is whole: {', '.join(sorted(documents))}")
    for name, value in sorted(arrays["adapters.safetensors"].items())[:4]:
        click.echo(f"  {name} {tuple(value.shape)}")
    model, tokenizer = mlx_lm.load(str(ASSETS / "student"), adapter_path=str(path))
    click.echo(mlx_lm.generate(model, tokenizer, "Once upon a time", max_tokens=40))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """TRUE knowledge distillation on the embedded pair, offline."""


for example in (one_domain, all_domains, own_prompts, comparison, adapter):

    @main.command(example.__name__, help=example.__doc__)
    @click.option("--folder", type=Path, help="Where everything stays. [default: nowhere]")
    def _run(folder: Path | None, example: Any = example) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            example(folder or Path(temporary))


if __name__ == "__main__":
    main()
