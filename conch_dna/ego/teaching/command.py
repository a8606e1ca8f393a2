"""The commands of teachers for other machines: parse, call, print; they decide nothing.

To add a command: a function here, with help and an example, and a line in docs/machines.md.
"""

from typing import Any

import click

from conch_dna.ego.teaching.settings import TeacherSettings
from conch_dna.options.commands import HELP, OneLineGroup, command, example, options_of
from conch_dna.training.settings import DEFAULT_TEACHER


@click.group(cls=OneLineGroup, context_settings=HELP, epilog=example("conch-dna teach serve MODEL"))
def teach() -> None:
    """Let a model on this machine teach students on others."""


@command(
    f"conch-dna teach serve {DEFAULT_TEACHER}",
    f"conch-dna teach serve {DEFAULT_TEACHER} --host 0.0.0.0 --api-key-env CONCH_DNA_KEY",
)
@click.argument("model", help="The teacher: a hub id, a folder or an embedded name.")
@click.option("--name", default="", help="What the API calls it. [default: its own name]")
@options_of(TeacherSettings)
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with it.")
def serve(model: str, name: str, trust_remote_code: bool, **values: Any) -> None:
    """Serve a teacher's targets and answers to distill --teacher http://… on other machines.

    OpenAI's completions, with `echo` and `logprobs`, and vLLM's `prompt_logprobs` for a given text.
    """
    from conch_dna.ego.teaching.server import TeacherServer
    from conch_dna.ego.teaching.server import serve as run
    from conch_dna.language_model import ModelSource

    given = {key: value for key, value in values.items() if value is not None}
    settings = TeacherSettings(**given)
    source = ModelSource(model, trust_remote_code=trust_remote_code)
    run(TeacherServer(source, settings, name=name))


teach.add_command(serve)
