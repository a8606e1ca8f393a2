"""Inputs that are almost right: valid files with hostile values, broken bytes and broken structure.

Knows JSON, YAML and bytes; nothing of what reads them. To add a kind of hostility: a value in
VALUES, what JSON cannot be made to write in RAW, or a way to break bytes in `broken`.
"""

import copy
import json
from collections.abc import Sequence
from contextlib import suppress
from functools import reduce
from operator import getitem
from typing import Any

from hypothesis import strategies as st

# Of one input; long ones are made of few choices, so that they cost hypothesis nothing.
MOST_BYTES = 100_000
# In the place of a value, texts that `json.dumps` would not write.
RAW = {
    "@@nan@@": "NaN",
    "@@infinity@@": "-Infinity",
    "@@overflow@@": "1e999",
    "@@tiny@@": "-1e-999",
    "@@digits@@": "7" * 5_000,
    "@@90k digits@@": "7" * 90_000,
    "@@fraction@@": "0." + "3" * 90_000,
    "@@65 deep@@": "[" * 65 + "]" * 65,
    "@@900 deep@@": '{"a":' * 900 + "1" + "}" * 900,
    "@@950 lists@@": "[" * 950 + "]" * 950,
    "@@90k open@@": "[" * 90_000,
    "@@mixed@@": '[{"a":' * 12_000,
    "@@doubled@@": '{"a":1,"a":2}',
    "@@10k doubled@@": "{" + '"a":1,' * 9_999 + '"a":2}',
    "@@surrogate@@": '"\\ud800"',
    "@@surrogate key@@": '{"\\udfff": 1}',
    "@@pair turned@@": '"\\udc00\\ud800"',
    "@@null@@": '"\\u0000"',
    "@@bare@@": "'single'",
    "@@comment@@": "1 // one",
}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e308, 10**30, 2**31, 2**63, -(2**63) - 1, 2**64),
    *("", " ", "\n", "a\nb\r\nc", "\x00\x1b[31m", "\u2028", "null", "0", "../../etc", "x" * 90_000),
    *("@" * 300, "é" * 20_000, "{{ 1/0 }}", "%s%n", "\\", '"', "٣", "nan", "1e999", "user", "text"),
    *(
        [],
        {},
        [[]],
        [{}],
        [None],
        [""],
        [1, "1"],
        {"": ""},
        {"role": 1},
        {"a\nb": 1},
        ["x"] * 9_000,
    ),
    *(
        ["x"] * 9_000,
        [0] * 30_000,
        {str(n): n for n in range(5_000)},
        {"k" * 90_000: 1},
        [{"a": 1}] * 5_000,
    ),
    *RAW,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to every part of a JSON value, its own, which is empty, first."""
    if not isinstance(value, dict | list):
        return [path]
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *(each for key, part in inside for each in places(part, (*path, key)))]


def json_text(value: Any) -> str:
    text = json.dumps(value)
    for mark, raw in RAW.items():
        text = text.replace(f'"{mark}"', raw)
    return text


@st.composite
def changed(draw: st.DrawFn, examples: Sequence[Any]) -> Any:
    """A JSON value with up to three of its parts replaced, removed or wrapped, or others added."""
    value = copy.deepcopy(draw(st.sampled_from(examples)))
    paths = places(value)
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(paths))
        new = copy.deepcopy(draw(st.sampled_from(VALUES)))
        how = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add", "wrap")))
        if not path:
            if how == "wrap":
                return new
            continue
        # An earlier change may have taken the place away.
        with suppress(LookupError, TypeError):
            parent = reduce(getitem, path[:-1], value)
            if how == "replace":
                parent[path[-1]] = new
            elif how == "wrap":
                parent[path[-1]] = [parent[path[-1]]]
            elif how == "remove":
                del parent[path[-1]]
            elif isinstance(parent, dict):
                name = draw(st.sampled_from(("", "id", "extra", "a\nb", "\ud800", "x" * 2_000)))
                parent[name] = new
            elif isinstance(parent, list):
                parent.append(new)
    return value


@st.composite
def broken(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with up to two faults, at most MOST_BYTES of them."""
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 1, 2)))):
        at = draw(st.integers(0, 2**16)) % (len(content) + 1)
        how = draw(st.sampled_from(("flip", "flip", "cut", "insert", "repeat", "double", "encode")))
        if how == "flip" and at < len(content):
            flipped = content[at] ^ (1 << draw(st.integers(0, 7)))
            content = content[:at] + bytes([flipped]) + content[at + 1 :]
        elif how == "cut":
            content = content[:at]
        elif how == "insert":
            piece = draw(st.sampled_from(_PIECES))
            content = content[:at] + piece + content[at:]
        elif how == "repeat":
            content = (content * 2_000)[: MOST_BYTES + 1]
        elif how == "double":
            brace = content.find(b"{", at)
            if brace >= 0:
                key = content[brace + 1 :].split(b":")[0][:100]
                content = content[: brace + 1] + key + b":0," + content[brace + 1 :]
        elif how == "encode":
            text = content.decode("utf-8", "replace")
            content = text.encode(draw(st.sampled_from(("utf-16", "utf-8-sig", "utf-32"))))
    return content[:MOST_BYTES]


_PIECES = (
    *(b"\xff", b"\x00", b"\n", b"\r", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b'"'),
    *(b"\\", b"{", b"[", b"}", b"]", b",", b"NaN", b"\t", b"{{", b"{%", b"&a [*a]", b"!!python/x "),
    *(b"- " * 5_000, b"\n" * 50_000, b"a" * 50_000, b"[" * 50_000, b"\\u" * 20_000, b"( " * 20_000),
)


@st.composite
def json_bytes(draw: st.DrawFn, examples: Sequence[Any]) -> bytes:
    """A JSON file that is almost one of these values."""
    return draw(broken(json_text(draw(changed(examples))).encode()))


@st.composite
def json_line_bytes(draw: st.DrawFn, examples: Sequence[Any]) -> bytes:
    """A file of JSON lines, of which one is almost as the others are."""
    rows = [json_text(each) for each in examples]
    rows.insert(draw(st.integers(0, len(rows))), json_text(draw(changed(examples))))
    return draw(broken("".join(f"{row}\n" for row in rows).encode()))


@st.composite
def yaml_bytes(draw: st.DrawFn, examples: Sequence[Any], pieces: Sequence[str] = ()) -> bytes:
    """A YAML file that is almost one of these values, or holds what only YAML has."""
    import yaml

    value = draw(changed(examples))
    if draw(st.booleans()):
        text = json_text(value)
    else:
        text = yaml.safe_dump(value, default_flow_style=draw(st.booleans()), allow_unicode=True)
        for mark, raw in RAW.items():
            text = text.replace(f"'{mark}'", raw)
    text += draw(st.sampled_from(("", "", "", *_YAML, *pieces)))
    return draw(broken(text.encode("utf-8", "surrogatepass")))


_YAML = (
    "\nx: &a [1, 2]\ny: *a\n",
    "\na: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*a, *a, *a]\n" for n in range(40)),
    "\n<<: {iters: 3}\n",
    "\nx: !!python/object/apply:os.system ['true']\n",
    "\nx: !!binary '@@@@'\n",
    "\nx: 2026-99-99\n",
    "\nx: 2026-11-29T10:00:00+99:99\n",
    "\nx: !!timestamp nothing\n",
    "\n? [a, b]\n: 1\n",
    "\n? {a: b}\n: 1\n",
    "\nx: !!set {a, b}\n",
    "\nx: !!omap [a: 1, b: 2]\n",
    "\nx: .nan\ny: -.inf\n",
    "\nx: 190:20:30:40:50.15\n",
    "\nx: 0o777\ny: 0b1\nz: 0x" + "f" * 5_000 + "\n",
    "\n---\nsecond: document\n",
    "\n" + "- " * 3_000 + "x\n",
    "\n" + "x: {" * 5_000,
    "\n" + "".join(f"key{n}: {n}\n" for n in range(8_000)),
    "\n" + "".join(f"{n}: {n}\n" for n in range(8_000)),
    "\nx: |\n" + " text\n" * 10_000,
    "\n%YAML 9.9\n",
    "\n\t- tab\n",
)


@st.composite
def text_bytes(draw: st.DrawFn, examples: Sequence[str]) -> bytes:
    """A text that is almost one of these."""
    return draw(broken(draw(st.sampled_from(examples)).encode()))


@st.composite
def safetensors_bytes(draw: st.DrawFn) -> bytes:
    """A safetensors file with another header; its length is right, or is not."""
    header = {
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 32]},
        "__metadata__": {"format": "mlx"},
    }
    text = json_text(draw(changed([header]))).encode("utf-8", "surrogatepass")
    length = draw(st.sampled_from((len(text), len(text), len(text), 0, 7, 2**40, 2**63, 2**64 - 1)))
    return draw(broken(length.to_bytes(8, "little") + text + bytes(32)))
