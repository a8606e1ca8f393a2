"""Small tokenizers made on the spot, as folders that `make_model_folder(tokenizer=…)` takes."""

import json
import re
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SPACE = "\u2581"
SENTENCES = (
    "Once upon a time there was a little cat who was very happy. The big dog saw the cat and ran "
    "to the park. They played with the red ball, and then they went home. It is a small bird."
)
CHARACTERS = SPACE + string.ascii_letters + string.digits + ".,!?'\":;-()[]/"


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, *, chat_template: str | None = None, **names: str
) -> Path:
    """Write a tokenizer and the little of a configuration that a model folder takes from it.

    Args:
        folder: Where to.
        tokenizer: Of the tokenizers library.
        chat_template: Jinja text.
        **names: bos_token, eos_token, unk_token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    end = tokenizer.token_to_id(names["eos_token"]) if "eos_token" in names else None
    config = {"model_type": "llama", "eos_token_id": end}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tokenizer_with_marker(source: Path, folder: Path, marker: str) -> Path:
    """A tokenizer with one special token more than another has, as fine-tuners add them.

    Args:
        source: Folder of the other.
        folder: Where to.
        marker: The new token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    whole = json.loads((folder / "tokenizer.json").read_text())
    count = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    whole["added_tokens"].append(
        {**whole["added_tokens"][0], "id": count, "content": marker, "special": True}
    )
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    return folder


def character_tokenizer(
    folder: Path, *, byte_fallback: bool = True, chat_template: str | None = None
) -> Path:
    """Characters as SentencePiece writes them, with a space put in front and bytes for the rest.

    Without the bytes every other character becomes <unk>.
    """
    tokens = ["<unk>", "<s>", "</s>"]
    tokens += [f"<0x{value:02X}>" for value in range(256)] if byte_fallback else []
    tokens += CHARACTERS
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=byte_fallback)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return write_tokenizer(folder, tokenizer, chat_template=chat_template, **names)


def byte_level_tokenizer(
    folder: Path,
    texts: Iterable[str] = (SENTENCES,),
    *,
    size: int = 330,
    chat_template: str | None = None,
) -> Path:
    """Byte-level BPE as GPT-2 has it, trained on the spot; it spells every text.

    Args:
        folder: Where to.
        texts: To train on.
        size: Most tokens; 256 bytes and the end of a text are among them.
        chat_template: Jinja text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return write_tokenizer(
        folder, tokenizer, chat_template=chat_template, eos_token="<|endoftext|>"
    )


def wordpiece_tokenizer(folder: Path, *, chat_template: str | None = None) -> Path:
    """WordPiece as BERT has it: words, and characters of which ## ones go on with a word.

    Punctuation is a word of its own, and what it cannot spell becomes [UNK].
    """
    special = ["[UNK]", "[CLS]", "[SEP]"]
    words = dict.fromkeys(re.findall("[A-Za-z]+", SENTENCES))
    tokens = dict.fromkeys([*special, *CHARACTERS[1:], *(f"##{c}" for c in CHARACTERS[1:]), *words])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 1)]
    )
    names = {"bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "[UNK]"}
    return write_tokenizer(folder, tokenizer, chat_template=chat_template, **names)
