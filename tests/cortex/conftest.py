"""Fixtures that several test files of CORTEX use."""

from pathlib import Path

import pytest

from servers import train_adapters
from suites import distil, tales


@pytest.fixture(scope="session")
def distilled_tales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters that nobody may change: the domain tales, half of it held out."""
    folder = tmp_path_factory.mktemp("distilled")
    distil(folder, "tales", tales())
    return folder


@pytest.fixture(scope="session")
def served_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters of `servers`, which nobody may change."""
    return train_adapters(tmp_path_factory.mktemp("served"))
