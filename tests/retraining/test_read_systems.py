"""Which system prompts an adapter and its teacher read, as its folder has it."""

import json
from pathlib import Path
from typing import Any

import pytest

from conch_dna.errors import ConchError
from conch_dna.retraining.domain import distillation_folder, distillation_settings, read_systems
from conch_dna.training.distillation import domain_system


def recorded(adapters: Path, config: Any) -> Path:
    folder = distillation_folder(adapters, "thinking")
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"conch_dna": {"config": config}}))
    return adapters


def test_what_was_distilled_without_a_prompt_is_asked_without(tmp_path: Path) -> None:
    own = domain_system("thinking")
    assert read_systems(tmp_path / "none", "thinking") == (own, own)
    adapters = recorded(tmp_path, {"student_system": "none"})
    assert read_systems(adapters, "thinking") == (own, "")


def test_an_adapter_of_another_version_answers_all_the_same(tmp_path: Path) -> None:
    adapters = recorded(tmp_path, {"teacher_system": "Be brief.", "gone": 1})
    assert read_systems(adapters, "thinking") == ("Be brief.", domain_system("thinking"))
    with pytest.raises(ConchError, match="gone"):
        distillation_settings(adapters, "thinking")


@pytest.mark.parametrize(("config", "said"), [({"student_system": 3}, "3"), ([1], "no mapping")])
def test_what_is_no_setting_is_refused(config: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConchError, match=said):
        read_systems(recorded(tmp_path, config), "thinking")
