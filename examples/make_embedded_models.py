"""Make the embedded pair: two tiny story models with one tokenizer, trained from scratch.

Knows nothing of distillation: it samples stories, trains on text files, writes mlx-lm folders.
To add a model: an entry in RECIPES, which makes it `embedded:<name>`.
"""

import conch_dna  # isort: skip  loads the fast BLAS, which has to come before mlx

import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.generate import generate
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import load
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from conch_dna.errors import ConchError
from conch_dna.training.batches import (
    Batch,
    Example,
    ExampleBatches,
    collate,
    sequential_batches,
)
from conch_dna.training.head_loss import cross_entropy_sums
from conch_dna.training.trainer import Trainer, TrainerSettings

ASSETS = Path(conch_dna.__file__).parent / "assets"
END_OF_TEXT = "<|endoftext|>"
MOST_TOKENS = 512
STORIES_PER_BATCH = 4
MOST_UNKNOWN_WORDS = 1
FEWEST_CHARACTERS = 200

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 3,
    "vocab_size": 1536,
    "max_position_embeddings": MOST_TOKENS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}
# Few layers and heads, but wide ones: on a CPU exponentials cost more than products.
TEACHER = {"hidden_size": 224, "intermediate_size": 600, "head_dim": 56}
STUDENT = {"hidden_size": 96, "intermediate_size": 288, "head_dim": 48}
RECIPES: dict[str, dict[str, Any]] = {
    "teacher": {
        "config": {**CONFIG, **TEACHER, "num_attention_heads": 4, "num_key_value_heads": 2},
        "steps": 2500,
    },
    "student": {
        "config": {**CONFIG, **STUDENT, "num_attention_heads": 2, "num_key_value_heads": 1},
        "steps": 1000,
    },
}


class StorySampler:
    """Samples many texts at once from a Llama model with tied embeddings, in NumPy.

    NumPy's exponential is vectorised on x86 and MLX's isn't, so this is several times faster
    there. A stream never stops: after the end of a text it begins the next one.

    Args:
        folder: The model's mlx-lm folder.
        streams: Texts in progress at any time.
        window: Tokens that attention sees; older ones are forgotten.
        temperature: Of the sampling.
    """

    def __init__(self, folder: Path, *, streams: int, window: int, temperature: float) -> None:
        model, self.tokenizer = load(str(folder))[:2]
        self.args = model.args
        self.streams, self.window, self.temperature = streams, window, temperature
        self.embedding = np.array(model.model.embed_tokens.weight)
        self.norm = np.array(model.model.norm.weight)

        def transposed(*modules: Any) -> np.ndarray:
            return np.concatenate([np.array(module.weight).T for module in modules], axis=1)

        self.layers = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.layers.append(
                {
                    "attention_norm": np.array(layer.input_layernorm.weight),
                    "qkv": transposed(attention.q_proj, attention.k_proj, attention.v_proj),
                    "out": transposed(attention.o_proj),
                    "mlp_norm": np.array(layer.post_attention_layernorm.weight),
                    "gate_up": transposed(mlp.gate_proj, mlp.up_proj),
                    "down": transposed(mlp.down_proj),
                }
            )

    def texts(self, steps: int, random: np.random.Generator) -> list[str]:
        """The whole texts among the first `steps` tokens of every stream."""
        args = self.args
        cache = (len(self.layers), self.streams, args.num_key_value_heads)
        keys = np.zeros((*cache, args.head_dim, self.window), np.float32)
        values = np.zeros((*cache, self.window, args.head_dim), np.float32)
        ids = np.full(self.streams, self.tokenizer.bos_token_id)
        history = np.empty((steps, self.streams), np.int32)
        for step in range(steps):
            logits = self._logits(ids, step, keys, values) / np.float32(self.temperature)
            weights = np.exp(logits - logits.max(-1, keepdims=True)).cumsum(-1)
            draws = random.random((self.streams, 1), dtype=np.float32) * weights[:, -1:]
            ids = np.minimum((weights < draws).sum(-1), weights.shape[-1] - 1)
            history[step] = ids
        found = []
        for stream in history.T:
            start = 0
            for end in np.flatnonzero(np.isin(stream, list(self.tokenizer.eos_token_ids))):
                found.append(self.tokenizer.decode(stream[start:end].tolist()).strip())
                start = end + 1
        return found

    def _logits(
        self, ids: np.ndarray, step: int, keys: np.ndarray, values: np.ndarray
    ) -> np.ndarray:
        """Next-token logits `[streams, V]`; writes this step into the caches."""
        size, heads = self.args.head_dim, self.args.num_attention_heads
        groups = self.args.num_key_value_heads
        slot, seen = step % self.window, min(step + 1, self.window)
        hidden = self.embedding[ids]
        for index, layer in enumerate(self.layers):
            qkv = self._normalised(hidden, layer["attention_norm"]) @ layer["qkv"]
            query, key, value = np.split(
                qkv.reshape(self.streams, -1, size), [heads, heads + groups], axis=1
            )
            keys[index, ..., slot] = self._rotated(key, step)
            values[index, :, :, slot] = value
            query = self._rotated(query, step) * np.float32(size**-0.5)
            scores = query.reshape(self.streams, groups, -1, size) @ keys[index, ..., :seen]
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = weights @ values[index, :, :, :seen] / weights.sum(-1, keepdims=True)
            hidden = hidden + mixed.reshape(self.streams, -1) @ layer["out"]
            gate_up = self._normalised(hidden, layer["mlp_norm"]) @ layer["gate_up"]
            gate, up = np.split(gate_up, 2, axis=-1)
            hidden = hidden + gate / (1 + np.exp(-gate)) * up @ layer["down"]
        return self._normalised(hidden, self.norm) @ self.embedding.T

    def _normalised(self, hidden: np.ndarray, weight: np.ndarray) -> np.ndarray:
        mean_square = (hidden * hidden).mean(-1, keepdims=True)
        return hidden / np.sqrt(mean_square + np.float32(self.args.rms_norm_eps)) * weight

    def _rotated(self, vectors: np.ndarray, position: int) -> np.ndarray:
        half = self.args.head_dim // 2
        angle = position * self.args.rope_theta ** (-np.arange(half) / half)
        cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        first, second = vectors[..., :half], vectors[..., half:]
        return np.concatenate(
            [first * cosine - second * sine, first * sine + second * cosine], axis=-1
        )


def words(text: str) -> list[str]:
    """The lower-cased words of a text."""
    return re.findall(r"[a-z]+", text.lower())


def read_texts(paths: tuple[Path, ...]) -> list[str]:
    """Texts of .jsonl files (field "text"), .txt files (one text each) and folders of them."""
    texts: list[str] = []
    for path in paths:
        if path.is_dir():
            texts += read_texts(tuple(sorted(path.iterdir())))
        elif path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            texts += [json.loads(line)["text"] for line in lines]
        elif path.suffix == ".txt":
            texts.append(path.read_text(encoding="utf-8"))
    return [text for text in texts if text.strip()]


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE trained on the texts; id 0 is the end of text, and nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def examples_of(texts: list[str], tokenizer: Tokenizer) -> list[Example]:
    """A text's tokens and the end of text, at most 512; the first is all that doesn't count."""
    examples = []
    for number, encoding in enumerate(tokenizer.encode_batch(texts)):
        ids = np.array([*encoding.ids, CONFIG["eos_token_id"]][:MOST_TOKENS], np.int32)
        examples.append(Example(ids, np.arange(len(ids)) > 0, f"text {number}"))
    return examples


def heldout_batches(texts: list[str], tokenizer: Tokenizer, limit: int = -1) -> list[Batch]:
    """The texts in batches of similar length; at most `limit` batches if it isn't -1."""
    examples = examples_of(texts, tokenizer)
    batches = sequential_batches(examples, STORIES_PER_BATCH, limit)
    return [collate([examples[index] for index in indices]) for indices in batches]


def new_model(config: dict[str, Any], seed: int) -> Model:
    """A model with seeded normal weights; what adds to the residual stream starts smaller."""
    model = Model(ModelArgs.from_dict(config))
    keys = iter(mx.random.split(mx.random.key(seed), 1000))

    def drawn(name: str, value: mx.array) -> mx.array:
        if value.ndim == 1:
            return mx.ones_like(value)
        scale = 0.7 * value.shape[1] ** -0.5
        if "o_proj" in name or "down_proj" in name:
            scale *= (2 * config["num_hidden_layers"]) ** -0.5
        return scale * mx.random.normal(value.shape, key=next(keys))

    model.update(tree_map_with_path(drawn, model.parameters()))
    return model


def parameter_count(model: Model) -> int:
    """How many numbers the model has learnt; the tied embedding counts once."""
    return sum(value.size for _, value in tree_flatten(model.parameters()))


def save_model(folder: Path, model: Model, config: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Write an mlx-lm folder beside `folder`, then put it in its place."""
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(new / "model.safetensors"), weights, {"format": "mlx"})
    tokenizer.save(str(new / "tokenizer.json"))
    documents: dict[str, dict[str, Any]] = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": config["eos_token_id"], "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": END_OF_TEXT,
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": MOST_TOKENS,
        },
    }
    for name, document in documents.items():
        (new / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


existing = click.Path(exists=True, path_type=Path)
anywhere = click.Path(path_type=Path)


@click.group(context_settings={"show_default": True})
def main() -> None:
    """Make the embedded teacher and student: sample stories, train, measure."""


@main.command()
@click.argument("model", type=existing)
@click.argument("output", type=anywhere)
@click.option("--words-of", type=existing, required=True, help="Texts whose words are known.")
@click.option("--rounds", default=30, help="Files to make, one a round.")
@click.option("--streams", default=48, help="Texts in progress at a time.")
@click.option("--steps", default=2000, help="Tokens per stream and round.")
@click.option("--window", default=256, help="Tokens that attention sees.")
@click.option("--temperature", default=0.8, help="Of the sampling.")
@click.option("--seed", default=0, help="Of the sampling.")
def sample(model: Path, output: Path, words_of: Path, rounds: int, **options: Any) -> None:
    """Sample stories from the Llama model in folder MODEL into folder OUTPUT.

    Keeps stories of at least 200 characters that begin and end like a sentence and have at most
    one word that --words-of lacks. A round whose file exists is skipped: a stopped run goes on.
    """
    known = {word for text in read_texts((words_of,)) for word in words(text)}
    seed, steps = options.pop("seed"), options.pop("steps")
    sampler = StorySampler(model, **options)
    output.mkdir(parents=True, exist_ok=True)
    for number in range(rounds):
        path = output / f"round_{number:04d}.jsonl"
        if path.exists():
            continue
        began = time.perf_counter()
        stories = sampler.texts(steps, np.random.default_rng([seed, number]))
        kept = [
            story
            for story in stories
            if len(story) >= FEWEST_CHARACTERS
            and story[0].isupper()
            and story[-1] in '.!?"'
            and sum(word not in known for word in words(story)) <= MOST_UNKNOWN_WORDS
        ]
        lines = [json.dumps({"text": story}, ensure_ascii=False) + "\n" for story in kept]
        partial = path.with_suffix(".part")
        partial.write_text("".join(lines), encoding="utf-8")
        partial.rename(path)
        seconds = time.perf_counter() - began
        click.echo(f"{path.name}: kept {len(kept)} of {len(stories)} stories, {seconds:.0f} s")


@main.command()
@click.argument("name", type=click.Choice(list(RECIPES)))
@click.argument("texts", type=existing, nargs=-1, required=True)
@click.option("--heldout", type=existing, required=True, help="Texts that are never trained on.")
@click.option("--run", type=anywhere, required=True, help="Folder for checkpoints.")
@click.option("--output", type=anywhere, help="Model folder.  [default: conch_dna/assets/NAME]")
@click.option("--first-weight", default=5, help="How often an epoch has the first of TEXTS.")
@click.option("--steps", type=int, help="Optimiser steps.  [default: the recipe's]")
@click.option("--learning-rate", default=2e-3, help="Peak.")
@click.option("--seed", default=0, help="Of first weights and order.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint.")
def train(
    name: str,
    texts: tuple[Path, ...],
    heldout: Path,
    run: Path,
    output: Path | None,
    first_weight: int,
    steps: int | None,
    learning_rate: float,
    seed: int,
    resume: bool,
) -> None:
    """Train the model NAME on the files or folders TEXTS.

    The first of TEXTS also makes the tokenizer, so it must be the same for both models.
    """
    config, steps = RECIPES[name]["config"], steps or RECIPES[name]["steps"]
    first = read_texts(texts[:1])
    tokenizer = make_tokenizer(first)
    examples = examples_of(first * first_weight + read_texts(texts[1:]), tokenizer)
    stream = ExampleBatches(examples, STORIES_PER_BATCH, seed=seed)
    settings = TrainerSettings(
        num_iters=steps,
        learning_rate=learning_rate,
        warmup_iters=min(100, steps // 10),
        weight_decay=0.1,
        steps_per_report=50,
        steps_per_eval=200,
        steps_per_save=200,
        keep_checkpoints=2,
        seed=seed,
    )
    model = new_model(config, seed)
    click.echo(f"{name}: {parameter_count(model):,} parameters, {len(examples):,} texts an epoch")

    def report(event: str, row: dict[str, Any]) -> None:
        if event != "step":
            figures = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            click.echo(f"{event} {figures}")

    check = heldout_batches(read_texts((heldout,)), tokenizer, limit=12)
    trainer = Trainer(model, cross_entropy_sums, stream, check, settings, run, report=report)
    result = trainer.run(resume=resume)
    save_model(output or ASSETS / name, model, config, tokenizer)
    seen = sum(stream.batch(index).count for index in range(steps))
    click.echo(f"{seen:,} tokens seen, {result.seconds:.0f} s in this process")


@main.command()
@click.argument("heldout", type=existing)
@click.option("--teacher", type=existing, default=ASSETS / "teacher", help="Model folder.")
@click.option("--student", type=existing, default=ASSETS / "student", help="Model folder.")
@click.option("--prompt", default="Once upon a time", help="Both models continue it.")
def measure(heldout: Path, teacher: Path, student: Path, prompt: str) -> None:
    """Print both models' cross-entropy on HELDOUT, their agreement, and a greedy story of each."""
    vocabulary = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    batches = heldout_batches(read_texts((heldout,)), vocabulary)
    tokens = sum(batch.count for batch in batches)
    choices: list[np.ndarray] = []
    for folder in (teacher, student):
        model, tokenizer = load(str(folder))[:2]
        loss, chosen = 0.0, []
        for batch in batches:
            arrays = {name: mx.array(value) for name, value in batch.arrays.items()}
            loss += cross_entropy_sums(model, arrays)["loss"].item()
            best = model(arrays["inputs"]).argmax(-1).reshape(-1)[arrays["positions"]]
            chosen.append(np.array(best)[: batch.count])
        choices.append(np.concatenate(chosen))
        click.echo(
            f"{folder.name}: {parameter_count(model):,} parameters, {loss / tokens:.4f} nats per "
            f"token\n{prompt}{generate(model, tokenizer, prompt, max_tokens=400)}\n"
        )
    agreed = (choices[0] == choices[1]).mean()
    click.echo(f"{tokens:,} held-out tokens, top-1 agreement {agreed:.4f}")


if __name__ == "__main__":
    try:
        main()
    except ConchError as error:
        sys.exit(f"Error: {error}")
