"""Fixtures that several test files use."""

import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # One worker for each processor: more threads than that would wait for each other.
    for library in ("OPENBLAS", "OMP"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import conch_dna  # noqa: F401  (loads OpenBLAS before anything imports mlx)
from models import SHARED, keep_layers, make_model_folder

# No test may fail because a machine is busy.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

# A shell ignores Ctrl-C in what it starts in the background, and everything below inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """No test may fail by chance: what it draws without a seed of its own is the same each time."""
    import mlx.core as mx

    random.seed(0)
    np.random.seed(0)
    mx.random.seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and texts beside the project; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not here")
    return SHARED


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama folder of two layers, context 256."""
    return make_model_folder(tmp_path_factory.mktemp("models") / "teacher", seed=1)


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller random Llama folder with the same tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "student"
    return make_model_folder(folder, seed=2, hidden_size=32, num_hidden_layers=2)


@pytest.fixture(scope="session")
def cut_student(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained stories260K with only layers 0, 2 and 4 kept."""
    folder = tmp_path_factory.mktemp("models") / "cut"
    return keep_layers(shared_data / "models" / "stories260K", folder, [0, 2, 4])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What test_fuzz.py tried, by whichever processes."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    rows = [value for each in reports for name, value in each.user_properties if name == "fuzz"]
    if not rows:
        return
    terminalreporter.section("hostile inputs")
    for row in sorted(rows, key=lambda row: row["slowest"]):
        figures = ", ".join(
            f"{row[name]} {name}" for name in ("accepted", "refused") if name in row
        )
        terminalreporter.line(f"{row['name']}: {figures}, slowest {row['slowest']:.3f} s")
    tried = sum(row.get(name, 0) for row in rows for name in ("accepted", "refused"))
    terminalreporter.line(f"{tried:,} tried")
