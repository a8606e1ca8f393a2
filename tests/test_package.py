"""The package as a whole: its public names, version, entry points, and a BLAS before mlx."""

import ctypes
import importlib
import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import conch_dna
from conch_dna.errors import ConchError
from conch_dna.loading.blas import BlasBeforeMlx

LINUX = sys.platform == "linux"


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python without the switch that other tests or the user may have set."""
    inherited = {k: v for k, v in os.environ.items() if k != "CONCH_DNA_BLAS"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=inherited | environment,
        timeout=120,
    )


def printed(code: str, **environment: str) -> str:
    done = python("-c", code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def has_openblas() -> bool:
    try:
        ctypes.CDLL("libopenblas.so.0")
    except OSError:
        return False
    return True


def test_version_is_that_of_the_installed_distribution():
    assert importlib.metadata.version("conch-dna") == conch_dna.__version__


@pytest.mark.parametrize(("name", "home"), sorted(conch_dna._HOMES.items()))
def test_public_names_come_from_their_modules(name, home):
    assert getattr(conch_dna, name) is getattr(importlib.import_module(home), name)
    assert name in dir(conch_dna)


def test_unknown_names_are_refused_as_by_any_module():
    with pytest.raises(AttributeError, match="module 'conch_dna' has no attribute 'Teacher'"):
        conch_dna.Teacher  # noqa: B018


def test_importing_the_package_loads_no_third_party_package():
    code = (
        "import sys; before = set(sys.modules); import conch_dna; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(*sorted(new - sys.stdlib_module_names))"
    )
    assert printed(code) == "conch_dna"


STATE = "import conch_dna.loading.blas, mlx.core; print(conch_dna.loading.blas.blas_state())"


@pytest.mark.skipif(not LINUX, reason="a BLAS is loaded on Linux only")
class TestBLAS:
    def test_the_best_is_loaded_where_mlx_is_imported(self):
        best = "openblas" if has_openblas() else "torch"
        assert printed(STATE) == printed(STATE, CONCH_DNA_BLAS="auto") == best

    def test_that_of_torch_serves_mlx_and_torch(self):
        code = STATE + (
            "; import torch, mlx.core as mx; a = mx.ones((64, 32)); "
            "print((a @ a.T).sum().item(), torch.ones(8, 8).mm(torch.ones(8, 8)).sum().item())"
        )
        assert printed(code, CONCH_DNA_BLAS="torch") == "torch\n131072.0 512.0"

    def test_none_is_loaded_on_request(self):
        state = printed(STATE, CONCH_DNA_BLAS="none")
        assert state == "the wheel's own: CONCH_DNA_BLAS is none"

    def test_commands_without_mlx_load_none(self):
        state = printed("import conch_dna.loading.blas; print(conch_dna.loading.blas.blas_state())")
        assert state == "not loaded yet: mlx was not imported"

    @pytest.mark.parametrize("command", ["--help", "distill --help", "cortex serve --help"])
    def test_help_needs_no_mlx(self, command):
        code = (
            "import sys; from conch_dna.cli import main; "
            "main(sys.argv[1:], standalone_mode=False); print('mlx.core' in sys.modules)"
        )
        done = python("-c", code, *command.split())
        assert done.stdout.splitlines()[-1] == "False", done.stderr

    def test_says_when_mlx_came_first(self):
        """Silent failure: mlx has bound its slow BLAS and no later load changes that."""
        state = printed(
            "import mlx.core, conch_dna.loading.blas; print(conch_dna.loading.blas.blas_state())"
        )
        assert state == "the wheel's own: mlx was imported before conch_dna"

    def test_an_unknown_choice_is_refused(self):
        done = python("-m", "conch_dna", "--version", CONCH_DNA_BLAS="mkl")
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert "CONCH_DNA_BLAS is 'mkl', not auto, openblas, torch or none" in done.stderr

    @pytest.fixture
    def nothing_there(self, monkeypatch):
        def absent(name, mode):
            raise OSError(name)

        monkeypatch.setattr(ctypes, "CDLL", absent)

    def test_the_absence_of_both_is_said_with_the_remedy(self, nothing_there):
        assert "libopenblas0-pthread" in BlasBeforeMlx()._load("auto")

    def test_one_that_was_asked_for_must_be_there(self, nothing_there):
        with pytest.raises(ConchError, match="CONCH_DNA_BLAS is openblas, and libopenblas"):
            BlasBeforeMlx()._load("openblas")


def test_other_systems_need_no_blas(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    blas = BlasBeforeMlx()
    blas.watch()
    assert blas.state == "not needed: this is not Linux"


@pytest.mark.parametrize("module", ["conch_dna", "conch_dna.training.true_kd"])
def test_modules_run_once_under_python_m(module):
    """An eager import in a package makes runpy warn that the module is 'found in sys.modules'."""
    done = python("-W", "error", "-m", module, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: python -m {module} [OPTIONS]")
    assert not done.stderr


def test_console_script_is_the_same_command():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"conch-dna": "conch_dna.__main__:run"}
    done = python("-c", "from conch_dna.__main__ import run; run(name='conch-dna')", "--help")
    assert done.stdout.startswith("Usage: conch-dna [OPTIONS] COMMAND")


def test_type_information_is_in_the_package():
    assert (Path(conch_dna.__file__).parent / "py.typed").is_file()
