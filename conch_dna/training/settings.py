"""The settings of a distillation run, and what it comes to.

Defaults and ranges stand only here: the command line, the YAML file and the guide's option table
are made from or compared with these fields. To add an option: a field with its help and range.
"""

from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from conch_dna.errors import ConchError
from conch_dna.options.fields import KIND_WORDS, named_settings, option, option_problem
from conch_dna.training.cross_tokenizer.alignments import ALIGNMENTS, AUTO
from conch_dna.training.distillation import DOMAIN_PROMPTS, domain_system
from conch_dna.training.runs.contradictions import contradictions
from conch_dna.training.runs.on_policy.shares import own_batches

DEFAULT_TEACHER = "mlx-community/Qwen2.5-7B-Instruct-4bit"
TEACHER, STUDENT = "teacher", "student"
# The settings of what both read before a prompt, and what stands for a system prompt in them.
SYSTEMS = {TEACHER: "teacher_system", STUDENT: "student_system"}
NO_SYSTEM, OF_DOMAIN = "none", "domain"
RUNS = "runs"
LOSS_MEMORY = 256.0
# What a run makes for itself beside the adapter's folder; its checkpoints begin alike.
RUN_NAMES = (
    *("answers", "candidate", "data", "own_answers", "rollouts", "run.json", "run.lock"),
    *("run.lock.json", "soft_targets", "teacher", "training_data.jsonl"),
)
CHECKPOINT_PREFIX = "checkpoint_"
# What may be another when a run goes on: how far, and when it reports, evaluates and saves.
MAY_CHANGE = ("num_iters", "steps_per_report", "steps_per_eval", "steps_per_save")
DEFAULT_STUDENT = "mlx-community/Qwen2.5-3B-Instruct-4bit"
# The keys of `losses.LOSSES`, which needs mlx; these settings, and so `--help`, do not.
DIVERGENCES = (
    "forward_kl",
    "jsd",
    "reverse_kl",
    "skewed_kl",
    "skewed_reverse_kl",
    "total_variation",
)

_option = partial(option, between="between {low:,} and {high:,}")
_KIND_WORDS = {**KIND_WORDS, "bool": "a true or false", "str": "a text"}


@dataclass(frozen=True, kw_only=True)
class KDConfig:
    """Everything that shapes a distillation run except the two models and the data.

    Each field is a command-line option of the same name with dashes; `python -m
    conch_dna.training.true_kd --help` and TRUE_KD_README.md list meaning, unit and range.

    Raises:
        ConchError: A value is out of its range; all such values are named at once.
    """

    temperature: float = _option(
        2.0, "Softmax temperature of teacher and student in the KD loss.", low=0.5, high=10
    )
    alpha: float = _option(
        0.7, "Share of the KD loss; the rest is cross-entropy. 0 is fine-tuning.", low=0, high=1
    )
    divergence: str = _option("forward_kl", "Divergence of the KD loss.", choices=DIVERGENCES)
    top_k: int = _option(64, "Teacher tokens kept per position, besides the rest.", low=1)
    targets: str = _option(
        "topk",
        "What a training text's targets are: the likeliest tokens and the rest, or tokens drawn "
        "from the teacher, which are right on average. Held-out figures are always by the former.",
        choices=("topk", "sampled"),
    )
    target_draws: int = _option(
        16, "Tokens drawn from the teacher for each position, with sampled.", low=1, high=1024
    )
    target_bits: int = _option(
        7, "Bits of their log-probabilities on disk; 32 is float32.", low=4, high=8, besides=32
    )
    teacher_tokenizer: str = _option(
        "", "Tokenizer of a teacher behind a URL whose server does not give it: a hub id or folder."
    )
    shard_teacher: bool = _option(
        False, "Share the teacher's weights out among the processes of mlx.launch."
    )
    teacher_system: str = _option(
        "",
        "System prompt that the teacher reads: a text or a file with it, none, or domain for the "
        "domain's own, which is what it reads before prompts anyway.",
    )
    student_system: str = _option(
        "", "The same of the student; with none its adapter learns to do without, and CORTEX too."
    )
    force: bool = _option(False, "Go on where what only the teacher reads is not shown to help it.")
    on_policy: float = _option(
        0.0, "Share of the batches that are the student's own answers.", low=0, high=1
    )
    rollouts: int = _option(
        0,
        "Prompts that it answers in a round, a multiple of the batch; 0 is all, at most 64.",
        low=0,
        high=10**6,
    )
    rollout_tokens: int = _option(128, "Longest answer of its own, in tokens.", low=1)
    rollout_temperature: float = _option(
        1.0, "Temperature of its own answers; 0 is greedy.", low=0, high=10
    )
    rollout_reuse: int = _option(1, "How often each of them is used.", low=1, high=100)
    teacher_ema: float = _option(
        1.0,
        "How much of a teacher that is the student itself stays when it follows the student's "
        "adapter, at each round; 1 is one that does not follow.",
        low=0,
        high=1,
    )
    resident: str = _option(
        "auto",
        "Whether teacher and student are both in memory while the student answers and is scored, "
        "or take turns; auto finds out what fits.",
        choices=("auto", "one", "both"),
    )
    own_answers: int = _option(
        0, "Held-out prompts that it answers before and after, to be measured; -1 is all.", low=-1
    )
    alignment: str = _option(
        AUTO,
        "How a teacher with another tokenizer teaches; auto finds out whether it has one.",
        choices=(AUTO, *ALIGNMENTS),
    )
    soft_weight: float = _option(
        1.0, "Weight of distributions compared across tokenizers, within the KD loss.", low=0
    )
    chunk_weight: float = _option(
        1.0,
        "Weight of likelihoods of chunks compared across tokenizers, within the KD loss.",
        low=0,
    )
    chunk_scale: float = _option(
        100.0, "Scale s of these likelihoods, which are compared as exp(log P / s).", above=0
    )
    lora_rank: int = _option(16, "Rank of the LoRA matrices.", low=1, high=2**16)
    lora_scale: float = _option(10.0, "Factor on the LoRA update, y = Wx + scale(xa)b.", above=0)
    lora_dropout: float = _option(0.0, "Dropout before the LoRA matrices.", low=0, high=0.99)
    lora_keys: str = _option(
        "attention",
        "Which layers get LoRA: 'attention' (q and v), 'all' linear ones, experts too, or names "
        "such as 'self_attn.q_proj' or their ends, such as 'q_proj'; several with commas, such as "
        "'all,model.embed_tokens'.",
    )
    lora_layers: int = _option(-1, "How many of the last layers get LoRA; -1 is all.", low=-1)
    dora: bool = _option(False, "Weight-decomposed LoRA (DoRA).")
    full: bool = _option(False, "Train every weight instead of LoRA layers.")
    learning_rate: float = _option(1e-4, "Peak learning rate of AdamW (--lr is the same).", above=0)
    weight_decay: float = _option(0.01, "Weight decay of AdamW.", low=0)
    max_grad_norm: float = _option(1.0, "Larger gradients are scaled down to this norm.", above=0)
    warmup_iters: int = _option(10, "Steps of linear warm-up of the learning rate.", low=0)
    schedule: str = _option(
        "cosine",
        "The learning rate after the warm-up: a cosine to 0 at the last step, or constant.",
        choices=("cosine", "constant"),
    )
    batch_size: int = _option(4, "Examples per batch.", low=1)
    accumulation_steps: int = _option(
        1, "Batches per optimiser step, weighted by their tokens.", low=1, high=10_000
    )
    num_iters: int = _option(200, "Optimiser steps (--iters is the same).", low=1, high=10**7)
    val_fraction: float = _option(
        0.1, "Share of the data held out, at least one example.", above=0, high=0.5
    )
    val_batches: int = _option(25, "Held-out batches per evaluation; -1 is all.", low=1, besides=-1)
    select_by: str = _option(
        "auto",
        "The held-out figure whose lowest value chooses the step that is kept: kl (to the teacher, "
        "at temperature 1), cross_entropy, kd (the KD loss) or loss; auto is kl, and with alpha 0 "
        "cross_entropy.",
        choices=("auto", "kl", "cross_entropy", "kd", "loss"),
    )
    steps_per_report: int = _option(10, "Steps between reports of the training loss.", low=1)
    steps_per_eval: int = _option(50, "Steps between held-out evaluations.", low=1)
    steps_per_save: int = _option(50, "Steps between checkpoints.", low=1)
    max_seq_length: int = _option(
        2048, "Longest example in tokens; longer ones are never cut, see too_long.", low=2
    )
    too_long: str = _option(
        "refuse",
        "What to do with examples longer than that or than the models' context: stop and name "
        "them, or leave them out and say how many.",
        choices=("refuse", "skip"),
    )
    max_tokens: int = _option(256, "Longest answer the teacher generates, in tokens.", low=1)
    samples_per_prompt: int = _option(
        1, "Answers the teacher gives to each prompt.", low=1, high=1_000
    )
    sampling_temperature: float = _option(
        0.7, "Temperature of the teacher's answers; 0 is greedy.", low=0, high=10
    )
    generation_batch_size: int = _option(16, "Prompts the teacher answers at once.", low=1)
    loss_memory: float = _option(
        LOSS_MEMORY,
        "Megabytes for logits and what is made of them, in losses, targets and evaluation.",
        low=0.1,
        high=10**6,
    )
    grad_checkpoint: bool = _option(
        False, "Recompute activations in the backward pass: less memory, more time."
    )
    train_on_prompt: bool = _option(False, "Prompt tokens count as targets too.")
    seed: int = _option(0, "Seed of sampling, data order, LoRA and dropout.", low=0, high=10**9)
    output_dir: str = _option("models/distilled_neurons", "Folder of all domains' folders.")
    adapter_subdir: str = _option("adapters_kd", "Adapter's folder in its domain's folder.")
    run: str = _option(
        "",
        "Name of this run, to keep several of a domain beside each other: it then lies in "
        "runs/NAME of the output folder, and shares the teacher's answers and targets with them.",
    )
    trust_remote_code: bool = _option(
        False, "Run Python code that comes with a model or tokenizer."
    )

    def __post_init__(self) -> None:
        problems = [p for each in fields(self) if (p := self._problem(each)) is not None]
        # A comparison of values whose types or ranges are wrong would say nothing.
        if problems := problems or contradictions(self):
            raise ConchError("; ".join(problems))

    def _problem(self, each: Any) -> str | None:
        value = getattr(self, each.name)
        problem = option_problem(each, value, kind_words=_KIND_WORDS)
        if problem or each.name not in ("adapter_subdir", "run"):
            return problem
        if is_folder_name(value) or (each.name == "run" and not value):
            return None
        return (
            f"{each.name} is {value!r}: use one plain folder name of up to 64 of a to z, A to Z, "
            f"digits, -, _ and dots that does not begin with a dot or {CHECKPOINT_PREFIX} and is "
            f"none of {', '.join(RUN_NAMES)}"
        )

    @classmethod
    def from_json(
        cls, values: dict[str, Any], *, source: str, overriding: dict[str, Any] | None = None
    ) -> "KDConfig":
        """Make a configuration from a mapping, refusing names that do not exist.

        Args:
            values: Field names to values; `iters` stands for `num_iters`, dashes for underscores.
            source: Where they come from, for the message.
            overriding: Field names to values that win over them.

        Raises:
            ConchError: A name is unknown or given twice, or a value is out of its range.
        """
        known = [each.name for each in fields(cls)]
        named = named_settings(values, known, source=source, aliases={"iters": "num_iters"})
        return cls(**{**named, **(overriding or {})})

    @property
    def selected(self) -> str:
        """What `select_by` comes to: kl, cross_entropy, kd or loss."""
        if self.select_by != "auto":
            return self.select_by
        return "kl" if self.alpha else "cross_entropy"

    def system_of(self, side: str, own: str, domain: str) -> str:
        """The system prompt that the settings come to.

        Args:
            side: `TEACHER` or `STUDENT`.
            own: What it would read anyway: what a record has.
            domain: The domain's; may be empty.

        Raises:
            ConchError: It is to be the domain's, which has none.
        """
        setting = getattr(self, SYSTEMS[side])
        if setting == OF_DOMAIN:
            if not domain:
                raise ConchError(
                    f"{SYSTEMS[side]} is {OF_DOMAIN}, and this domain has no system prompt of its "
                    "own: give a text, or a file with it"
                )
            return domain
        return own if not setting else "" if setting == NO_SYSTEM else str(setting)

    @property
    def own_batches(self) -> int:
        """How many of all batches are the student's own answers, spread evenly over them."""
        return own_batches(self.on_policy, self.num_iters * self.accumulation_steps)

    @property
    def given_batches(self) -> int:
        """How many of all batches are of texts that are there."""
        return self.num_iters * self.accumulation_steps - self.own_batches

    @property
    def examples_read(self) -> int:
        """How many given examples all steps read together, each as often as it is read."""
        return self.given_batches * self.batch_size

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


# What means something else beside domains, in the output folder or to CORTEX.
LINES, EXPERIENCE_FOLDER, EGO = "lines", "experience", "ego"
RESERVED = {
    LINES: "the folder of retrained adapters' versions",
    EXPERIENCE_FOLDER: "the folder of the answers that retraining learns from",
    EGO: "the name of the big teacher in CORTEX",
    RUNS: "the folder of named runs",
}


def is_folder_name(value: object) -> bool:
    """Whether a text can name an adapter's folder or a run: nothing else there is called so."""
    if not isinstance(value, str):
        return False
    plain = value.replace("_", "").replace("-", "").replace(".", "")
    # Case does not tell files apart on every disk.
    taken = value.lower() in RUN_NAMES or value.lower().startswith((CHECKPOINT_PREFIX, "."))
    return plain.isascii() and plain.isalnum() and len(value) <= 64 and not taken


def validate_domain(domain: str, *, with_own_data: bool) -> None:
    """Check a domain's name, which becomes a folder.

    Args:
        domain: One of DOMAIN_PROMPTS, or a new name when the user brings data or prompts.
        with_own_data: Whether the user does.

    Raises:
        ConchError: The name is not a plain one, or reserved, or unknown.
    """
    plain = domain.replace("_", "").replace("-", "")
    if not (plain.isascii() and plain.isalnum() and len(domain) <= 64):
        raise ConchError(
            f"domain {domain!r} becomes a folder's name: use up to 64 of a to z, A to Z, digits, "
            "- and _"
        )
    # Some file systems do not tell capitals from small letters.
    if domain.lower() in RESERVED:
        raise ConchError(
            f"a domain cannot be called {domain}: that is {RESERVED[domain.lower()]}; choose "
            "another name"
        )
    if domain not in DOMAIN_PROMPTS and not with_own_data:
        raise ConchError(
            f"domain {domain!r} is unknown: use one of {', '.join(DOMAIN_PROMPTS)}, or give a new "
            "name its --data or --prompts"
        )


def domain_systems(domain: str, config: KDConfig) -> tuple[str, str]:
    """What teacher and student read before a domain's prompts; empty for nothing."""
    own = domain_system(domain)
    return config.system_of(TEACHER, own, own), config.system_of(STUDENT, own, own)


def domain_folder(domain: str, config: KDConfig) -> Path:
    """The folder that holds everything of one domain's run but what its runs share."""
    return output_folder(config) / domain


def output_folder(config: KDConfig) -> Path:
    """The folder of all domains of one run, which CORTEX takes as its adapters."""
    output = Path(config.output_dir)
    return output / RUNS / config.run if config.run else output


def shared_folder(domain: str, config: KDConfig) -> Path:
    """The folder of the teacher's answers and targets, which all runs of a domain share."""
    return Path(config.output_dir) / domain


def get_kd_adapter_path(domain: str, config: KDConfig | None = None) -> Path:
    """Where the distilled adapter of a domain is (or will be).

    >>> get_kd_adapter_path("thinking").as_posix()
    'models/distilled_neurons/thinking/adapters_kd'
    >>> get_kd_adapter_path("thinking", KDConfig(run="slow")).as_posix()
    'models/distilled_neurons/runs/slow/thinking/adapters_kd'
    """
    config = config or KDConfig()
    return domain_folder(domain, config) / config.adapter_subdir


@dataclass(frozen=True, kw_only=True)
class KDResult:
    """What a distillation came to.

    Attributes:
        domain: Name of the domain.
        num_samples: Examples trained and evaluated on, together.
        adapter_path: Folder that `mlx_lm.load(student, adapter_path=…)` opens.
        final_kd_loss: Held-out KD loss (t² times the divergence, nats per token) of the adapter.
        final_ce_loss: Its held-out cross-entropy, nats per token.
        final_combined_loss: alpha KD + (1 - alpha) CE.
        training_time_seconds: Wall time of the training loop in this process.
        timestamp: End of the run, ISO 8601 with time zone.
        evaluation: `before`, `after`, `teacher` and `gap_closed`; see evaluation.json.
        metadata: Models, digests, versions, seed, best step and more.
    """

    domain: str
    num_samples: int
    adapter_path: str
    final_kd_loss: float
    final_ce_loss: float
    final_combined_loss: float
    training_time_seconds: float
    timestamp: str
    evaluation: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """What the loop needs to know; each default is a sensible one for LoRA.

    Attributes:
        num_iters: Optimiser steps.
        learning_rate: Peak, after the warm-up.
        warmup_iters: Steps of linear warm-up.
        schedule: What follows, "cosine" (to 0 at the last step) or "constant".
        weight_decay: Of AdamW.
        max_grad_norm: Gradients of a larger global norm are scaled down to it.
        accumulation_steps: Batches per optimiser step; tokens are weighted over all of them.
        steps_per_report: Steps between reports of the training loss.
        steps_per_eval: Steps between held-out evaluations.
        steps_per_save: Steps between checkpoints.
        keep_checkpoints: How many of the newest checkpoints stay.
        ema_decay: Of an average of the parameters (see `EMA`) that is evaluated and kept instead
            of them; 0 for none.
        seed: Of dropout.
    """

    num_iters: int
    learning_rate: float
    warmup_iters: int = 0
    schedule: str = "cosine"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    accumulation_steps: int = 1
    steps_per_report: int = 10
    steps_per_eval: int = 50
    steps_per_save: int = 50
    keep_checkpoints: int = 3
    ema_decay: float = 0.0
    seed: int = 0


def trainer_settings(config: KDConfig, **more: Any) -> TrainerSettings:
    """The settings of a run that the loop needs, by their names.

    Args:
        config: See `KDConfig`.
        **more: Fields of TrainerSettings, which win.
    """
    shared = {option.name for option in fields(TrainerSettings)} & {
        option.name for option in fields(KDConfig)
    }
    return TrainerSettings(**{**{name: getattr(config, name) for name in shared}, **more})


@dataclass(kw_only=True)
class TrainingResult:
    """What a run of the loop came to.

    Attributes:
        best_step: The step whose parameters are now in the model.
        best_loss: Its held-out loss per token, by the selecting figure.
        final: Held-out figures per token after the last step.
        last_train: The last reported training row.
        history: Every reported and held-out row, for a plot.
        seconds: Spent in the loop by this process.
        steps_run: Steps taken by this process (fewer than all after a resume).
        skipped_steps: Steps, of all, whose batches had no counted token: they moved nothing.
        extensions: Where the run went on with another number of steps than was planned: at which
            `step`, what was `planned`, `num_iters` since, and what that means, `told` in words.
    """

    best_step: int
    best_loss: float
    final: dict[str, float]
    last_train: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    steps_run: int = 0
    skipped_steps: int = 0
    extensions: list[dict[str, Any]] = field(default_factory=list)
