"""The house plan, held: which part may import which, and what no module does.

The parts, the reader of imports and the picture are in house.py.
"""

import ast
import importlib
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest

from house import (
    DOORWAYS,
    LAYERS,
    MODULES,
    PACKAGES,
    PLAIN,
    ROOT,
    STARTERS,
    entries,
    imports,
    imports_of,
    package_of,
    part_of,
    picture,
    shown_picture,
    tree_of,
)

# Slow to import, or not there on every machine.
HEAVY = {
    "Stemmer",
    "bm25s",
    "datasets",
    "gguf",
    "jsonschema",
    "matplotlib",
    "mlx_lm",
    "model2vec",
    "mteb",
    "openai",
    "prometheus_client",
    "pytrec_eval",
    "qdrant_client",
    "qdrant_edge",
    "referencing",
    "scipy",
    "sentence_transformers",
    "starlette",
    "swanlab",
    "tensorboardX",
    "torch",
    "transformers",
    "uvicorn",
    "wandb",
}
MAX_LINES = 500
MAX_ENTRIES = 20


# The paths that the documents name; they stay when rooms move.
DOCUMENTED = {
    "conch_dna": "DOMAIN_PROMPTS KDConfig KDResult TrueKnowledgeDistiller",
    "conch_dna.cortex.neuron": "CortexSuite Neuron create_cortex_suite",
    "conch_dna.ego.model": "EgoModel",
    "conch_dna.errors": "ConchError",
    "conch_dna.generations": "EvolveConfig Line TeacherStudentTrainer init_line",
    "conch_dna.generations.promotion": "GateSettings",
    "conch_dna.generations.settings": "EvolveConfig",
    "conch_dna.sedimentation": "AntigravityEngine ChelationConfig open_embedder open_store",
    "conch_dna.sedimentation.benchmark_distillation": "main run_benchmark",
    "conch_dna.training.batches": "Batch Example ExampleBatches collate sequential_batches",
    "conch_dna.training.benchmark": "main run_benchmark",
    "conch_dna.training.distillation": "DOMAIN_PROMPTS",
    "conch_dna.training.head_loss": "cross_entropy_sums",
    "conch_dna.training.pipeline": "TrainingPipeline",
    "conch_dna.training.settings": "KDConfig",
    "conch_dna.training.trainer": "Trainer TrainerSettings",
    "conch_dna.training.true_kd": "TrueKnowledgeDistiller align_vocab_sizes compute_ce_loss "
    "compute_kd_loss",
}


@pytest.mark.parametrize("module", PLAIN)
def test_imports_go_to_the_own_layer_and_lower_ones(module):
    rank = {part: number for number, parts in enumerate(LAYERS) for part in parts}
    own, wrong = part_of(module), []
    for target, line in imports_of(module).items():
        where, part = f"{MODULES[module].relative_to(ROOT)}:{line}", part_of(target)
        if target in PACKAGES | STARTERS | DOORWAYS:
            wrong.append(f"{where} imports {target}: import from the module where it is defined")
        elif rank[part] > rank[own]:
            wrong.append(f"{where} ({own}) imports {target}, which stands above it ({part})")
        elif rank[part] == rank[own] and part != own:
            wrong.append(f"{where} ({own}) imports {target}, of the part beside it ({part})")
    assert not wrong, "\n".join(wrong)


def test_no_imports_go_in_a_circle():
    graph = {module: set(imports_of(module)) for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_import_paths_work(name):
    module = importlib.import_module(name)
    for public in DOCUMENTED[name].split():
        assert getattr(module, public) is not None


@pytest.mark.parametrize("module", sorted(MODULES))
def test_heavy_packages_are_imported_inside_functions(module):
    found = [
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {name} when it is loaded"
        for line, name in imports(tree_of(module), package_of(module), eager=True)
        if name.split(".")[0] in HEAVY
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("package", sorted(PACKAGES - {""}))
def test_sub_packages_import_nothing(package):
    """An eager import there makes `python -m conch_dna.<package>.<module>` run it twice."""
    allowed = {"__future__", "importlib", "typing"}
    found = [
        f"{MODULES[package].relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports(tree_of(package), package, eager=True)
        if name.split(".")[0] not in allowed
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_header_and_length(module):
    path = MODULES[module]
    header = ast.get_docstring(tree_of(module)) or ""
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert header, f"{path.relative_to(ROOT)} has no header: what it is, what it does not know"
    if module in PLAIN:
        assert len(header.splitlines()) >= 3, (
            f"the header of {path.relative_to(ROOT)} says too little: what the module is, "
            "what it does not know, how to add to it"
        )
    assert lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {lines} lines: split it"


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in MODULES.values()}), ids=lambda path: path.name
)
def test_folders_can_be_taken_in_at_a_glance(folder):
    # Doorways hold one line each, and py.typed none; nobody looks at them.
    unread = {MODULES[name] for name in DOORWAYS} | {ROOT / "conch_dna" / "py.typed"}
    inside = [path for path in entries(folder) if path not in unread]
    assert len(inside) <= MAX_ENTRIES, f"{folder.relative_to(ROOT)} has {len(inside)} entries"


def test_the_picture_in_contributing_is_the_house():
    assert shown_picture() == picture(), "the house has changed: run make house"


def test_the_command_line_loads_nothing_heavy():
    """`python -m conch_dna --help` answers at once because of this."""
    code = "import sys, conch_dna.cli; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert "conch_dna" in loaded
    # The server reads its requests with pydantic; no command needs that to start.
    assert not (HEAVY | {"pydantic"}) & set(loaded)


@pytest.mark.parametrize(
    ("source", "everything", "eager"),
    [
        ("import torch", ["torch"], ["torch"]),
        ("from mlx_lm import load", ["mlx_lm.load"], ["mlx_lm.load"]),
        ("try:\n import torch\nexcept ImportError: pass", ["torch"], ["torch"]),
        ("class A:\n import torch", ["torch"], ["torch"]),
        ("def f():\n import torch", ["torch"], []),
        ("if TYPE_CHECKING:\n import torch", ["torch"], []),
        ('if __name__ == "__main__":\n import torch', [], []),
        (
            "from . import batches",
            ["conch_dna.training.batches"],
            ["conch_dna.training.batches"],
        ),
        ("from ..losses import kl", ["conch_dna.losses.kl"], ["conch_dna.losses.kl"]),
        ("importlib.import_module('torch.nn')", ["torch.nn"], ["torch.nn"]),
    ],
)
def test_the_reader_of_imports_sees_each_form(source, everything, eager):
    tree = ast.parse(source)
    assert [name for _, name in imports(tree, "training")] == everything
    assert [name for _, name in imports(tree, "training", eager=True)] == eager
