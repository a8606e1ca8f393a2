"""What the Markdown files say is so: every command, option, default, link and Python example.

Reads all *.md files at the root and in docs/. Commands are parsed against the real command tree and
never run, except Python blocks whose first line is `# runs offline`.
"""

import doctest
import importlib.metadata
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import yaml

from conch_dna import cli
from conch_dna.errors import ConchError
from conch_dna.training import cli as training_cli
from conch_dna.training.runs.request import RUN_KEYS
from conch_dna.training.settings import DEFAULT_STUDENT, DEFAULT_TEACHER, KDConfig
from conch_dna.training.sweeps.grid import grid_runs

ROOT = Path(__file__).resolve().parent.parent
README = "README.md"
GUIDE = "TRUE_KD_README.md"
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
)
SHELLS = {"bash", "sh", "shell", "console"}
OPERATORS = re.compile(r"[;&|()]+")
REDIRECTIONS = re.compile(r"[<>]+")
# What `python -m <module>` runs.
MODULE_COMMANDS = {"conch_dna": cli.main, "conch_dna.training.true_kd": training_cli.distill}
FIELDS = {field.name: field for field in fields(KDConfig)}
DEFAULTS = {
    name: field.default if field.default is not MISSING else field.default_factory()
    for name, field in FIELDS.items()
} | {"teacher": DEFAULT_TEACHER, "student": DEFAULT_STUDENT}


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line it starts on."""

    language: str
    text: str
    line: int


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(markdown: str) -> list[Block]:
    found, fence, start, language, inside = [], "", 0, "", []
    for number, line in enumerate(markdown.splitlines(), start=1):
        stripped = line.strip()
        if not fence and (match := re.match(r"(`{3,}|~{3,})\s*(\w*)", stripped)):
            fence, language, start, inside = match[1], match[2].lower(), number + 1, []
        elif fence and stripped.startswith(fence) and not stripped.strip(fence[0]):
            indent = min((len(t) - len(t.lstrip()) for t in inside if t.strip()), default=0)
            text = "\n".join(t[indent:] for t in inside)
            found.append(Block(language, text, start))
            fence = ""
        elif fence:
            inside.append(line)
    assert not fence, f"the block that starts on line {start} is never closed"
    return found


def without_blocks(markdown: str) -> str:
    return re.sub(r"^\s*(`{3,}|~{3,})[\s\S]*?^\s*\1\s*$", "", markdown, flags=re.MULTILINE)


def commands(block: Block) -> list[list[str]]:
    """The simple commands of a shell block as words; in `console`, the lines after `$ ` only."""
    found, text = [], ""
    for line in block.text.splitlines():
        prompted = line.lstrip().startswith("$ ")
        if not text and block.language == "console" and not prompted:
            continue
        text += line.lstrip().removeprefix("$ ") if not text else " " + line.strip()
        if text.endswith("\\"):
            text = text[:-1]
            continue
        lexer = shlex.shlex(re.sub(r"\s\d?>&\d", "", text), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not OPERATORS.fullmatch(word):
                words.append(word)
            elif words:
                found.append(words)
                words = []
        text = ""
    return [stripped for words in found if (stripped := strip_words(words))]


def strip_words(words: list[str]) -> list[str]:
    """Drop variable assignments before a command, and redirections."""
    while words and re.match(r"^[A-Za-z_]\w*=", words[0]):
        words = words[1:]
    kept, skip = [], False
    for word in words:
        if not skip and not REDIRECTIONS.fullmatch(word):
            kept.append(word)
        skip = bool(REDIRECTIONS.fullmatch(word))
    return kept


def parse(command: click.Command, arguments: list[str], name: str) -> None:
    """Parse arguments as click would, and check values, without running anything.

    Raises:
        click.UsageError: An unknown option or command, or a value of the wrong kind.
    """
    context = click.Context(command, info_name=name, **command.context_settings)
    given, rest, _ = command.make_parser(context).parse_args(list(arguments))
    values = {}
    for parameter in command.get_params(context):
        flag = isinstance(parameter, click.Option) and (parameter.is_flag or parameter.count)
        if parameter.name in given and not flag:
            values[parameter.name] = parameter.type_cast_value(context, given[parameter.name])
    settings = {name: value for name, value in values.items() if name in FIELDS}
    if command is training_cli.distill:
        KDConfig(**settings)
    if not isinstance(command, click.Group):
        if rest:
            raise click.UsageError(f"unexpected: {' '.join(rest)}")
    elif rest:
        if (inner := command.get_command(context, rest[0])) is None:
            raise click.UsageError(f"no command {rest[0]!r}")
        parse(inner, rest[1:], f"{name} {rest[0]}")
    elif not given:
        raise click.UsageError("no command given")


def check_mlx_lm(tool: str, arguments: list[str]) -> None:
    """Options of mlx_lm's tools are looked for in their source: importing them is slow."""
    spec = importlib.util.find_spec("mlx_lm")
    source = Path(spec.submodule_search_locations[0], f"{tool}.py")
    assert source.is_file(), f"mlx_lm has no tool {tool}"
    text = source.read_text(encoding="utf-8")
    for option in (word.split("=")[0] for word in arguments if re.match(r"--?[a-z]", word)):
        assert f'"{option}"' in text, f"mlx_lm.{tool} has no option {option}"


def check_make(arguments: list[str]) -> None:
    targets = set(re.findall(r"^([\w./-]+)\s*:(?!=)", read("Makefile"), flags=re.MULTILINE))
    asked = [word for word in arguments if "=" not in word and not word.startswith("-")]
    assert set(asked) <= targets, f"the Makefile has no target {' '.join(set(asked) - targets)}"


def check_pip(arguments: list[str]) -> None:
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    for word in arguments:
        if match := re.fullmatch(r"(?:\.|conch[-_]dna)\[([\w,]+)\]", word):
            unknown = set(match[1].split(",")) - set(extras)
            assert not unknown, f"there is no extra {unknown}"


def check_python(arguments: list[str]) -> None:
    if arguments[:1] == ["-m"]:
        module, rest = arguments[1], arguments[2:]
        if module.split(".")[0] == "conch_dna":
            assert module in MODULE_COMMANDS, f"python -m {module} is no command"
            parse(MODULE_COMMANDS[module], rest, f"python -m {module}")
        elif module.split(".")[0] == "mlx_lm":
            tool = module.partition(".")[2]
            check_mlx_lm(tool or rest[0], rest if tool else rest[1:])
        elif module == "pip":
            check_pip(rest)
    elif arguments and arguments[0].endswith(".py"):
        assert (ROOT / arguments[0]).is_file(), f"there is no {arguments[0]}"


def check(words: list[str]) -> None:
    """Check one command; commands of others (git, cd, ...) pass."""
    program, arguments = words[0].rpartition("/")[2], words[1:]
    if re.fullmatch(r"python3?(\.\d+)?", program):
        check_python(arguments)
    elif program == "conch-dna":
        parse(cli.main, arguments, program)
    elif program == "make":
        check_make(arguments)
    elif program.startswith("mlx_lm."):
        check_mlx_lm(program.partition(".")[2], arguments)
    elif program in ("pip", "pip3"):
        check_pip(arguments)


def problems(markdown: str) -> list[str]:
    """Every wrong command of a document, with its block's line."""
    found = []
    for block in blocks(markdown):
        if block.language not in SHELLS:
            continue
        try:
            shown = commands(block)
        except ValueError as error:
            found.append(f"line {block.line}: {error}")
            continue
        for words in shown:
            try:
                check(words)
            except click.UsageError as error:
                found.append(f"line {block.line}: {shlex.join(words)}: {error.format_message()}")
            except (AssertionError, ConchError) as error:
                complaint = str(error).partition("\n")[0]
                found.append(f"line {block.line}: {shlex.join(words)}: {complaint}")
    return found


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def anchors(markdown: str) -> set[str]:
    text, seen, found = without_blocks(markdown), {}, set()
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", text, flags=re.MULTILINE):
        name = slug(heading)
        count = seen[name] = seen.get(name, -1) + 1
        found.add(f"{name}-{count}" if count else name)
    return found | set(re.findall(r"<a\s+(?:id|name)=\"([^\"]+)\"", text))


def links(markdown: str) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", without_blocks(markdown))
    inline = re.findall(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)", text)
    return inline + re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, flags=re.MULTILINE)


class Row(NamedTuple):
    """A row of an options table: the option's flags and its stated default."""

    flags: list[str]
    default: str


def option_rows(markdown: str) -> list[Row]:
    """Rows of the form | `--option` | default | ... |."""
    rows = []
    for line in without_blocks(markdown).splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        if len(cells) >= 2 and cells[0].startswith("`-"):
            rows.append(Row(re.findall(r"--?[a-z][\w-]*", cells[0]), cells[1].strip("` ")))
    return rows


def states(text: str, value: object) -> bool:
    """Whether a table's text states a value: 1e-4 for 0.0001, off for False, none for ''."""
    if value is None or value == "" or value == ():
        return text.lower() in {"", "none", "-", "–", "—", "unset"}
    if isinstance(value, bool):
        return text.lower() in ({"true", "on", "yes"} if value else {"false", "off", "no"})
    if isinstance(value, int | float):
        try:
            return float(text.replace(",", "")) == float(value)
        except ValueError:
            return False
    if isinstance(value, tuple | list):
        return [part.strip() for part in text.split(",")] == [str(part) for part in value]
    return text.strip("\"'") == str(value)


def flags_of(command: click.Command) -> dict[str, str]:
    """Every flag of a command, but --help, and the name of the parameter that it sets."""
    return {
        flag: parameter.name
        for parameter in command.params
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }


def all_commands(command: click.Command = cli.main, path: str = "") -> dict[str, click.Command]:
    found = {path: command}
    for name, inner in getattr(command, "commands", {}).items():
        found |= all_commands(inner, f"{path} {name}".strip())
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_parses(document):
    assert not problems(read(document))


def test_the_readme_and_the_guide_show_commands():
    """Without this, a change in how blocks are marked would silence the test above."""
    for document in (README, GUIDE):
        shown = [c for b in blocks(read(document)) if b.language in SHELLS for c in commands(b)]
        assert len(shown) >= 2, f"{document} shows no commands in ```bash blocks"


def test_the_readme_is_short():
    assert len(read(README).splitlines()) <= 200


def test_the_guide_states_every_option_with_its_default():
    flags, rows = flags_of(training_cli.distill), option_rows(read(GUIDE))
    wrong, stated = [], set()
    for row in rows:
        unknown = [flag for flag in row.flags if flag not in flags]
        if unknown:
            wrong.append(f"{' '.join(unknown)}: `distill` has no such option")
            continue
        name = flags[row.flags[0]]
        stated.add(name)
        if name in DEFAULTS and not states(row.default, DEFAULTS[name]):
            wrong.append(f"{row.flags[0]}: stated {row.default!r}, is {DEFAULTS[name]!r}")
    missing = set(flags.values()) - stated
    wrong += [f"{name}: has no row in {GUIDE}" for name in sorted(missing | set(FIELDS) - stated)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_settings_files_shown_are_valid(document):
    """A ```yaml block of settings is one that --config takes, with values in their range."""
    names = {*RUN_KEYS, *FIELDS}
    for block in blocks(read(document)):
        values = yaml.safe_load(block.text) if block.language in ("yaml", "yml") else None
        if isinstance(values, dict) and set(values) & set(FIELDS):
            assert set(values) <= names, f"line {block.line}: not known: {set(values) - names}"
            fields_of = {name: value for name, value in values.items() if name in FIELDS}
            if any(isinstance(value, list) for value in fields_of.values()):
                grid_runs("s", fields_of, most=32)
            else:
                KDConfig(**fields_of)


@pytest.mark.parametrize("path", sorted(all_commands()))
def test_every_command_has_help_and_an_example_and_stands_in_the_documents(path):
    command = all_commands()[path]
    full_name = f"conch-dna {path}".strip()
    text = f"{command.help or ''} {command.epilog or ''}"
    assert command.help, f"{full_name} has no help"
    assert "xample" in text, f"the help of {full_name} has no example"
    assert any(full_name in read(each) for each in DOCUMENTS), f"no document shows {full_name}"
    unexplained = [p.opts[0] for p in command.params if not getattr(p, "help", None)]
    assert not unexplained, f"{full_name}: no help for {unexplained}"
    unclear = [p.opts[0] for p in command.params if str(p.help).startswith(("Of ", "Likewise"))]
    assert not unclear, f"{full_name}: the help of {unclear} says nothing alone"
    headings = getattr(command, "headings", {})
    assert set(headings) <= {p.name for p in command.params}, f"{full_name}: an option is gone"
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert len(options) <= 14 or headings, f"{full_name} has {len(options)} options in one list"
    examples = re.findall(r"^\s+((?:python -m|conch-dna) (?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert examples, f"the help of {full_name} shows no command line"
    for example in examples:
        for words in commands(Block("bash", example, 0)):
            check(words)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_internal_links_lead_somewhere(document):
    broken = []
    for target in links(read(document)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / document).parent / file if file else ROOT / document
        if not path.exists():
            broken.append(f"{target}: no such file")
        elif anchor and path.suffix == ".md" and anchor not in anchors(path.read_text("utf-8")):
            broken.append(f"{target}: no such heading")
    assert not broken, "\n".join(broken)


def python_blocks(document: str) -> list[Block]:
    if not (ROOT / document).is_file():
        return []
    return [block for block in blocks(read(document)) if block.language in ("python", "py")]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_blocks_compile(document):
    for block in python_blocks(document):
        text = block.text
        if text.lstrip().startswith(">>>"):
            text = doctest.script_from_examples(text)
        compile(text, f"{document}:{block.line}", "exec")


OFFLINE = [
    pytest.param(block.text, id=f"{document}:{block.line}")
    for document in DOCUMENTS
    for block in python_blocks(document)
    if block.text.lstrip().startswith("# runs offline")
]


@pytest.mark.slow
@pytest.mark.parametrize("text", OFFLINE)
def test_offline_python_blocks_run(text, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def in_bash(text: str) -> str:
    return f"```bash\n{text}\n```"


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("conch-dna destill", "no command 'destill'"),
        ("conch-dna", "no command given"),
        ("conch-dna distill --tempreature 2", "--tempreature"),
        ("conch-dna distill --domain thinking --temperature hot", "not a valid float"),
        ("conch-dna distill --domain thinking --temperature 99", "temperature"),
        ("conch-dna distill thinking", "unexpected: thinking"),
        ("FOO=1 .venv/bin/python -m conch_dna.training.true_kd --no-such 1", "--no-such"),
        ("cd x && python3 -m conch_dna.training.trainer", "is no command"),
        ("python examples/no_such_example.py > out.txt", "there is no examples/no_such_example.py"),
        ("make demo dmeo", "no target dmeo"),
        ("mlx_lm.generate --modle x", "has no option --modle"),
        ("mlx_lm.genarate --model x", "no tool genarate"),
        ("python -m mlx_lm generate --modle x", "has no option --modle"),
        ("pip install -e '.[dev,offlien]'", "no extra"),
        ("conch-dna distill \\\n  --domain thinking \\\n  --alhpa 1", "--alhpa"),
        ("conch-dna distill --domain 'thinking", "No closing quotation"),
    ],
)
def test_wrong_commands_are_found(command, complaint):
    (problem,) = problems(in_bash(command))
    assert complaint in problem


@pytest.mark.parametrize(
    "command",
    [
        "conch-dna --version",
        "conch-dna distill --help",
        "conch-dna distill --domain thinking --temperature 2.0 --alpha 0.7 --iters 200  # a note",
        "python -m conch_dna.training.true_kd --domain x --data d.jsonl --resume 2>&1 | tee log",
        "make demo PYTHON=python3.12 && make -j2 test",
        "mlx_lm.generate --model a --adapter-path b --prompt 'Once upon a time'",
        "mlx_lm.fuse --model a --adapter-path b --save-path c",
        "git clone https://example.org/conch_dna && cd conch_dna",
    ],
)
def test_right_commands_pass(command):
    assert not problems(in_bash(command))


def test_console_blocks_are_read_at_their_prompts():
    text = "```console\n$ make demo\nmake: --no-such output\n$ make nothing\n```"
    assert problems(text) == [
        "line 2: make nothing: the Makefile has no target nothing",
    ]


def test_tables_and_links_are_read():
    text = (
        "# A `b` c!\n## A `b` c!\n[x](#a-b-c) [y](Makefile#z 'title') `[no](link)`\n"
        "| option | default |\n|---|---|\n| `--top-k` | `64` | a \\| b |\n"
        "| `--dora`, `--no-dora` | off |\n```\n| `--in-a-block` | 1 |\n# no heading\n```\n"
    )
    assert option_rows(text) == [Row(["--top-k"], "64"), Row(["--dora", "--no-dora"], "off")]
    assert anchors(text) == {"a-b-c", "a-b-c-1"}
    assert links(text) == ["#a-b-c", "Makefile#z"]


@pytest.mark.parametrize(
    ("text", "value", "same"),
    [
        ("1e-4", 0.0001, True),
        ("0.7", 0.7, True),
        ("0.70", 0.8, False),
        ("200", 200, True),
        ("off", False, True),
        ("off", True, False),
        ("none", "", True),
        ("attention", "attention", True),
        ("all", "attention", False),
        ("", 1, False),
    ],
)
def test_stated_defaults_are_compared_by_value(text, value, same):
    assert states(text, value) is same


def test_mlx_lm_has_the_tools_that_the_documents_name():
    scripts = importlib.metadata.distribution("mlx-lm").entry_points
    assert {"mlx_lm.generate", "mlx_lm.fuse"} <= {script.name for script in scripts}
