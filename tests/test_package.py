"""The package as a whole: its public names, version, entry points, and OpenBLAS before mlx."""

import ctypes
import importlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import conch_dna

LINUX = sys.platform == "linux"


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python without the switch that other tests or the user may have set."""
    inherited = {k: v for k, v in os.environ.items() if k != "CONCH_DNA_NO_OPENBLAS"}
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


@pytest.mark.skipif(not LINUX, reason="OpenBLAS is loaded on Linux only")
class TestOpenBLAS:
    def test_is_loaded_where_the_system_has_it(self):
        state = printed("import conch_dna; print(conch_dna.openblas_state)")
        assert state == "loaded" if has_openblas() else state.startswith("absent")
        assert conch_dna.openblas_loaded == (conch_dna.openblas_state == "loaded")

    def test_is_skipped_on_request(self):
        code = "import conch_dna; print(conch_dna.openblas_loaded, conch_dna.openblas_state)"
        state = printed(code, CONCH_DNA_NO_OPENBLAS="1")
        assert state == "False skipped: CONCH_DNA_NO_OPENBLAS is 1"

    def test_says_when_mlx_came_first(self):
        """Silent failure: mlx has bound its slow BLAS and no later load changes that."""
        state = printed("import mlx.core, conch_dna; print(conch_dna.openblas_state)")
        assert state == "too late: mlx was imported before conch_dna"

    def test_its_absence_is_recorded_with_the_remedy(self, monkeypatch):
        def absent(name, mode):
            raise OSError(name)

        monkeypatch.setattr(ctypes, "CDLL", absent)
        monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
        monkeypatch.delenv("CONCH_DNA_NO_OPENBLAS", raising=False)
        assert "libopenblas0-pthread" in conch_dna._load_openblas()


def test_other_systems_need_no_openblas(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert conch_dna._load_openblas() == "not needed: this is not Linux"


@pytest.mark.parametrize("module", ["conch_dna", "conch_dna.training.true_kd"])
def test_modules_run_once_under_python_m(module):
    """An eager import in a package makes runpy warn that the module is 'found in sys.modules'."""
    done = python("-W", "error", "-m", module, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: python -m {module} [OPTIONS]")
    assert not done.stderr


def test_console_script_is_the_same_command():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="conch-dna")
    from conch_dna.cli import main

    assert script.load() is main


def test_type_information_is_in_the_package():
    assert (Path(conch_dna.__file__).parent / "py.typed").is_file()
