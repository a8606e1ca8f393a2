"""A Modelfile: read as Ollama reads one, it asks what the tokenizer's own chat template asks.

The reader and the evaluator below follow Ollama's parser.go and Go's text/template, as far as is
written here; they know nothing of how it was written.
"""

import json
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from chat_templates import FAMILIES, family_tokenizer
from conch_dna.cli import main
from conch_dna.errors import ConchError
from conch_dna.exporting.adapter_files import export_gguf, modelfile_path
from conch_dna.exporting.modelfile import Pieces, modelfile, pieces_of
from conch_dna.exporting.source import AdapterSource
from conch_dna.language_model import ASSETS, ModelSource, load_tokenizer
from conch_dna.screen.progress import silent
from conch_dna.training.adapters import attach_lora, save_adapter, trained_tensors
from conch_dna.training.chats.conversations import prompt_ids
from conch_dna.training.distillation import DOMAIN_PROMPTS
from conch_dna.training.settings import KDConfig
from models import make_model_folder

CONTENTS = ("What is it?", '  {{ .Content }} }} "x"\n"""\n ü🐟 \\n\n\n')
STRING = re.compile(r'\{\{ "((?:[^"\\]|\\.)*)" \}\}')
CHATML = FAMILIES["ChatML"].template
PROMPT = "{% if messages[0].role != 'system' %}{{ '<|im_start|>Be good.' }}{% endif %}"


def commands(text: str) -> list[tuple[str, str]]:
    """The instructions of a Modelfile and their values, read sign by sign."""
    found, at = [], 0
    while at < len(text):
        if text[at] in "# \n":
            at = text.index("\n", at) + 1 if text[at] == "#" else at + 1
            continue
        name, _, rest = text[at:].partition(" ")
        at += len(name) + 1
        if name == "PARAMETER":
            key, _, rest = rest.partition(" ")
            name, at = f"{name} {key}", at + len(key) + 1
        value = ""
        for sign in text[at:]:
            at += 1
            quote = next((q for q in ('"""', '"') if value.lstrip().startswith(q)), "")
            inner = value.strip()
            whole = not quote or (len(inner) >= 2 * len(quote) and inner.endswith(quote))
            if sign in "\r\n" and whole:
                break
            value += sign if sign.isprintable() or sign in "\r\n\t" else ""
        found.append((name, inner[len(quote) : len(inner) - len(quote)]))
    return found


def rendered(template: str, messages: list[dict[str, str]]) -> str:
    """What a Go template of `range`, `if`, `else if`, `and`, `eq` and `ne` writes."""
    parts = re.split(r'(\{\{ "(?:[^"\\]|\\.)*" \}\}|\{\{.*?\}\})', template, flags=re.S)

    def holds(test: str, index: int, message: dict[str, str]) -> bool:
        if both := re.fullmatch(r"and \((.*)\) \((.*)\)", test):
            return all(holds(each, index, message) for each in both.groups())
        word, name, value = test.split(" ")
        have = {"$i": str(index), ".Role": json.dumps(message["role"])}[name]
        return {"eq": have == value, "ne": have != value}[word]

    def block(at: int, index: int, message: dict[str, str] | None, write: bool) -> tuple[str, int]:
        """What stands up to the `else` or `end` at the place that is told."""
        out = ""
        while at < len(parts):
            part = parts[at]
            if not part.startswith("{{"):
                out += part
            elif string := STRING.fullmatch(part):
                out += re.sub(r"\\U(\w{8})", lambda m: chr(int(m[1], 16)), string[1])
            elif part == "{{ .Content }}":
                out += message["content"] if message is not None else ""
            elif part == "{{ range $i, $_ := .Messages }}":
                for number, each in enumerate(messages):
                    text, end = block(at + 1, number, each, True)
                    out += text
                assert parts[end] == "{{ end }}"
                at = end
            elif part.startswith("{{ if "):
                done = False
                while parts[at] != "{{ end }}":
                    test = re.fullmatch(r"\{\{ (?:else )?if (.*) \}\}", parts[at])
                    assert test, parts[at]
                    assert message is not None
                    now = not done and holds(test[1], index, message)
                    text, at = block(at + 1, index, message, now)
                    out += text if now else ""
                    done = done or now
            else:
                assert part == "{{ end }}" or part.startswith("{{ else if "), part
                return (out if write else ""), at
            at += 1
        return out, at

    return block(0, 0, None, True)[0]


def conversations(content: str) -> list[list[dict[str, str]]]:
    roles = ("system", *("user", "assistant") * 3)
    pairs = product((0, 1), (2, 4, 6))
    return [[{"role": r, "content": content} for r in roles[start:end]] for start, end in pairs]


def tokenizer_of(folder: Path, source: Path, template: str | None = None) -> Any:
    shutil.copytree(source, folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    if template is not None:
        path.write_text(json.dumps({**settings, "chat_template": template}))
    if not (folder / "config.json").is_file():
        (folder / "config.json").write_text("{}")
    return load_tokenizer(folder)


def adapter_of(
    folder: Path, *, domain: str = "", template: str | None = None, **config: Any
) -> AdapterSource:
    """An adapter's folder that says how it was distilled; there are no weights in it."""
    model = folder / "model"
    if not model.is_dir():
        make_model_folder(model, seed=3, chat_template=template)
    own = {"conch_dna": {"domain": domain, "config": config}} if domain else {}
    (folder / "adapter").mkdir(parents=True)
    document = {"model": str(model), "fine_tune_type": "lora", **own}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(document))
    # Nothing reads it here.
    (folder / "adapter" / "adapters.safetensors").touch()
    return AdapterSource.open(folder / "adapter", trust_remote_code=False, report=silent)


def found(adapter: AdapterSource) -> dict[str, str]:
    return dict(commands(modelfile(adapter, "m.gguf")[0]))


class TestTemplate:
    @pytest.mark.parametrize("name", ["qwen2.5", "smollm2"])
    def test_real_chat_templates(self, tmp_path, shared_data, name):
        tokenizer = tokenizer_of(tmp_path / name, shared_data / "tokenizers" / name)
        template = pieces_of(tokenizer).to_go()
        for content in CONTENTS:
            for turns in conversations(content):
                expected = tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=True
                )
                assert rendered(template, turns) == expected

    @pytest.mark.parametrize("name", ["gpt2", "phi-3-mini", "tinystories2k", "embedded"])
    def test_without_a_chat_template_turns_stand_a_line_apart(self, tmp_path, shared_data, name):
        own = shared_data / "tokenizers" / name
        tokenizer = tokenizer_of(tmp_path / name, ASSETS / "student" if name == "embedded" else own)
        assert not tokenizer.has_chat_template
        template = pieces_of(tokenizer).to_go()
        for content in CONTENTS:
            for turns in conversations(content):
                assert rendered(template, turns) == "\n\n".join(t["content"] for t in turns)

    @pytest.mark.parametrize("name", ["ChatML", "Phi"])
    def test_families_that_come_to_pieces(self, tmp_path, name):
        tokenizer = family_tokenizer(tmp_path / "family", name)
        template = pieces_of(tokenizer).to_go()
        for turns in conversations(CONTENTS[1]):
            expected = tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
            assert rendered(template, turns) == expected

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("Llama 3", "changes turns such as ' {{ x }}"),
            ("Mistral v0.3", "changes turns such as 'text'"),
            ("Gemma", "System role not supported"),
            ("Qwen3", "changes turns such as '<think>"),
            ("R1-Distill", "changes turns such as '<think>"),
            ("GLM-4", "changes turns"),
        ],
    )
    def test_families_that_do_not(self, tmp_path, name, message):
        with pytest.raises(ConchError, match=message):
            pieces_of(family_tokenizer(tmp_path / "family", name))

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{{ strftime_now('%d %B %Y') }}" + CHATML, "changes turns"),
            ("{{ messages[0].content }}", "drops or moves a turn of the assistant"),
            (CHATML.replace("m.content", "m.content | upper"), "drops or moves a turn of the user"),
        ],
    )
    def test_templates_that_are_refused(self, tmp_path, template, message):
        """A date in a piece would be that of the export for ever."""
        tokenizer = tokenizer_of(tmp_path / "tokenizer", ASSETS / "student", template)
        with pytest.raises(ConchError, match=message):
            pieces_of(tokenizer)

    @pytest.mark.parametrize(
        "begin", ["", "{{ '<|BOS|>' }}", "<|BOS|>{{ 'Rules. ' }}", "<|BOS|>" + PROMPT]
    )
    def test_the_beginning_is_read_once(self, tmp_path, shared_data, begin):
        """A doubled beginning is what no model was trained with; no error tells of it."""
        own = shared_data / "tokenizers" / "tinystories2k"
        adapter = adapter_of(tmp_path)
        adapter.base.__dict__["tokenizer"] = tokenizer = tokenizer_of(
            tmp_path / "own", own, begin + CHATML
        )
        text, lacks = modelfile(adapter, "m.gguf")
        assert bool(lacks) is (not begin)
        assert not lacks or "puts <|BOS|> first" in lacks[0]
        template = dict(commands(text))["TEMPLATE"]
        turns = [{"role": "user", "content": "Hi"}]
        read = tokenizer.encode(rendered(template, turns))
        assert read[int(not begin) :] == prompt_ids(tokenizer, "Hi", "")

    @given(st.lists(st.text('{}"\\\n <-%a\u200b🐟\r'), min_size=9, max_size=9))
    def test_any_pieces_are_written_as_they_are(self, texts):
        begin, default, ask, *around = texts
        pairs = zip(around[::2], around[1::2], strict=True)
        pieces = Pieces(
            begin, default, dict(zip(("system", "user", "assistant"), pairs, strict=True)), ask
        )
        read = dict(commands(f'TEMPLATE """{pieces.to_go()}"""\nFROM x\n'))
        assert read["FROM"] == "x"
        for turns in conversations("{{ a }}"):
            assert rendered(read["TEMPLATE"], turns) == pieces.written(turns)


class TestSystem:
    def test_it_is_the_domains(self, tmp_path):
        for number, domain in enumerate(DOMAIN_PROMPTS):
            adapter = adapter_of(tmp_path / str(number), domain=domain)
            assert found(adapter)["SYSTEM"] == DOMAIN_PROMPTS[domain]["system"]

    @pytest.mark.parametrize(
        ("setting", "expected"),
        [("none", None), ('Say {{ it }} in "two" words.\n\n  #1\n', ...)],
    )
    def test_it_is_what_the_student_read(self, tmp_path, setting, expected):
        adapter = adapter_of(tmp_path, domain="thinking", student_system=setting)
        assert found(adapter).get("SYSTEM") == (setting if expected is ... else expected)

    def test_an_adapter_of_mlx_lm_has_none(self, tmp_path):
        assert "SYSTEM" not in found(adapter_of(tmp_path))

    def test_a_version_of_a_line_reads_what_the_distilled_one_read(self, tmp_path):
        distilled = adapter_of(tmp_path, domain="thinking", student_system="Be brief.")
        version = tmp_path / "lines" / "thinking" / "G001"
        version.mkdir(parents=True)
        place = tmp_path / "thinking" / "adapters_kd"
        shutil.copytree(distilled.folder, place)
        model = {"model": str(tmp_path / "model")}
        (version / "adapter_config.json").write_text(json.dumps(model))
        (version / "adapters.safetensors").touch()
        adapter = AdapterSource.open(version, trust_remote_code=False, report=silent)
        assert found(adapter)["SYSTEM"] == "Be brief."

    @pytest.mark.parametrize(
        ("system", "named"), [('Say """\nit.', '\'"""\''), ("Zero\u200bwidth", "'\\u200b'")]
    )
    def test_what_a_modelfile_cannot_hold_is_named(self, tmp_path, system, named):
        adapter = adapter_of(tmp_path, domain="thinking", student_system=system)
        text, lacks = modelfile(adapter, "m.gguf")
        (lack,) = lacks
        assert lack == f"there is no SYSTEM, send it yourself: a Modelfile cannot hold {named}"
        assert text.startswith(f"# {lack}\nFROM ./m.gguf\n")
        assert "SYSTEM" not in dict(commands(text))


def test_the_whole_file(tmp_path):
    adapter = adapter_of(tmp_path, domain="thinking", student_system="Be brief.", template=CHATML)
    tokenizer = adapter.base.tokenizer
    expected = [
        ("FROM", "./m.gguf"),
        ("TEMPLATE", pieces_of(tokenizer).to_go()),
        ("SYSTEM", "Be brief."),
        ("PARAMETER stop", tokenizer.eos_token),
        ("PARAMETER temperature", "0"),
        ("PARAMETER repeat_penalty", "1"),
    ]
    text, lacks = modelfile(adapter, "m.gguf")
    assert (commands(text), lacks) == (expected, [])


def exportable(folder: Path, template: str | None = None) -> AdapterSource:
    model = make_model_folder(folder / "model", seed=3, chat_template=template)
    student = ModelSource(str(model)).load()
    described = attach_lora(student, KDConfig(lora_rank=4, lora_keys="q_proj"))
    save_adapter(
        folder / "adapter", dict(trained_tensors(student)), {**described, "model": str(model)}
    )
    return AdapterSource.open(folder / "adapter", trust_remote_code=False, report=silent)


class TestExport:
    def test_both_files_and_what_is_to_be_typed(self, tmp_path):
        adapter = exportable(tmp_path, "{{ messages }}")
        command = ["export", str(adapter.folder), str(tmp_path / "a.b.gguf"), "--to", "gguf"]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        assert f"ollama create NAME -f {tmp_path / 'a.b.Modelfile'}" in result.output
        assert (tmp_path / "a.b.gguf").is_file()
        text = (tmp_path / "a.b.Modelfile").read_text()
        assert "TEMPLATE" not in dict(commands(text))
        assert dict(commands(text))["FROM"] == "./a.b.gguf"
        assert text.startswith("# there is no TEMPLATE, and Ollama uses the one in a.b.gguf: ")

    def test_what_it_lacks_is_told(self, tmp_path):
        told = []
        adapter = exportable(tmp_path, "{{ messages }}")
        export_gguf(adapter, tmp_path / "m.gguf", "f16", lambda event, row: told.append(row))
        (warning,) = [row["message"] for row in told if "warning" in str(row.get("message"))]
        assert warning.startswith("warning: m.Modelfile: there is no TEMPLATE")

    def test_a_file_that_is_there_stays(self, tmp_path):
        adapter = exportable(tmp_path)
        (tmp_path / "m.Modelfile").write_text("mine")
        with pytest.raises(ConchError, match=r"m\.Modelfile is there: name another"):
            export_gguf(adapter, tmp_path / "m.gguf", "f16", silent)
        assert (tmp_path / "m.Modelfile").read_text() == "mine"
        assert not (tmp_path / "m.gguf").exists()

    def test_one_that_a_killed_export_left_is_in_nobodys_way(self, tmp_path):
        adapter = exportable(tmp_path)
        export_gguf(adapter, tmp_path / "m.gguf", "f16", silent)
        (tmp_path / "m.gguf").unlink()
        export_gguf(adapter, tmp_path / "m.gguf", "f16", silent)
        assert (tmp_path / "m.gguf").exists()

    def test_without_the_model_there_is_none(self, tmp_path):
        adapter = exportable(tmp_path)
        path = adapter.base.folder / "config.json"
        stretched = {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}
        path.write_text(json.dumps({**json.loads(path.read_text()), **stretched}))
        with pytest.raises(ConchError, match="stretches positions"):
            export_gguf(adapter, tmp_path / "m.gguf", "f16", silent)
        assert not [*tmp_path.glob("*odelfile"), *tmp_path.glob("*.gguf")]

    def test_names(self):
        assert modelfile_path(Path("a/b.gguf")) == Path("a/b.Modelfile")
        assert modelfile_path(Path("b.q8")) == Path("b.q8.Modelfile")
