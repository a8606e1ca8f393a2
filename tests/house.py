"""The house as it stands: its modules, who imports whom, its picture and its size.

Reads the source with `ast` and imports nothing of it. `python tests/house.py` writes the picture
into CONTRIBUTING.md, `python tests/house.py sizes` prints lines of code; tests/test_layers.py
holds both to the rules. A new part of the house: its name in LAYERS.
"""

import ast
import re
import statistics
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "conch_dna"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- the house: `make house` writes this -->", "<!-- end of the house -->"

# From the lowest up; parts that share a layer do not import each other.
LAYERS = (
    ("foundation",),
    ("training",),
    ("generations", "sedimentation", "ego"),
    ("retraining",),
    ("cortex",),
    ("exporting",),
    ("cli",),
)
# One-line modules that hand on names under the paths of the documents; nothing imports from them.
DOORWAYS = {"training.benchmark", "training.pipeline"}


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
# These name or start other modules, and nothing imports from them but the version.
STARTERS = {name for name in MODULES if name in {"", "__main__"} or name.endswith(".__main__")}
PLAIN = sorted(set(MODULES) - PACKAGES - STARTERS - DOORWAYS)


def part_of(module: str) -> str:
    """The part of LAYERS that a module belongs to."""
    first = module.split(".")[0]
    known = {part for layer in LAYERS for part in layer}
    return first if first in known else "foundation"


def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def package_of(module: str) -> str:
    return module if module in PACKAGES else module.rpartition(".")[0]


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


def imports_of(module: str) -> dict[str, int]:
    """The modules of this package that a module imports, each with a line; not the version."""
    found: dict[str, int] = {}
    for line, name in imports(tree_of(module), package_of(module)):
        target = imported_module(name)
        if target is not None and name != "conch_dna.__version__":
            found.setdefault(target, line)
    return found


def header(module: str) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(tree_of(module)) or "").split("\n")[0].rstrip(".")


def entries(folder: Path) -> list[Path]:
    """What stands in a folder of the package."""
    return sorted(p for p in folder.iterdir() if p.name != "__pycache__")


def picture() -> str:
    """The house in lines: every folder and module with what it is."""
    lines = ["```", "conch_dna/"]

    def show(folder: Path, depth: int) -> None:
        inside = entries(folder)
        rooms = [p for p in inside if p.suffix == ".py" and module_name(p) in {*PLAIN, *DOORWAYS}]
        wide = max((len(p.name) for p in rooms), default=0)
        for path in rooms:
            lines.append(f"{'  ' * depth}{path.name:{wide}}  {header(module_name(path))}")
        for path in inside:
            if path.is_dir() and (path / "__init__.py").is_file():
                lines.append(f"{'  ' * depth}{path.name}/  {header(module_name(path))}")
                show(path, depth + 1)

    show(PACKAGE, 1)
    return "\n".join([*lines, "```"])


def shown_picture() -> str:
    """The picture that stands in CONTRIBUTING.md."""
    text = CONTRIBUTING.read_text(encoding="utf-8")
    return text.split(BEGIN)[1].split(END)[0].strip()


def lines_of_code(path: Path) -> int:
    """Lines that hold a token other than a comment or a docstring."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                documented.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    empty = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENCODING,
        tokenize.ENDMARKER,
    }
    lines: set[int] = set()
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in empty:
                lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def sizes() -> str:
    """Modules, lines, lines of code, the median file and the largest folders."""
    paths = list(MODULES.values())
    code: Counter[str] = Counter()
    for path in paths:
        code[part_of(module_name(path))] += lines_of_code(path)
    lengths = [len(path.read_text(encoding="utf-8").splitlines()) for path in paths]
    folders = Counter({str(p.parent.relative_to(ROOT)): len(entries(p.parent)) for p in paths})
    return "\n".join(
        [
            f"modules {len(paths)}, lines {sum(lengths)}, of code {sum(code.values())}, "
            f"median file {statistics.median(lengths):g} lines",
            *(f"  {part:14} {count:6} lines of code" for part, count in code.most_common()),
            "entries: " + ", ".join(f"{name} {count}" for name, count in folders.most_common(5)),
        ]
    )


def write_picture() -> None:
    """Put the picture into CONTRIBUTING.md."""
    text = CONTRIBUTING.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    CONTRIBUTING.write_text(
        pattern.sub(lambda _: f"{BEGIN}\n{picture()}\n{END}", text), encoding="utf-8"
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["sizes"]:
        print(sizes())
    else:
        write_picture()
