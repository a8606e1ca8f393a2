"""The house plan, held: which module may import which, and what no module does.

Reads the source with `ast` and imports nothing of it. A new module needs a floor in FLOORS and a
line in the picture of CONTRIBUTING.md.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "conch_dna"

FLOORS = {
    "digests": 0,
    "errors": 0,
    "losses": 0,
    "metrics": 0,
    "progress": 0,
    "provenance": 0,
    "checkpoints": 1,
    "hub": 1,
    "option_fields": 1,
    "language_model": 2,
    "command_parts": 3,
    "cortex.interrupts": 0,
    "cortex.prefixes": 0,
    "cortex.shared_tree": 0,
    "cortex.structured": 1,
    "cortex.options": 2,
    "cortex.confidence": 3,
    "cortex.adapter_modules": 4,
    "cortex.recording": 4,
    "cortex.request": 4,
    "cortex.adapter_bank": 5,
    "cortex.turn": 5,
    "cortex.routing": 6,
    "cortex.server_replies": 6,
    "cortex.server_requests": 6,
    "cortex.batching": 7,
    "cortex.retrain_settings": 7,
    "cortex.server_jobs": 7,
    "cortex.server_metrics": 7,
    "cortex.server_settings": 8,
    "cortex.heldout": 13,
    "cortex.neuron": 14,
    "cortex.status": 14,
    "cortex.calibrating": 15,
    "cortex.server_ego": 15,
    "cortex.terminal": 15,
    "cortex.command_options": 16,
    "cortex.server_loop": 16,
    "cortex.learning_commands": 17,
    "cortex.server_chat": 17,
    "cortex.server_app": 18,
    "cortex.serving": 19,
    "cortex.cli": 20,
    "ego.settings": 3,
    "ego.endpoint": 4,
    "ego.scoring": 5,
    "ego.model": 6,
    "generations.options": 0,
    "generations.blending": 1,
    "generations.laws": 1,
    "generations.promotion": 1,
    "generations.line": 2,
    "generations.replay": 2,
    "generations.taboo": 2,
    "generations.ensemble": 4,
    "generations.tables": 4,
    "generations.measures": 5,
    "generations.two_teachers": 5,
    "generations.settings": 6,
    "generations.foreign": 8,
    "generations.material": 8,
    "generations.learning": 9,
    "generations.manifest": 10,
    "generations.evolve": 11,
    "generations.cli": 12,
    "sedimentation.choices": 0,
    "sedimentation.library_warnings": 0,
    "sedimentation.state_folders": 0,
    "sedimentation.vector_store": 0,
    "sedimentation.document_files": 1,
    "sedimentation.documents": 1,
    "sedimentation.pair_sums": 1,
    "sedimentation.retrieval": 1,
    "sedimentation.server_connection": 1,
    "sedimentation.store_state": 1,
    "sedimentation.stored_documents": 1,
    "sedimentation.vectors": 1,
    "sedimentation.adapter": 2,
    "sedimentation.beir": 2,
    "sedimentation.checked_store": 2,
    "sedimentation.chelation_log": 2,
    "sedimentation.collapse": 2,
    "sedimentation.config": 2,
    "sedimentation.embedding_contract": 2,
    "sedimentation.model_places": 2,
    "sedimentation.results": 2,
    "sedimentation.word_fusion": 2,
    "sedimentation.benchmark_queries": 3,
    "sedimentation.edge_store": 3,
    "sedimentation.gate": 3,
    "sedimentation.local_embedders": 3,
    "sedimentation.memory_store": 3,
    "sedimentation.neighbourhoods": 3,
    "sedimentation.ollama": 3,
    "sedimentation.residual_adapter": 3,
    "sedimentation.server_store": 3,
    "sedimentation.tables": 3,
    "sedimentation.teacher_alignment": 3,
    "sedimentation.teacher_cache": 3,
    "sedimentation.teacher_ensemble": 3,
    "sedimentation.versions": 3,
    "sedimentation.adapter_export": 4,
    "sedimentation.embedders": 4,
    "sedimentation.gate_history": 4,
    "sedimentation.make_student": 4,
    "sedimentation.stores": 4,
    "sedimentation.stored_state": 5,
    "sedimentation.teacher_distillation": 5,
    "sedimentation.evidence": 6,
    "sedimentation.fallback_targets": 6,
    "sedimentation.fitting": 6,
    "sedimentation.intake": 6,
    "sedimentation.cycles": 7,
    "sedimentation.engine": 8,
    "sedimentation.benchmark_stages": 9,
    "sedimentation.store_options": 9,
    "sedimentation.benchmark_rows": 10,
    "sedimentation.benchmark_report": 11,
    "sedimentation.benchmark_distillation": 12,
    "sedimentation.cli": 13,
    "training.alignments": 0,
    "training.distillation": 0,
    "training.schemas": 0,
    "training.batches": 1,
    "training.redaction": 1,
    "training.token_bytes": 1,
    "training.byte_alignment": 2,
    "training.records": 2,
    "training.settings": 2,
    "training.token_insides": 2,
    "training.vocabulary": 2,
    "training.adapters": 3,
    "training.aligned_records": 3,
    "training.answers": 3,
    "training.conversations": 3,
    "training.ema": 3,
    "training.experience": 3,
    "training.head_loss": 3,
    "training.report": 3,
    "training.soft_targets": 3,
    "training.aligned_loss": 4,
    "training.evaluation": 4,
    "training.lessons": 4,
    "training.outcome_rows": 4,
    "training.text_stream": 4,
    "training.token_scores": 4,
    "training.trainer": 4,
    "training.class_targets": 5,
    "training.aligned_targets": 6,
    "training.examples": 7,
    "training.domain_run": 8,
    "training.plan": 8,
    "training.true_kd": 9,
    "training.retraining": 12,
    "training.pipeline": 13,
    "training.benchmark_rows": 16,
    "training.benchmark_report": 17,
    "training.benchmark": 18,
    "cli": 21,
}
# These name or start other modules, and nothing imports from them but the version.
EXEMPT = {
    "",
    "__main__",
    "cortex.__main__",
    "generations.__main__",
    "sedimentation.__main__",
}
# Each may use the modules at the top of the package and training's lower floors, not each other.
WINGS = {"generations", "sedimentation"}
# These use wings: a domain's versions are a line of generations, CORTEX serves what they made, and
# the benchmark measures what CORTEX serves.
ABOVE_WINGS = {
    "cli",
    "training.benchmark",
    "training.benchmark_report",
    "training.benchmark_rows",
    "training.pipeline",
    "training.retraining",
}
PACKAGES_ABOVE = {"cortex"}
# Slow to import, or not there on every machine.
HEAVY = {
    "Stemmer",
    "bm25s",
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
    "torch",
    "transformers",
    "uvicorn",
}
MAX_LINES = 500


def module_name(path: Path) -> str:
    """`training.true_kd` for conch_dna/training/true_kd.py; a package's is its folder's."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if PACKAGE / "assets" not in path.parents
}
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}
PLAIN = sorted(set(MODULES) - PACKAGES - EXEMPT)


def is_main_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(tree: ast.AST, package: str, *, eager: bool = False) -> Iterator[tuple[int, str]]:
    """Every import as (line, dotted name), those of names from a module as `module.name`.

    What stands under `if __name__ == "__main__":` does not count. `eager` leaves out what runs
    only when a function is called, or only for the type checker.
    """
    for node in ast.iter_child_nodes(tree):
        if is_main_guard(node):
            continue
        if eager and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or is_type_checking(node)
        ):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = ["conch_dna", *filter(None, package.split("."))]
                parents = parts[: len(parts) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)
        yield from imports(node, package, eager=eager)


def imported_module(name: str) -> str | None:
    """The module of this package that an imported dotted name reaches; None if it is another's."""
    parts = name.split(".")
    if parts[0] != "conch_dna":
        return None
    for end in range(len(parts), 0, -1):
        if (inner := ".".join(parts[1:end])) in MODULES:
            return inner
    raise AssertionError(f"{name} is imported, and no such module exists")


def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def package_of(module: str) -> str:
    return module if module in PACKAGES else module.rpartition(".")[0]


def test_every_module_has_a_floor_and_every_floor_a_module():
    assert set(FLOORS) == set(PLAIN)


@pytest.mark.parametrize("module", sorted(set(PLAIN) & set(FLOORS)))
def test_imports_go_to_lower_floors_only(module):
    wrong = []
    for line, name in imports(tree_of(module), package_of(module)):
        target = imported_module(name)
        if target is None or name == "conch_dna.__version__":
            continue
        where = f"{MODULES[module].relative_to(ROOT)}:{line}"
        if target in PACKAGES | EXEMPT:
            wrong.append(f"{where} imports {name}: import from the module where it is defined")
        elif (floor := FLOORS.get(target, 0)) >= FLOORS[module]:
            wrong.append(f"{where} (floor {FLOORS[module]}) imports {target} (floor {floor})")
    assert not wrong, "\n".join(wrong)


def is_above_wings(module: str) -> bool:
    return module in ABOVE_WINGS or module.split(".")[0] in PACKAGES_ABOVE


def test_no_wing_is_used_by_another_part_below_what_stands_above_them():
    wrong = []
    for module in (each for each in PLAIN if not is_above_wings(each)):
        wing = module.split(".")[0]
        for line, name in imports(tree_of(module), package_of(module)):
            target = (imported_module(name) or "").split(".")[0]
            if target in WINGS and target != wing:
                wrong.append(f"{MODULES[module].relative_to(ROOT)}:{line} uses the wing {target}")
    assert not wrong, "\n".join(wrong)


def test_what_stands_above_the_wings_is_used_by_nothing_below():
    wrong = []
    for module in (each for each in PLAIN if not is_above_wings(each)):
        for line, name in imports(tree_of(module), package_of(module)):
            if is_above_wings(imported_module(name) or ""):
                wrong.append(f"{MODULES[module].relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_heavy_packages_are_imported_inside_functions(module):
    found = [
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {name} when it is loaded"
        for line, name in imports(tree_of(module), package_of(module), eager=True)
        if name.split(".")[0] in HEAVY
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("package", sorted(PACKAGES - EXEMPT))
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


def test_the_picture_in_contributing_shows_these_floors():
    """Lines such as `  losses.py   [0] …`, a sub-package's indented under `  training/`."""
    shown, folder = {}, ""
    for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"^(?P<indent> *)(?P<folder>\w+)/(?:\s|$)", line):
            folder = match["folder"] + "." if match["indent"] else ""
        elif match := re.match(r"^ +(?P<path>[\w/]+)\.py\s+\[(?P<floor>\d+)\]", line):
            prefix = folder if len(line) - len(line.lstrip()) > 2 else ""
            shown[prefix + match["path"].replace("/", ".")] = int(match["floor"])
    assert shown == FLOORS


def test_the_command_line_loads_nothing_heavy():
    """`python -m conch_dna --help` answers at once because of this."""
    code = "import sys, conch_dna.cli; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert "conch_dna" in loaded
    assert not HEAVY & set(loaded)


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
        ("from . import batches", ["conch_dna.training.batches"], ["conch_dna.training.batches"]),
        ("from ..losses import kl", ["conch_dna.losses.kl"], ["conch_dna.losses.kl"]),
        ("importlib.import_module('torch.nn')", ["torch.nn"], ["torch.nn"]),
    ],
)
def test_the_reader_of_imports_sees_each_form(source, everything, eager):
    tree = ast.parse(source)
    assert [name for _, name in imports(tree, "training")] == everything
    assert [name for _, name in imports(tree, "training", eager=True)] == eager
