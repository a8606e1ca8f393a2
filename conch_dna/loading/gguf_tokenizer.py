"""The tokenizer that a GGUF file carries, as the files of a model folder.

Knows llama.cpp's two kinds, byte-level BPE and SentencePiece; nothing of weights. To know another
way to split text before merges: a line in SPLITS.
"""

from typing import Any

from conch_dna.errors import ConchError
from conch_dna.loading.gguf_file import GgufFile

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# A pattern by which text is split, "digits" for digits one by one, None for GPT-2's own way.
SPLITS: dict[str, str | None] = {
    "gpt-2": None,
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "llama-bpe": _CONTRACTIONS + r"\p{N}{1,3}" + _ENDS,
    "llama3": _CONTRACTIONS + r"\p{N}{1,3}" + _ENDS,
    "llama-v3": _CONTRACTIONS + r"\p{N}{1,3}" + _ENDS,
    "qwen2": _CONTRACTIONS + r"\p{N}" + _ENDS,
}
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "▁"


def tokenizer_documents(file: GgufFile) -> dict[str, Any]:
    """tokenizer.json and tokenizer_config.json of the tokenizer that a file carries.

    Raises:
        ConchError: It carries none, or one of a kind that is not known here.
    """
    pieces = file.get("tokenizer.ggml.tokens", list)
    kind = file.get("tokenizer.ggml.model", str)
    if len(set(pieces)) != len(pieces):
        raise ConchError(f"{file.path}: two tokens of its vocabulary have the same text")
    if kind == "gpt2":
        model, steps = _byte_level(file, pieces)
    elif kind == "llama":
        model, steps = _sentence_pieces(file, pieces)
    else:
        raise ConchError(
            f"{file.path} has a tokenizer of the kind {kind!r}, not gpt2 (byte-level BPE) or llama "
            "(SentencePiece): use the model's own folder"
        )
    special = _special(file, pieces)
    begins = file.get("tokenizer.ggml.add_bos_token", bool, kind == "llama")
    ends = file.get("tokenizer.ggml.add_eos_token", bool, False)
    around = {"bos_token": begins, "eos_token": ends}
    if missing := [name for name, wanted in around.items() if wanted and name not in special]:
        raise ConchError(f"{file.path} puts {missing[0]} around a text and does not say which")
    tokens = {name: special[name] for name, wanted in around.items() if wanted}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "clean_up_tokenization_spaces": False,
    }
    if template := file.get("tokenizer.chat_template", str, ""):
        settings["chat_template"] = template
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(file, pieces),
        "post_processor": _around(tokens, pieces) if tokens else None,
        **steps,
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            **model,
        },
    }
    return {"tokenizer.json": document, "tokenizer_config.json": settings}


def _special(file: GgufFile, pieces: list[str]) -> dict[str, str]:
    """The tokens with a role, by transformers' names."""
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {}
    for name, key in keys.items():
        number = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < len(pieces):
            raise ConchError(f"{file.path}: {key}_token_id is {number!r}, which is no token's")
        found[name] = pieces[number]
    return found


def _types(file: GgufFile, pieces: list[str]) -> list[int]:
    types = file.metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return [1] * len(pieces)
    if getattr(types, "ndim", 0) != 1 or len(types) != len(pieces):
        raise ConchError(f"{file.path} has not one token_type for each of {len(pieces):,} tokens")
    return [int(each) for each in types]


def _added(file: GgufFile, pieces: list[str]) -> list[dict[str, Any]]:
    """The tokens that are found in a text before it is split."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    types = _types(file, pieces)
    return [
        {"id": number, "content": pieces[number], **plain, "special": kind != _USER_DEFINED}
        for number, kind in enumerate(types)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]


def _around(tokens: dict[str, str], pieces: list[str]) -> dict[str, Any]:
    """The post-processor that puts a token before or behind each text."""

    def template(name: str, part: str) -> list[dict[str, Any]]:
        before = [tokens["bos_token"]] if "bos_token" in tokens else []
        behind = [tokens["eos_token"]] if "eos_token" in tokens else []
        number = 0 if part == "A" else 1
        marked = [{"SpecialToken": {"id": each, "type_id": number}} for each in before]
        ended = [{"SpecialToken": {"id": each, "type_id": number}} for each in behind]
        return [*marked, {"Sequence": {"id": part, "type_id": number}}, *ended]

    known = {
        each: {"id": each, "ids": [pieces.index(each)], "tokens": [each]}
        for each in tokens.values()
    }
    return {
        "type": "TemplateProcessing",
        "single": template("single", "A"),
        "pair": [*template("pair", "A"), *template("pair", "B")],
        "special_tokens": known,
    }


def _byte_level(file: GgufFile, pieces: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model and steps of byte-level BPE, whose merges the file lists."""
    name = file.get("tokenizer.ggml.pre", str)
    if name not in SPLITS:
        raise ConchError(
            f"{file.path} splits text the way of {name!r}, which is not known here (known: "
            f"{', '.join(SPLITS)}): use the model's own folder"
        )
    merges = [merge.split(" ") for merge in file.get("tokenizer.ggml.merges", list)]
    known = set(pieces)
    if any(len(pair) != 2 or not {*pair, "".join(pair)} <= known for pair in merges):
        raise ConchError(f"{file.path}: a merge is not of two tokens into one of its vocabulary")
    split = SPLITS[name]
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps: list[dict[str, Any]] = []
    if split == "digits":
        steps.append({"type": "Digits", "individual_digits": True})
    elif split is not None:
        pattern = {"Regex": split}
        steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
    steps.append({**bytes_alone, "use_regex": split in (None, "digits")})
    model = {
        "unk_token": None,
        "fuse_unk": False,
        "byte_fallback": False,
        # Llama 3 takes a whole word that is a token, whatever its merges say.
        "ignore_merges": bool(split and "{1,3}" in split),
        "merges": merges,
    }
    return model, {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {**bytes_alone, "add_prefix_space": True, "use_regex": True},
    }


def _sentence_pieces(file: GgufFile, pieces: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model and steps of SentencePiece's BPE, whose merges follow from its scores."""
    scores = file.metadata.get("tokenizer.ggml.scores")
    if scores is None or getattr(scores, "ndim", 0) != 1 or len(scores) != len(pieces):
        raise ConchError(f"{file.path} has not one score for each of {len(pieces):,} tokens")
    # Only plain pieces come of merges.
    plain = {
        p: n for n, (p, t) in enumerate(zip(pieces, _types(file, pieces), strict=True)) if t == 1
    }
    merges = []
    for piece, number in plain.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [pair for pair in pairs if pair[0] in plain and pair[1] in plain]
        pairs.sort(key=lambda pair: (plain[pair[0]], plain[pair[1]]))
        merges += [(float(scores[number]), pair) for pair in pairs]
    merges.sort(key=lambda merge: -merge[0])
    spaced = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    before: list[dict[str, Any]] = []
    if file.get("tokenizer.ggml.remove_extra_whitespaces", bool, False):
        for pattern, content in ((" {2,}", " "), (r"\A +| +\z", "")):
            before.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": content})
    if spaced:
        before.append({"type": "Prepend", "prepend": _SPACE})
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if spaced else []
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    model = {
        "unk_token": _special(file, pieces).get("unk_token"),
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "merges": [list(pair) for _, pair in merges],
    }
    return model, {
        "normalizer": {"type": "Sequence", "normalizers": [*before, replaced]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *after],
        },
    }
