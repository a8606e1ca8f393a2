"""The benchmark of adapters on the embedded pair: its figures are those of the distillation."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from conch_dna.cortex.benchmark.command import main, run_benchmark
from conch_dna.cortex.benchmark.report import domain_table
from conch_dna.cortex.benchmark.rows import AN_API
from conch_dna.cortex.calibration.heldout import HELDOUT_FILE
from conch_dna.cortex.calibration.settings import AdapterBenchmarkSettings
from conch_dna.cortex.neuron import CortexSuite
from conch_dna.ego.model import EgoConfig
from conch_dna.errors import ConchError
from conch_dna.generations.data import init_line
from conch_dna.generations.settings import EvolveConfig
from conch_dna.retraining.domain import line_of
from conch_dna.training.data.records import split_heldout
from conch_dna.training.distillation import DOMAIN_PROMPTS
from cortex_models import train_adapter
from models import make_model_folder
from suites import STUDENT, TEACHER, answering, tales

OBJECT = '{"cause": "a wheel", "verify": "look", "fix": ["put it on"], "otherwise": "a new car"}'
QUICK = AdapterBenchmarkSettings(samples=64, max_tokens=8, alone=2, max_risk=0.9)


def shown(name: str, found: dict[str, Any], width: int) -> str:
    """A domain's table as a console of that width prints it."""
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(domain_table(name, found))
    return console.export_text()


@pytest.fixture(scope="module")
def adapters(distilled_tales: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distilled domain, and one with a schema that keeps to it where it was trained to."""
    folder = tmp_path_factory.mktemp("adapters") / "adapters"
    shutil.copytree(distilled_tales, folder)
    system = DOMAIN_PROMPTS["debug"]["system"]
    asked = [
        {"prompt": f"{system}\n\n{question}", "completion": OBJECT}
        for question in ("Why did it stop?", "Why did the car stop?", "Why did Tom cry?")
    ]
    held = split_heldout(asked, EvolveConfig().training.val_fraction, seed=0)[1]
    adapter = train_adapter(
        folder / "trained",
        STUDENT,
        f"{asked[held[0]]['prompt']}{OBJECT}",
        lora_keys="all,model.embed_tokens",
        lora_rank=16,
        steps=40,
    )
    init_line(line_of(folder, "debug"), STUDENT, asked, adapter=adapter)
    return folder


@pytest.fixture(scope="module")
def measured(adapters: Path) -> Iterator[tuple[dict[str, Any], CortexSuite]]:
    with CortexSuite(adapters, STUDENT, ego=TEACHER) as suite:
        output = adapters / "results" / "b.json"
        document = run_benchmark(suite, ["tales"], QUICK, output=output)
        yield document, suite


@pytest.fixture(scope="module")
def structured(measured: tuple[dict[str, Any], CortexSuite]) -> dict[str, Any]:
    """What was measured of the domain with a schema."""
    settings = AdapterBenchmarkSettings(max_tokens=60, alone=1)
    document = run_benchmark(measured[1], ["debug"], settings)
    assert document["failures"] == {}
    found: dict[str, Any] = document["domains"]["debug"]
    return found


def test_held_out_figures_are_those_of_the_distillation(
    measured: tuple[dict[str, Any], CortexSuite], adapters: Path
) -> None:
    document, _ = measured
    assert document["failures"] == {}
    found = document["domains"]["tales"]
    path = adapters / "tales" / "adapters_kd" / "evaluation.json"
    expected = json.loads(path.read_text())
    for row, key in (("student", "before"), ("adapter", "after"), ("EGO", "teacher")):
        for figure, value in expected[key].items():
            assert found["rows"][row]["heldout"][figure] == pytest.approx(value, rel=1e-4)
    assert found["gap_closed"] == pytest.approx(expected["gap_closed"], rel=1e-3)
    kl = [row["heldout"]["kl_nats"] for row in found["rows"].values()]
    assert kl[0] != kl[1] and min(kl) == kl[2] == 0


def test_speed_memory_and_confidence_are_told(
    measured: tuple[dict[str, Any], CortexSuite],
) -> None:
    document, suite = measured
    found = document["domains"]["tales"]
    assert found["prompts"] == found["heldout_records"] == 32
    for row in found["rows"].values():
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert 0 < row["tokens"] <= 32 * 8 and 0 < row["first_token_s"] < row["seconds"] + 5
        assert row["peak_bytes"] >= row["bytes"] > 0 and row["valid_share"] is None
    rows = found["rows"]
    own = suite.bank.bytes_of("tales")
    assert [rows[name]["adapter_bytes"] for name in rows] == [0, own, 0]
    assert rows["adapter"]["bytes"] - rows["student"]["bytes"] == own
    for name in ("student", "adapter"):
        row = rows[name]
        calibration = row["calibration"]
        assert (calibration["n_fit"], calibration["n_held"]) == (16, 16)
        assert row["hand_over_share"] == pytest.approx(1 - calibration["coverage"])
        raw = row["risk_coverage"]["raw"]
        assert raw["coverage"][-1] == 1 and 0 <= raw["area"] <= 1
    assert rows["EGO"].get("calibration") is None


def test_valid_answers_and_too_few_to_calibrate(structured: dict[str, Any]) -> None:
    found, rows = structured, structured["rows"]
    assert [rows[name]["valid_share"] for name in ("student", "adapter")] == [0, 1]
    assert rows["adapter"]["agreement"] is not None and rows["student"]["agreement"] is None
    assert rows["adapter"]["calibration"] is None and rows["adapter"]["hand_over_share"] is None
    assert any("adapter: not calibrated: 1 answers are too few" in n for n in found["notes"])
    refused = "student: 1 answers left out: not valid for the domain's schema"
    assert any(refused in note for note in found["notes"])


def test_files_table_and_plot(
    measured: tuple[dict[str, Any], CortexSuite], structured: dict[str, Any], adapters: Path
) -> None:
    document, _ = measured
    output = adapters / "results" / "b.json"
    assert json.loads(output.read_text()) == json.loads(json.dumps(document))
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {"versions", "platform", "processors", "settings", "batch"} <= set(document)
    found = document["domains"]["tales"]
    for width in (80, 200):
        text = shown("tales", found, width)
        assert f"{found['rows']['adapter']['heldout']['kl_nats']:.3f}" in text
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text and "valid" not in text and "chunk" not in text
    assert "valid JSON" in shown("debug", structured, 200)


@pytest.mark.slow
def test_an_api_has_no_distributions_and_says_so(adapters: Path) -> None:
    with answering(lambda messages: "A wheel was gone.") as url:
        ego = EgoConfig(model=url, remote_model="big", retries=0)
        with CortexSuite(adapters, STUDENT, ego=ego, domains=["tales"]) as suite:
            quick = AdapterBenchmarkSettings(samples=64, max_tokens=4, alone=1)
            document = run_benchmark(suite, ["tales"], quick)
    assert document["failures"] == {}
    found = document["domains"]["tales"]
    assert AN_API in found["notes"] and found["gap_closed"] is None
    assert all(row["heldout"] is None for row in found["rows"].values())
    ego_row, row = found["rows"]["EGO"], found["rows"]["adapter"]
    assert ego_row["peak_bytes"] is None and ego_row["bytes"] is None
    assert ego_row["tokens"] == 2 * 32
    assert "likeness" in row["agreement_means"] and 0 < row["agreement"] < 1
    assert "KL" not in shown("tales", found, 120)


def test_a_teacher_with_another_tokenizer(adapters: Path, tmp_path: Path) -> None:
    other = make_model_folder(tmp_path / "ego", hidden_size=32)
    path = other / "tokenizer.json"
    tokens = json.loads(path.read_text())
    assert tokens["model"]["vocab"]
    # The last merge and its token gone: another vocabulary.
    *merges, last = tokens["model"]["merges"]
    gone = "".join(last) if isinstance(last, list) else last.replace(" ", "")
    tokens["model"]["merges"] = merges
    if gone in tokens["model"]["vocab"]:
        number = tokens["model"]["vocab"].pop(gone)
        tokens["model"]["vocab"]["<gone>"] = number
    path.write_text(json.dumps(tokens))
    with CortexSuite(adapters, STUDENT, ego=str(other), domains=["tales"]) as suite:
        document = run_benchmark(
            suite, ["tales"], AdapterBenchmarkSettings(samples=20, max_tokens=4)
        )
    found = document["domains"]["tales"]
    assert found["alignment"] == "roots"
    assert found["rows"]["adapter"]["heldout"]["kl_nats"] > 0


class TestCommand:
    def run(self, *arguments: str) -> Any:
        return CliRunner().invoke(main, list(arguments))

    @pytest.mark.slow
    def test_one_domain_fails_and_the_other_is_measured(
        self, adapters: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "adapters"
        for name in ("one", "two"):
            shutil.copytree(adapters / "tales", folder / name)
        # As adapters were that earlier versions made.
        two = folder / "two" / "adapters_kd"
        (two / HELDOUT_FILE).unlink()
        digests = json.loads((two / "digests.json").read_text())
        del digests[HELDOUT_FILE]
        (two / "digests.json").write_text(json.dumps(digests))
        output = tmp_path / "out.json"
        quick = ["--samples", "20", "--max-tokens", "2"]
        base = ["--adapters", str(folder), "--ego", TEACHER, "--output", str(output), *quick]
        result = self.run(*base, "--all")
        assert result.exit_code == 1, result.output
        assert "one: 20 held-out prompts" in result.output
        assert f"written: {output}" in result.output
        assert "error: domain two: what two held out is not known" in result.output
        assert list(json.loads(output.read_text())["domains"]) == ["one"]
        assert output.with_suffix(".png").is_file()
        data = adapters / "tales" / "adapters_kd" / HELDOUT_FILE
        result = self.run(*base, "--domain", "two", "--data", str(data))
        assert result.exit_code == 0, result.output
        assert list(json.loads(output.read_text())["domains"]) == ["two"]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ([], "give either --domain NAME or --all"),
            (["--all", "--domain", "task"], "give either --domain NAME or --all"),
            (["--all", "--data", "x.jsonl"], "--data goes with one --domain"),
            (["--domain", "tales", "--output", "b.txt"], "must end in .json"),
            (["--domain", "tales", "--samples", "0"], "samples is 0: it must be 1 or more"),
            (
                ["--domain", "tales", "--max-risk", "2"],
                "max_risk is 2.0: it must be at least 0 and",
            ),
            (["--domain", "tales", "--ego", "http://127.0.0.1:1/v1"], "remote_model is empty"),
            (["--domain", "nobody", "--ego", TEACHER], "there is no adapter of nobody"),
        ],
    )
    def test_mistakes_are_one_line(self, adapters: Path, arguments: list[str], words: str) -> None:
        result = self.run("--adapters", str(adapters), *arguments)
        assert result.exit_code == 2
        assert words in result.output and result.output.count("\n") == 1

    def test_help_shows_an_example(self) -> None:
        result = self.run("--help")
        assert "python -m conch_dna.training.benchmark --domain thinking" in result.output


def test_refusals(adapters: Path) -> None:
    with (
        CortexSuite(adapters, STUDENT, domains=["tales"]) as alone,
        pytest.raises(ConchError, match="a benchmark compares with EGO: name one"),
    ):
        run_benchmark(alone, ["tales"])
    with CortexSuite(adapters, STUDENT, ego=TEACHER) as suite:
        with pytest.raises(ConchError, match="data are those of one domain"):
            run_benchmark(suite, ["tales", "debug"], data=tales())
        with pytest.raises(ConchError, match="there is no neuron 'memory'"):
            run_benchmark(suite, ["memory"])
