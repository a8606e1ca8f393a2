"""Will a run fit: its memory by part and by phase, and its time, from the models' configurations.

Knows which models are in memory in which phase of `runs.domain_run`, and this machine's memory.
To add a phase: its cost in phases.py, and a line in `estimate_run`.
"""

import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from conch_dna.errors import ConchError, one_line
from conch_dna.language_model import LanguageModel, ModelSource, named_arrays
from conch_dna.loading.output_head import rows_at_once
from conch_dna.training.adapters import make_trainable, trained_tensors
from conch_dna.training.batches import COUNTED_MULTIPLE, LENGTH_MULTIPLE, round_up
from conch_dna.training.data.answers import SAMPLES
from conch_dna.training.data.beginnings import can_share
from conch_dna.training.fit.phases import (
    CACHE_STEP,
    batch_arrays,
    decode_cost,
    heldout_cost,
    outlined,
    prefill_cost,
    step_cost,
    targets_cost,
)
from conch_dna.training.fit.workload import Workload
from conch_dna.training.settings import KDConfig

# With both models above this share of the memory there is too little left for a step.
SHARE_FOR_WEIGHTS = 0.5
# A run above this share of the memory is called tight: the system and other programs need some.
ROOMY = 0.8
FITS = "fits"
TIGHT = "tight"
DOES_NOT_FIT = "does not fit"
# What MLX and a model's code raise where a graph cannot be made.
_UNTOLD = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run would take.

    Attributes:
        parts: Bytes by part; None for what is not known.
        phases: Peak bytes by phase; None for what is not known.
        seconds: Time by phase on this machine; empty where nothing was timed.
        unknown: What could not be told, and why.
    """

    parts: dict[str, int | None]
    phases: dict[str, int | None]
    seconds: dict[str, float]
    unknown: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int | None:
        """The highest peak of the phases that are known; None if none is."""
        return max((peak for peak in self.phases.values() if peak is not None), default=None)

    @property
    def highest(self) -> str:
        """The phase that has it."""
        return max(self.phases, key=lambda name: self.phases[name] or 0)

    def verdict(self, memory_bytes: int) -> str:
        """Whether it fits into so much memory: FITS, TIGHT or DOES_NOT_FIT."""
        peak = self.peak_bytes or 0
        if peak > memory_bytes:
            return DOES_NOT_FIT
        return TIGHT if peak > ROOMY * memory_bytes else FITS

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What this machine reached in a short measurement.

    Attributes:
        flops_per_s: Floating-point operations a second of matrix products.
        bytes_per_s: Bytes a second that an addition read and wrote.
    """

    flops_per_s: float
    bytes_per_s: float


def machine_memory() -> tuple[int, str]:
    """Bytes that models may take here, and what they are called.

    On a Mac this is what Metal recommends; else the physical memory, or a container's share of it.
    """
    info = mx.device_info()
    if recommended := info.get("max_recommended_working_set_size"):
        return int(recommended), "recommended by Metal"
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        return min(physical, int(text)), "of this container"
    return physical, "of this machine"


def measured_speed(model: LanguageModel) -> Speed:
    """Time a product like those of a model, and an addition; under a second."""
    modules = model.model.layers[0].modules()
    quantized = next((module for module in modules if hasattr(module, "bits")), None)
    dtype = next(
        a.dtype
        for a in named_arrays(model.model.parameters()).values()
        if mx.issubdtype(a.dtype, mx.floating)
    )
    size = 1024
    left, right = (mx.random.normal((size, size)).astype(dtype) for _ in range(2))
    if quantized is None:
        rate = _rate(lambda: left @ right, 2 * size**3)
    else:
        how = {name: getattr(quantized, name) for name in ("group_size", "bits", "mode")}
        packed: Any = mx.quantize(right, **how)
        rows = left[:64]
        rate = _rate(lambda: mx.quantized_matmul(rows, *packed, **how), 2 * 64 * size**2)
    large = mx.zeros(2**23)
    return Speed(flops_per_s=rate, bytes_per_s=_rate(lambda: large + 1, 2 * large.nbytes))


def _rate(work: Any, amount: int) -> float:
    """Amount a second of some work, by repeating it for a fifth of a second."""
    mx.eval(work())
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < 0.2:
        mx.eval(work())
        done += 1
    return done * amount / (time.perf_counter() - began)


class _Phases:
    """The estimate as it grows; what fails is noted, not lost."""

    def __init__(self) -> None:
        self.parts: dict[str, int | None] = {}
        self.phases: dict[str, int | None] = {}
        self.seconds: dict[str, float] = {}
        self.unknown: list[str] = []

    def lacking(self, what: str, error: Exception) -> None:
        """Note that a phase cannot be told."""
        self.phases.setdefault(what, None)
        self.unknown.append(f"{what}: {one_line(error)}")


def estimate_run(
    teacher: ModelSource,
    student: ModelSource,
    config: KDConfig,
    work: Workload,
    *,
    time_it: bool = False,
) -> Estimate:
    """What a run would take, phase by phase.

    Teacher and student are in memory together only where the student's own answers are scored.

    Args:
        teacher: Its config.json is enough.
        student: The same.
        config: Of the run.
        work: How much text, how long.
        time_it: Measure this machine's speed too, and tell the time.
    """
    found = _Phases()
    teach = None if teacher.is_far else _outlined(teacher, "teacher", found)
    learn = _outlined(student, "student", found)
    if teacher.is_far:
        found.unknown.append("the teacher's time: it is elsewhere")
    if teach is not None:
        speed = measured_speed(teach) if time_it else None
        _teacher_phases(found, teach, config, work, speed)
    if learn is not None:
        speed = measured_speed(learn) if time_it else None
        _student_phases(found, learn, config, work, speed)
    if config.on_policy and teach is not None and learn is not None:
        _own_answers(found, teach, learn, config)
    return Estimate(
        parts=found.parts,
        phases=found.phases,
        seconds=found.seconds,
        unknown=tuple(found.unknown),
    )


def remedies(
    teacher: ModelSource,
    student: ModelSource,
    config: KDConfig,
    work: Workload,
    memory_bytes: int,
) -> str:
    """What to try where a run does not fit well: options, one more until it fits.

    Returns:
        The options and the peak with them, or that other models are needed.
    """
    changed, options = config, list[str]()
    for option, change in (
        ("--grad-checkpoint", {"grad_checkpoint": True}),
        ("--generation-batch-size 4", {"generation_batch_size": 4}),
        ("--batch-size 1", {"batch_size": 1}),
        ("--max-seq-length 512 --max-tokens 256", {"max_seq_length": 512, "max_tokens": 256}),
    ):
        smaller: dict[str, Any] = {
            name: value if value is True else min(value, getattr(config, name))
            for name, value in change.items()
        }
        if all(getattr(changed, name) == value for name, value in smaller.items()):
            continue
        changed, options = replace(changed, **smaller), [*options, option]
        estimate = estimate_run(teacher, student, changed, work.within(config, changed))
        if estimate.verdict(memory_bytes) == FITS:
            return f"try {' '.join(options)}: {(estimate.peak_bytes or 0) / 1e9:.2f} GB"
    return "use smaller models, or such in 4 bits: no smaller batch or length is enough"


def _outlined(source: ModelSource, role: str, found: _Phases) -> LanguageModel | None:
    try:
        model = outlined(source)
    except (ConchError, *_UNTOLD) as error:
        found.lacking(f"all phases of the {role}", error)
        return None
    if model is None:
        found.unknown.append(f"all phases of the {role}: its own code is not here yet")
        return None
    found.parts[f"{role}'s weights"] = bytes_of_weights(model)
    return model


def bytes_of_weights(model: LanguageModel) -> int:
    """Bytes of a model's arrays, whether they are computed or only known by shape."""
    return sum(array.nbytes for array in named_arrays(model.model.parameters()).values())


def _teacher_phases(
    found: _Phases, model: LanguageModel, config: KDConfig, work: Workload, speed: Speed | None
) -> None:
    weights = bytes_of_weights(model)
    # What is computed once takes less time; the peaks are told as if it were not.
    shared = work.shared if can_share(model.model) else 0
    samples = _answers(model, min(SAMPLES, work.heldout), work, config)
    if work.prompts:
        size = min(config.generation_batch_size, work.prompts)
        peak, cache, batch_s = _answers(model, size, work, config, speed, shared=shared)
        found.parts[f"KV cache of {size} answers at once"] = cache
        found.phases["the teacher answers"] = weights + peak
        if speed:
            found.seconds["the teacher answers"] = batch_s * -(-work.prompts // size)
    try:
        arrays = _batch(work.teacher_longest, work.teacher_counted, config)
        cost = targets_cost(model, arrays, config)
    except _UNTOLD as error:
        found.lacking("the teacher's targets", error)
        return
    found.phases["the teacher's targets"] = weights + max(cost.peak_bytes, samples[0])
    if speed:
        if shared:
            own = _batch(max(2, work.teacher_longest - shared), work.teacher_counted, config)
            cost = targets_cost(model, own, config)
        batches = work.examples / config.batch_size * work.mean_share
        found.seconds["the teacher's targets"] = batches * _seconds(cost, speed)


def _student_phases(
    found: _Phases, model: LanguageModel, config: KDConfig, work: Workload, speed: Speed | None
) -> None:
    weights = bytes_of_weights(model)
    arrays = _batch(work.longest, work.counted, config)
    try:
        few = min(config.batch_size, work.heldout)
        counted = -(-work.counted * few // config.batch_size)
        heldout = heldout_cost(model, _batch(work.longest, counted, config, few), config)
        peak, _, sample_s = _answers(model, min(SAMPLES, work.heldout), work, config, speed)
    except _UNTOLD as error:
        found.lacking("evaluation", error)
        heldout = None
    make_trainable(model, config, compute=False)
    trained = sum(array.nbytes for array in trained_tensors(model).values())
    own = trained if not config.full else 0
    found.parts["adapter, gradients, AdamW's moments"] = own + 3 * trained
    costs = {}
    for checkpointed in (False, True):
        how = "with --grad-checkpoint" if checkpointed else "without --grad-checkpoint"
        name = f"activations and loss of a step {how}"
        try:
            settings = replace(config, grad_checkpoint=checkpointed)
            costs[checkpointed] = step_cost(model, arrays, settings)
            # The new parameters and moments are there beside the old ones when a step ends.
            found.parts[name] = max(0, costs[checkpointed].peak_bytes - 3 * trained)
        except _UNTOLD as error:
            found.parts[name] = None
            found.lacking(name, error)
            found.phases.pop(name)
    rows = rows_at_once(config.loss_memory, model.vocabulary_size)
    chunk = min(rows, len(arrays["labels"]))
    found.parts["logits of a chunk of the loss"] = 4 * chunk * model.vocabulary_size
    if (step := costs.get(config.grad_checkpoint)) is None:
        found.phases["training"] = None
    else:
        # Two moments, and the best parameters so far.
        found.phases["training"] = weights + own + 3 * trained + step.peak_bytes
    if heldout is not None:
        found.phases["evaluation"] = weights + own + max(heldout.peak_bytes, peak)
    if speed and step is not None and heldout is not None:
        batches = config.num_iters * config.accumulation_steps * work.mean_share
        of_heldout = work.heldout / config.batch_size * work.mean_share * _seconds(heldout, speed)
        evaluations = 1 + -(-config.num_iters // config.steps_per_eval)
        found.seconds["training"] = batches * _seconds(step, speed) + evaluations * of_heldout
        found.seconds["evaluation"] = 2 * (of_heldout + sample_s)


def _own_answers(
    found: _Phases, teacher: LanguageModel, student: LanguageModel, config: KDConfig
) -> None:
    """What it takes to draw answers in training and to score them; their time is not told."""
    of_teacher, of_student = bytes_of_weights(teacher), bytes_of_weights(student)
    training, targets = found.phases.get("training"), found.phases.get("the teacher's targets")
    name = "the teacher scores the student's own answers"
    if training is None or targets is None:
        found.lacking(name, ConchError("a phase that it begins from is not known"))
        return
    trained = found.parts["adapter, gradients, AdamW's moments"] or 0
    if teacher.model_id == student.model_id:
        # In memory once, besides what its trained values were.
        found.phases[name] = targets + trained + (of_student if config.full else 0)
        return
    memory, _ = machine_memory()
    if takes_turns(of_teacher + of_student, memory, config):
        found.phases[name] = targets + trained
    else:
        found.phases[name] = targets + of_student + trained
        found.phases["training"] = training + of_teacher


def takes_turns(together: int, memory_bytes: int, config: KDConfig) -> bool:
    """Whether teacher and student take turns in memory where its own answers are scored.

    Args:
        together: Bytes of the weights of both.
        memory_bytes: Of the machine.
        config: `resident` and `full`.
    """
    if config.resident != "auto":
        return config.resident == "one"
    return together > SHARE_FOR_WEIGHTS * memory_bytes and not config.full


def _batch(
    longest: int, counted: int, config: KDConfig, size: int | None = None
) -> dict[str, mx.array]:
    tokens = round_up(max(1, longest - 1), LENGTH_MULTIPLE)
    counted = round_up(counted, COUNTED_MULTIPLE)
    return batch_arrays(size or config.batch_size, tokens, counted, config.top_k)


def _answers(
    model: LanguageModel,
    size: int,
    work: Workload,
    config: KDConfig,
    speed: Speed | None = None,
    *,
    shared: int = 0,
) -> tuple[int, int, float]:
    """Peak of answering a batch beside the weights, bytes of its cache at the end, and seconds."""
    prompt, end = work.longest_prompt, work.longest_prompt + config.max_tokens
    prefill = prefill_cost(model, size, prompt)
    # The cache is copied where it grows, for the last time here.
    grown = max(prompt - 1, (end - 1) // CACHE_STEP * CACHE_STEP)
    decode, before = decode_cost(model, size, grown)
    _, cache = decode_cost(model, size, end - 1)
    # The log-probabilities of the token before are still there.
    peak = max(prefill.peak_bytes, before + decode.peak_bytes)
    seconds = 0.0
    if speed:
        if shared:
            prefill = prefill_cost(model, size, max(1, prompt - shared))
        seconds = _seconds(prefill, speed) + config.max_tokens * _seconds(decode, speed)
    return peak, cache, seconds


def _seconds(cost: Any, speed: Speed) -> float:
    return float(cost.seconds(speed.flops_per_s, speed.bytes_per_s))
