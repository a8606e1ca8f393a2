"""The command line: what it prints, what it refuses in one line, and its exit codes.

Most commands run in this process, since importing what they need takes seconds; a few run as a
user would run them. To add a refusal: a line in REFUSED or a test in TestRefusedLater.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result

from conch_dna.checkpoints import FolderLock
from conch_dna.cli import main
from conch_dna.errors import ConchError
from conch_dna.language_model import ModelSource
from conch_dna.loading.blas import blas_state
from conch_dna.options.fields import kind_of
from conch_dna.training.cli import _print_summary, distill
from conch_dna.training.distillation import DOMAIN_PROMPTS
from conch_dna.training.settings import KDConfig, KDResult
from conch_dna.training.true_kd import TrueKnowledgeDistiller
from models import ANIMALS, QUICK, stored_rows

MODULES = ("conch_dna.training.true_kd", "conch_dna distill")
PROMPTS = [f"Once upon a time there was a little {animal} who" for animal in ANIMALS]


class Pair(NamedTuple):
    """Options that name two tiny models and a prompt file."""

    teacher: Path
    student: Path
    prompts: Path

    def options(self, output: Path, **changes: Any) -> list[str]:
        """A whole command for the domain `s`; None leaves an option out."""
        values = {
            "domain": "s",
            "teacher": self.teacher,
            "student": self.student,
            "prompts": self.prompts,
            "output_dir": output,
            **QUICK,
            **changes,
        }
        given = {name: value for name, value in values.items() if value is not None}
        return [part for name, value in given.items() for part in (option(name), str(value))]


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def run(*arguments: str) -> Result:
    """Run `distill` in this process."""
    return CliRunner().invoke(distill, list(arguments))


def finish(*arguments: str) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: str) -> str:
    """The one line that is all that a command prints."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    # A busy machine may have taken longer to load than is borne in silence.
    (line,) = (one for one in result.stderr.splitlines() if "still at work after" not in one)
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def stopped(*arguments: str) -> str:
    """The one line with which a command ends that had already begun to work."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    *progress, last = result.stderr.splitlines()
    assert last.startswith("error: ")
    assert not any(line.startswith(("error", "Traceback")) for line in progress)
    return last.removeprefix("error: ")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python as a user does, who lets it keep its compiled modules."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=inherited | {"HF_HUB_OFFLINE": "1"} | environment,
        timeout=300,
    )


def adapter_in(output: Path) -> bytes:
    return (output / "s" / "adapters_kd" / "adapters.safetensors").read_bytes()


@pytest.fixture(scope="module")
def pair(tiny_teacher: Path, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    return Pair(tiny_teacher, tiny_student, prompts)


@pytest.fixture(scope="module")
def clean(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a finished command; nobody may change it."""
    output = tmp_path_factory.mktemp("clean")
    finish(*pair.options(output))
    result = json.loads((output / "s" / "adapters_kd" / "kd_result.json").read_text())
    assert result["metadata"]["best_step"] > 0
    return output


@pytest.fixture
def copy(clean: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(clean, tmp_path / "copy"))


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# Options, and what the one line says: the value and the remedy.
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown domain": (
        {"domain": "cooking", "prompts": None},
        ["'cooking' is unknown", *DOMAIN_PROMPTS, "its --data or --prompts"],
    ),
    "path as a name": (
        {"domain": "../s"},
        ["'../s' becomes a folder's name", "a to z, A to Z"],
    ),
    "folder in a name": ({"domain": "a/b"}, ["'a/b' becomes a folder's name"]),
    "no domain": ({"domain": None}, ["give either --domain NAME or --all"]),
    "missing folder": (
        {"teacher": "./nowhere"},
        ["model folder ./nowhere does not exist", "embedded:teacher"],
    ),
    "missing absolute folder": (
        {"student": "/no/where"},
        ["model folder /no/where does not exist"],
    ),
    "bare name": ({"student": "qwen"}, ["model folder qwen does not exist", "organisation/name"]),
    "unknown embedded model": (
        {"teacher": "embedded:giant"},
        ["no embedded model 'giant'", "embedded:student, embedded:teacher"],
    ),
    "hub unreachable": (
        {"teacher": "nobody/nothing"},
        [
            "hub could not be reached for nobody/nothing (no folder is called so)",
            "embedded:teacher and embedded:student",
        ],
    ),
    "temperature too low": (
        {"temperature": 0.4},
        ["temperature is 0.4: it must be between 0.5 and 10"],
    ),
    "temperature too high": ({"temperature": 10.5}, ["temperature is 10.5", "between 0.5 and 10"]),
    "temperature no number": ({"temperature": "nan"}, ["temperature is nan", "between 0.5 and 10"]),
    "alpha too low": ({"alpha": -0.1}, ["alpha is -0.1: it must be between 0 and 1"]),
    "alpha too high": ({"alpha": 1.5}, ["alpha is 1.5: it must be between 0 and 1"]),
    "both at once": ({"alpha": 2, "temperature": 0}, ["temperature is 0.0", "; alpha is 2.0"]),
    "missing prompts": ({"prompts": "nowhere.txt"}, ["cannot read --prompts nowhere.txt"]),
    "missing data": (
        {"prompts": None, "data": "nowhere.jsonl"},
        ["cannot read --data nowhere.jsonl"],
    ),
    **{
        f"empty {name}": ({name: ""}, [f"--{name.replace('_', '-')}: an empty name"])
        for name in ("domain", "teacher", "student", "prompts", "valid_data", "config")
    },
    "a teacher that is a file": (
        {"teacher": __file__},
        ["test_cli.py is a file, not a model folder: give the folder that holds config.json"],
    ),
    "missing settings": ({"config": "nowhere.yaml"}, ["cannot read --config nowhere.yaml"]),
    "several equal answers": (
        {"samples_per_prompt": 2, "sampling_temperature": 0},
        ["samples_per_prompt is 2", "raise the temperature"],
    ),
    "adapter folder elsewhere": (
        {"adapter_subdir": "../elsewhere"},
        ["adapter_subdir is '../elsewhere'", "one plain folder name"],
    ),
}


class TestRefused:
    @pytest.mark.parametrize(("changes", "expected"), REFUSED.values(), ids=REFUSED.keys())
    def test_in_one_line_that_names_value_and_remedy(self, changes, expected, pair, tmp_path):
        message = refused(*pair.options(tmp_path / "out", **changes))
        for part in expected:
            assert part in message
        assert not (tmp_path / "out").exists()

    def test_data_and_prompts(self, pair, tmp_path):
        data = written(tmp_path / "data.jsonl", '{"text": "a b"}')
        message = refused(*pair.options(tmp_path / "out", data=data))
        assert message.startswith("give either --data or --prompts")

    @pytest.mark.parametrize("source", ["data", "prompts"])
    def test_one_source_for_all_domains(self, source, pair, tmp_path):
        given = {"domain": None, "prompts": None, source: pair.prompts}
        message = refused("--all", *pair.options(tmp_path / "out", **given))
        assert message == f"--{source} cannot go with --all, only with one --domain"

    def test_one_domain_and_all_of_them(self, pair, tmp_path):
        message = refused("--all", *pair.options(tmp_path / "out"))
        assert message == "give either --domain NAME or --all"

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", "data.jsonl is empty: give one JSON object a line"),
            ("\n \n", "data.jsonl is empty"),
            ('{"text": "a"}\n\n{"text": "b"\n', "data.jsonl, line 3: not JSON ("),
            ('{"text": "a"}\n["b"]\n', "data.jsonl, line 2: a record is a JSON object with"),
            ('{"text": "a"}\n{"prompt": "b"}', "data.jsonl, line 2: a record needs messages"),
            ('{"text": 1}', "data.jsonl, line 1: text is not text"),
            ('{"prompt": "a", "completion": ""}', "data.jsonl, line 1: completion is empty"),
            (
                '{"messages": [{"role": "user", "content": "a"}]}',
                "line 1: messages has no assistant",
            ),
        ],
    )
    def test_empty_or_broken_data(self, text, expected, pair, tmp_path):
        data = written(tmp_path / "data.jsonl", text)
        message = refused(*pair.options(tmp_path / "out", prompts=None, data=data))
        assert expected in message

    def test_an_empty_prompt_file(self, pair, tmp_path):
        prompts = written(tmp_path / "prompts.txt", "\n")
        message = refused(*pair.options(tmp_path / "out", prompts=prompts))
        assert message.endswith("prompts.txt is empty: give one prompt a line")

    def test_a_broken_prompt_line(self, pair, tmp_path):
        prompts = written(tmp_path / "prompts.jsonl", '"a"\n{"text": "b"}')
        message = refused(*pair.options(tmp_path / "out", prompts=prompts))
        assert "prompts.jsonl, line 2: no prompt" in message

    def test_a_folder_that_holds_no_model(self, pair, tmp_path):
        (tmp_path / "empty").mkdir()
        message = refused(*pair.options(tmp_path / "out", student=tmp_path / "empty"))
        assert message.endswith("empty has no config.json: it is not a model folder")

    def test_tokenizers_that_hardly_meet(self, shared_data, pair, tmp_path):
        """A character model without bytes cannot spell a text that is not English."""
        teacher, student = (shared_data / "models" / n for n in ("babyllama105", "stories260K"))
        text = "日本語のテキストです。" * 3
        lines = "".join(json.dumps({"text": f"{n} {text}"}) + "\n" for n in range(6))
        data = written(tmp_path / "data.jsonl", lines)
        message = refused(
            *pair.options(
                tmp_path / "out", teacher=teacher, student=student, prompts=None, data=data
            )
        )
        assert re.search(r"only \d+\.\d% of the student's tokens could be aligned", message)
        assert "conch-dna vocab" in message

    def test_an_output_folder_that_is_a_file(self, pair, tmp_path):
        output = written(tmp_path / "file", "")
        message = refused(*pair.options(Path(output)))
        assert message.startswith(f"cannot write to {output}/s: ")
        assert message.endswith("Free it, or choose another --output-dir")


class TestRefusedLater:
    """What shows only when the models or the data are known."""

    def test_a_prompt_longer_than_the_context(self, pair, tmp_path):
        prompts = written(tmp_path / "prompts.txt", f"Hello\n{'word ' * 250}\n")
        message = stopped(*pair.options(tmp_path / "out", prompts=prompts))
        assert re.match(
            r"prompt 2 has \d+ tokens with its system prompt and .*; with 8 for", message
        )
        assert "exceeds 256" in message
        assert "shorten one of them, or lower --max-tokens" in message

    def test_an_example_longer_than_the_context(self, pair, tmp_path):
        lines = [*({"text": prompt} for prompt in PROMPTS), {"text": "word " * 250}]
        data = written(tmp_path / "data.jsonl", "\n".join(map(json.dumps, lines)))
        message = stopped(*pair.options(tmp_path / "out", prompts=None, data=data))
        assert message.startswith("1 of 13 examples are longer than 256 tokens")
        assert "example 13 (" in message
        assert "--too-long skip" in message

    def test_too_few_examples_for_a_batch(self, pair, tmp_path):
        message = stopped(*pair.options(tmp_path / "out", batch_size=10))
        assert message.startswith("9 training examples cannot fill one batch of 10")
        assert message.endswith("give more data or a smaller --batch-size")

    def test_one_example_that_cannot_be_split(self, pair, tmp_path):
        prompts = written(tmp_path / "prompts.txt", "Hello")
        message = stopped(*pair.options(tmp_path / "out", prompts=prompts))
        assert "cannot be split into training and held-out data: give at least two" in message

    def test_more_kept_tokens_than_there_are(self, pair, tmp_path):
        message = stopped(*pair.options(tmp_path / "out", top_k=1537))
        assert message.startswith("top_k is 1537, but teacher ")
        assert message.endswith("has 1536 tokens: lower --top-k")

    def test_layers_that_the_student_does_not_have(self, pair, tmp_path):
        message = stopped(*pair.options(tmp_path / "out", lora_keys="self_attn.w_pack"))
        assert "'self_attn.w_pack' names no layers of" in message
        assert "It has mlp.down_proj" in message
        message = stopped(*pair.options(tmp_path / "out", lora_layers=3))
        assert message.startswith("lora_layers is 3, but ")
        assert "use 1 to 2, or -1 for all" in message

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_student_with_broken_weights(self, value, pair, tmp_path):
        student = shutil.copytree(pair.student, tmp_path / "student")
        weights = mx.load(str(student / "model.safetensors"))
        assert isinstance(weights, dict)
        name = "model.layers.1.mlp.up_proj.weight"
        weights[name] = mx.full(weights[name].shape, value)
        mx.save_safetensors(str(student / "model.safetensors"), weights, {"format": "mlx"})
        message = stopped(*pair.options(tmp_path / "out", student=student))
        assert message.startswith(f"weight {name} of student {student} has numbers that are NaN")
        # Before the teacher has worked.
        assert not list((tmp_path / "out" / "s").glob("*targets*"))

    def test_a_loss_that_is_not_finite(self, pair, tmp_path):
        """It names the step, the examples and the last checkpoint, and keeps no broken adapter."""
        changes = {"learning_rate": 1e30, "warmup_iters": 0, "steps_per_save": 1}
        message = stopped(*pair.options(tmp_path, **changes, steps_per_eval=50))
        found = re.match(
            r"the loss is (nan|inf) and the gradient norm \S+ at step (\d) on example \d+, "
            r"example \d+; the last good checkpoint is (\S+)\. Lower the learning rate",
            message,
        )
        assert found, message
        assert int(found[2]) > 1
        assert found[3] == str(tmp_path / "s" / f"checkpoint_{int(found[2]) - 1}")
        assert Path(found[3]).is_dir()
        assert not (tmp_path / "s" / "adapters_kd").exists()


class TestYaml:
    def test_it_holds_any_option_and_the_command_line_wins(self, pair, tmp_path):
        settings = {
            "domain": "from_file",
            "teacher": str(pair.teacher),
            "student": str(pair.student),
            "prompts": str(pair.prompts),
            "output-dir": str(tmp_path / "out"),
            **{name: value for name, value in QUICK.items() if name != "num_iters"},
            "iters": 50,
            "alpha": 0.5,
            "temperature": 3,
            "dora": True,
        }
        file = written(tmp_path / "run.yaml", json.dumps(settings))
        finish("--config", file, "--domain", "s", "--iters", "2", "--alpha", "0.9")
        document = json.loads((tmp_path / "out" / "s" / "run.json").read_text())
        used = document["identity"]
        assert (
            used.items() >= {"alpha": 0.9, "num_iters": 2, "temperature": 3, "dora": True}.items()
        )
        assert used["learning_rate"] == QUICK["learning_rate"]

    def test_a_switch_can_be_turned_off_again(self, pair, tmp_path):
        file = written(tmp_path / "run.yaml", "dora: true")
        finish(*pair.options(tmp_path / "out"), "--config", file, "--no-dora")
        document = json.loads((tmp_path / "out" / "s" / "run.json").read_text())
        assert document["identity"]["dora"] is False

    def test_a_number_without_a_point_is_a_number(self, pair, tmp_path):
        """YAML 1.1 reads 1e-4, as everybody writes it, as text."""
        file = written(tmp_path / "run.yaml", "weight_decay: 1e-4")
        finish(*pair.options(tmp_path / "out"), "--config", file)
        document = json.loads((tmp_path / "out" / "s" / "run.json").read_text())
        assert document["identity"]["weight_decay"] == 1e-4

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (
                "alfa: 0.5\nbeta: 1",
                "run.yaml names unknown settings: alfa (alpha?), beta; ",
            ),
            ("alpha: 1.5", "alpha is 1.5: it must be between 0 and 1"),
            ("alpha: lots", "alpha is 'lots': it must be a number"),
            ("iters: 2.5", "num_iters is 2.5: it must be a whole number"),
            ("dora: 1", "dora is 1: it must be a true or false"),
            ("divergence: kl", "divergence is 'kl': use one of forward_kl"),
            ("- alpha", "run.yaml is not a mapping of option names to values"),
            ("", "run.yaml is not a mapping of option names to values"),
            ("alpha: [", "run.yaml is not YAML: while parsing"),
            ("teacher: 7", "teacher is 7: it must be text"),
            ("domain: null", "domain is None: it must be text"),
            ("prompts: [a, b]", "prompts is ['a', 'b']: it must be text"),
        ],
    )
    def test_what_it_cannot_hold(self, text, expected, pair, tmp_path):
        key = text.partition(":")[0]
        given = {key: None} if key in ("teacher", "domain", "prompts") else {}
        file = written(tmp_path / "run.yaml", text)
        options = pair.options(tmp_path / "out", **({"num_iters": None} | given))
        assert expected in refused("--config", file, *options)


class TestFolders:
    def test_resuming_with_other_settings_lists_every_difference(self, pair, copy):
        changes = {"learning_rate": 1e-3, "batch_size": 3, "dora": "", "seed": 1}
        options = [part for part in pair.options(copy, **changes) if part]
        message = refused("--resume", *options)
        assert f"{copy}/s was made with other settings: " in message
        for difference in (
            "learning_rate: was 0.003, now 0.001",
            "batch_size: was 2, now 3",
            "dora: was False, now True",
            "seed: was 0, now 1",
        ):
            assert difference in message
        assert message.count(": was ") == 4
        assert message.endswith(
            "Resume with the same ones, or add --run NAME to keep both, or choose another "
            "--output-dir"
        )

    def test_resuming_with_another_model_says_so(self, pair, copy, tmp_path):
        student = shutil.copytree(pair.student, tmp_path / "other")
        message = refused("--resume", *pair.options(copy, student=student))
        assert f"student: was '{pair.student}', now '{student}'" in message

    def test_a_finished_run_is_not_done_again_on_resume(self, pair, copy):
        result = finish("--resume", *pair.options(copy))
        assert result.stderr == "s is already finished\n"
        assert "student after" in result.stdout

    def test_without_a_number_of_steps_a_run_keeps_its_own(self, pair, copy):
        """Whoever trained it on to 6 does not mean the default of 200 by a bare --resume."""
        finish("--resume", *pair.options(copy, num_iters=6))
        own = pair.options(copy, num_iters=None)
        rows = table(finish("--resume", "--dry-run", *own).stdout)
        assert rows["training"].startswith("6 steps")
        assert rows["that folder"].replace(" ", "") == "holdsafinishedrun:itsresultwouldbeshown"
        result = finish("--resume", *own)
        assert result.stderr == "s is already finished\n"
        assert "of 6)" in result.stdout

    def test_a_dry_run_says_what_becomes_of_what_lies_there(self, pair, copy, tmp_path):
        def there(*more: str, **changes: Any) -> str:
            found = table(finish("--dry-run", *more, *pair.options(copy, **changes)).stdout)
            return found.get("that folder", "").replace(" ", "")

        assert there() == "holdsafinishedrun:wouldberefusedwithout--overwriteor--runNAME"
        assert there("--run", "b") == ""
        assert there("--overwrite") == "holdsafinishedrun,whichwouldbereplaced"
        assert there("--resume", num_iters=9) == "wouldgoonfromstep4"
        assert "wouldberefused:" in there("--resume", seed=1)
        assert "settings:seed:was0,now1" in there("--resume", seed=1)
        run_file = copy / "s" / "run.json"
        run_file.write_text(run_file.read_text().replace('"finished": true', '"finished": false'))
        assert there().endswith("--runNAME,--resumetogoonfromstep4")
        file = written(tmp_path / "file", "a")
        for more in (["--dry-run"], []):
            message = refused(*more, *pair.options(Path(file)))
            assert message.startswith(f"cannot write to {file}/s: {file} is a file. Free it")

    def test_an_unfinished_run_is_not_overwritten_by_accident(self, pair, copy, clean):
        document = json.loads((copy / "s" / "run.json").read_text())
        (copy / "s" / "run.json").write_text(json.dumps(document | {"finished": False}))
        message = refused(*pair.options(copy))
        assert message.startswith(f"{copy}/s holds an unfinished run and an adapter with the same ")
        assert "add --resume to go on with it, --overwrite to replace it" in message
        shutil.rmtree(copy / "s" / "adapters_kd")
        message = refused(*pair.options(copy))
        assert message.startswith(f"{copy}/s holds an unfinished run: add --resume to go on")
        assert "--overwrite to start again" in message
        result = finish("--resume", *pair.options(copy))
        assert f"going on from step 4 ({copy}/s/checkpoint_4)" in result.stderr
        assert adapter_in(copy) == adapter_in(clean)

    def test_overwriting_starts_again(self, pair, copy, clean):
        document = json.loads((copy / "s" / "run.json").read_text())
        (copy / "s" / "run.json").write_text(json.dumps(document | {"finished": False}))
        result = finish("--overwrite", *pair.options(copy))
        assert "step 2: loss" in result.stderr
        assert adapter_in(copy) == adapter_in(clean)

    def test_a_truncated_shard_is_computed_again_with_a_warning(self, pair, copy, clean):
        (shard,) = (copy / "s" / "soft_targets").rglob("*.safetensors")
        shard.write_bytes(shard.read_bytes()[:-50])
        result = finish("--overwrite", *pair.options(copy))
        warning = f"warning: cache shard {shard} is truncated or unreadable; its targets are"
        assert warning in result.stderr
        assert adapter_in(copy) == adapter_in(clean)

    @pytest.mark.slow
    def test_a_second_process_is_refused_and_told_the_first(self, pair, tmp_path):
        options = pair.options(tmp_path, num_iters=100_000)
        first = subprocess.Popen(
            [sys.executable, "-m", "conch_dna", "distill", *options],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        assert first.stderr is not None
        try:
            for line in first.stderr:
                if line.startswith("step 6:"):
                    break
            message = refused(*options)
            assert message.startswith(f"{tmp_path}/s is in use by process {first.pid} on ")
            assert message.endswith("wait for it to end, or choose another --output-dir")
            assert first.poll() is None
        finally:
            first.kill()
            first.communicate()
        # A killed process holds no lock.
        assert "unfinished run" in refused(*options)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as on a full disk."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestFullDisk:
    @pytest.mark.parametrize(
        ("pattern", "stage"),
        [
            ("run.json", "run.lock.json"),
            ("soft_targets/*/*.safetensors", "soft_targets/"),
            ("checkpoint_2/optimizer.safetensors", "checkpoint_2"),
            ("adapters_kd/training_curve.png", "adapters_kd"),
        ],
    )
    def test_leaves_nothing_half_written_and_can_be_resumed(
        self, pattern, stage, pair, clean, tmp_path
    ):
        smallest = min(path.stat().st_size for path in (clean / "s").glob(pattern))
        size = 16 if stage == "run.lock.json" else smallest - 1
        with largest_file(size):
            message = stopped(*pair.options(tmp_path))
        assert message.startswith(f"cannot write {tmp_path}/s/{stage}")
        assert "Nothing half-written was left; free some disk space" in message
        assert not [*tmp_path.rglob(".writing-*")]
        assert not (tmp_path / "s" / "adapters_kd").exists()
        finish("--resume", *pair.options(tmp_path))
        assert adapter_in(tmp_path) == adapter_in(clean)
        assert not [*tmp_path.rglob(".writing-*")]

    def test_leaves_the_folder_unlocked_for_the_same_process(self, tmp_path):
        with largest_file(16), pytest.raises(ConchError) as refusal, FolderLock(tmp_path):
            pass
        # The traceback, as a notebook keeps it, keeps the lock object alive.
        assert refusal.tb
        with FolderLock(tmp_path):
            pass


class TestDryRun:
    def test_shows_what_would_run_and_writes_nothing(self, pair, tmp_path, monkeypatch):
        def loaded(*arguments: Any, **how: Any) -> None:
            raise AssertionError("a dry run loads no weights")

        monkeypatch.setattr(ModelSource, "load", loaded)
        result = finish("--dry-run", *pair.options(tmp_path / "out", max_tokens=10))
        rows = table(result.stdout)
        assert "s: dry run, nothing was done" in result.stdout
        assert rows["examples"] == "12, of which 3 held out"
        # 8 of the 9 training examples are drawn in 4 steps of 2, and 3 are held out.
        assert rows["teacher's tokens to compute"] == "at most 110"
        # 8 kept tokens of 6 bytes, two temperatures of 8 and the text's own token of 4.
        assert rows["soft targets on disk"] == "at most 0.0 MB"
        assert rows["training"] == "4 steps, 0.9 times the data"
        assert rows["output folder"] == str(tmp_path / "out" / "s")
        assert not [*tmp_path.iterdir()]

    def test_counts_given_data_exactly(self, pair, tmp_path):
        lines = [json.dumps({"prompt": prompt, "completion": " ran."}) for prompt in PROMPTS]
        data = written(tmp_path / "data.jsonl", "\n".join(lines))
        options = pair.options(tmp_path / "out", prompts=None, data=data)
        planned = table(finish("--dry-run", *options).stdout)
        assert not (tmp_path / "out").exists()
        finish(*options)
        tokens = stored_rows(tmp_path / "out" / "s" / "soft_targets")
        assert planned["teacher's tokens to compute"] == str(tokens)
        assert planned["data"] == "given"

    def test_of_all_domains(self, pair, tmp_path):
        teacher, student = "embedded:teacher", "embedded:student"
        given = {"domain": None, "prompts": None, "teacher": teacher, "student": student}
        result = finish("--all", "--dry-run", *pair.options(tmp_path / "out", **given))
        for domain in DOMAIN_PROMPTS:
            assert f"{domain}: dry run, nothing was done" in result.stdout
        assert not [*tmp_path.iterdir()]

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"batch_size": 10}, "9 training examples cannot fill one batch of 10"),
            ({"top_k": 1537}, "top_k is 1537, but teacher"),
            ({"max_tokens": 250}, "prompt 1 has "),
            ({"domain": "a/b"}, "becomes a folder's name"),
        ],
    )
    def test_refuses_what_the_run_would_refuse(self, changes, expected, pair, tmp_path):
        message = refused("--dry-run", *pair.options(tmp_path / "out", **changes))
        assert message.startswith(expected) or expected in message
        assert stopped(*pair.options(tmp_path / "out", **changes)) == message


def table(text: str) -> dict[str, str]:
    """The rows of a rich table of two columns, folded cells put together."""
    rows: dict[str, str] = {}
    label = ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if len(cells) == 2:
            label = cells[0] or label
            rows[label] = rows.get(label, "") + cells[1]
    return rows


class TestOutput:
    def test_plain_lines_where_there_is_no_terminal(self, pair, tmp_path):
        result = finish(*pair.options(tmp_path))
        # A busy machine also hears that libraries are still loading.
        lines = [line for line in result.stderr.splitlines() if "still at work" not in line]
        assert "\x1b" not in result.output
        assert "\r" not in result.output
        assert lines[0] == "s: the teacher answers: 12 prompts"
        phases = [line for line in lines if line.startswith("s: ")]
        assert [line.split(": ")[1] for line in phases] == [
            "the teacher answers",
            "the teacher's targets",
            "evaluating the student",
            "training",
            "evaluating the adapter",
        ]
        (step,) = [line for line in lines if line.startswith("step 2: loss")]
        assert re.fullmatch(
            r"step 2: loss \d+\.\d{4}, KD \d+\.\d{4}, CE \d+\.\d{4}, [\d,]+ tokens/s, "
            r"\d+:\d\d remaining",
            step,
        )
        assert any(line.startswith("step 4: held out loss ") for line in lines)

    def test_the_result_is_a_table_and_the_command_that_tries_it(self, pair, clean, copy):
        text = finish("--resume", *pair.options(copy)).stdout
        evaluation = json.loads((clean / "s" / "adapters_kd" / "evaluation.json").read_text())
        assert f"{evaluation['gap_closed']:.1%} of the gap closed" in text
        (after,) = [line for line in text.splitlines() if "student after" in line]
        assert f"{evaluation['after']['kl_nats']:.4f}" in after
        assert f"{evaluation['after']['perplexity']:.2f}" in after
        # The path is the one that the run was made with.
        result = json.loads((clean / "s" / "adapters_kd" / "kd_result.json").read_text())
        kept = result["metadata"]["best_step"]
        assert f"adapter: {clean}/s/adapters_kd (kept: step {kept} of 4)" in text
        assert "s: the student is NOT SHOWN TO BE BETTER: KL to the teacher" in text
        assert "on 3 held-out examples, and an interval needs 6" in text
        assert "more data, or a higher --val-fraction than 0.25" in text
        assert "mlx_lm.generate" not in text

    def test_a_gain_can_be_required(self, pair, copy):
        result = run("--resume", "--require-gain", *pair.options(copy))
        assert result.exit_code == 1

    def test_a_better_student_gets_the_command_that_tries_it(self, pair, clean, capsys):
        path = clean / "s" / "adapters_kd"
        result = KDResult(**json.loads((path / "kd_result.json").read_text()))
        result.evaluation["verdict"] |= {"verdict": "better", "interval": [-0.2, -0.1]}
        distiller = TrueKnowledgeDistiller(str(pair.teacher), str(pair.student), KDConfig())
        _print_summary(distiller, {"results": {"s": result}, "failures": {}})
        text = capsys.readouterr().out
        assert "s: the student is better: KL to the teacher" in text
        assert "(95% interval -0.2000 to -0.1000, 3 held-out examples)" in text
        assert f"mlx_lm.generate --model {pair.student} --adapter-path {path} --prompt" in text
        assert "more data" not in text

    def test_a_domain_that_fails_makes_the_exit_code_1(self, pair, tmp_path):
        original = dict(DOMAIN_PROMPTS)
        DOMAIN_PROMPTS.clear()
        DOMAIN_PROMPTS["long"] = {"system": "word " * 250, "examples": PROMPTS}
        DOMAIN_PROMPTS["short"] = {"system": "Be kind.", "examples": PROMPTS}
        try:
            given = {"domain": None, "prompts": None}
            result = run("--all", *pair.options(tmp_path, **given))
        finally:
            DOMAIN_PROMPTS.clear()
            DOMAIN_PROMPTS.update(original)
        assert result.exit_code == 1
        last = result.stderr.splitlines()[-1]
        assert last.startswith("error: domain long: prompt 1 has ")
        assert "short: " in result.stdout
        summary = json.loads((tmp_path / "kd_summary.json").read_text())
        assert list(summary["failures"]) == ["long"]
        assert list(summary["results"]) == ["short"]


class TestHelp:
    @pytest.mark.parametrize("names", [[], *([name] for name in sorted(main.commands))])
    def test_every_command_shows_an_example(self, names):
        for flag in ("--help", "-h"):
            result = CliRunner().invoke(main, [*names, flag])
            assert result.exit_code == 0
            _, found, example = result.output.partition("\n  Example:\n    ")
            assert found
            starts = {
                "benchmark": "python -m conch_dna.training.benchmark",
                "cortex": "conch-dna cortex ask",
                "distill": "python -m conch_dna.training.true_kd",
                "generations": "conch-dna generations init",
                "sediment": "conch-dna sediment ingest",
            }
            name = names[-1] if names else ""
            usual = f"conch-dna {name or 'distill'}"
            assert example.startswith(starts.get(name, usual))
            assert "\\b" not in result.output

    def test_every_setting_is_an_option_with_its_default(self):
        text = " ".join(CliRunner().invoke(distill, ["--help"], terminal_width=500).output.split())
        for setting in fields(KDConfig):
            name = setting.name.replace("_", "-")
            assert f"--{name} " in text or f"--{name}, --" in text
            default = "none" if setting.default == "" else str(setting.default).lower()
            assert f"[default: {default}" in text
            if kind_of(setting) == "bool":
                assert f"--{name} / --no-{name}" in text

    def test_it_imports_nothing_heavy(self):
        heavy = ["transformers", "mlx_lm", "torch", "matplotlib", "sentence_transformers"]
        heavy += ["huggingface_hub", "safetensors", "yaml", "mlx.nn"]
        code = (
            "import sys\nfrom conch_dna.cli import main\n"
            "main(['distill', '--help'], standalone_mode=False)\n"
            f"print('loaded:', *[name for name in {heavy} if name in sys.modules])"
        )
        done = python("-c", code)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].split() == ["loaded:"]

    def test_the_version(self):
        import conch_dna

        result = CliRunner().invoke(main, ["--version"])
        assert result.output.startswith(f"conch_dna {conch_dna.__version__}, mlx ")
        assert result.output.rstrip().endswith(blas_state())


class TestProcess:
    """The same in processes of their own."""

    @pytest.mark.parametrize("command", [*(f"-m {module}" for module in MODULES), "conch-dna"])
    def test_a_refusal_is_one_line_and_exit_code_2(self, command, tmp_path):
        script = Path(sys.executable).with_name("conch-dna")
        start = command.split() if command.startswith("-m") else [str(script), "distill"]
        if start[0] != "-m" and not script.is_file():
            pytest.skip("the console script is not installed beside this Python")
        options = ["--domain", "cooking", "--output-dir", str(tmp_path)]
        done = python("-W", "error", *start, *options)
        assert done.returncode == 2
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: domain 'cooking' is unknown: use one of thinking, ")

    @pytest.mark.slow
    def test_an_unreachable_hub(self, tmp_path):
        """The hub is asked, unlike with HF_HUB_OFFLINE, and nobody answers."""
        options = ["--domain", "thinking", "--output-dir", str(tmp_path / "out")]
        nobody = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
        done = python("-m", MODULES[0], *options, **nobody, HF_HOME=str(tmp_path / "cache"))
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: the hub could not be reached for mlx-community/Qwen2.5-7B")
        assert "embedded:teacher and embedded:student" in line
        assert not (tmp_path / "out").exists()

    @pytest.mark.slow
    def test_a_run_ends_with_exit_code_0_and_the_same_bytes(self, pair, clean, tmp_path):
        done = python("-m", MODULES[0], *pair.options(tmp_path))
        assert done.returncode == 0, done.stderr
        assert "student after" in done.stdout
        assert adapter_in(tmp_path) == adapter_in(clean)
