"""EGO and CORTEX offline: two domains distilled, asked, calibrated, corrected and retrained.

Runs on the embedded pair in a minute or two on a CPU. Run it: python examples/cortex.py [FOLDER].
To try it on texts of your own: replace the two functions that make them.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from conch_dna.cortex.calibration.calibrating import calibrate_domain
from conch_dna.cortex.calibration.settings import CalibrationSettings
from conch_dna.cortex.neuron import CortexSuite, create_cortex_suite
from conch_dna.generations.promotion import GateSettings
from conch_dna.generations.settings import EvolveConfig
from conch_dna.retraining.pipeline import TrainingPipeline
from conch_dna.training.settings import KDConfig
from conch_dna.training.true_kd import TrueKnowledgeDistiller

TEACHER, STUDENT = "embedded:teacher", "embedded:student"
NAMES = ("Tom", "Sue", "Ben", "Mia", "Sam", "Lily")
THINGS = ("ball", "cat", "hat", "dog", "car", "cup")
QUESTION = "Sue found a hat. What does Sue have?"
DEEDS = ("ran", "sat", "had", "saw", "hid", "ate")
STEPS = 40


def tales() -> list[dict[str, str]]:
    """What the first domain learns."""
    return [
        {
            "prompt": f"Once upon a time, {name}",
            "completion": f" had a little {thing}. {name} took the {thing} to the park.",
        }
        for name in NAMES
        for thing in THINGS
    ]


def questions(*, better: bool) -> list[dict[str, str]]:
    """What the second domain learns; `better` is how it should have been put."""
    return [
        {
            "prompt": f"{name} found a {thing}. What does {name} have?",
            "completion": f" It is a {thing}." if better else f" {name} has a {thing}.",
        }
        for name in NAMES
        for thing in THINGS
    ]


def main() -> int:
    """Distil, ask, calibrate, hand over, record, retrain, ask again."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        distil(place)
        pipeline = TrainingPipeline(
            place,
            STUDENT,
            ego=TEACHER,
            min_new=20,
            # So few texts cannot tell more than that nothing broke.
            config=EvolveConfig(
                training=settings(place),
                gates=GateSettings(recall_margin=0.5, max_tone_drift=1.0),
                answers=4,
            ),
        )
        with create_cortex_suite(place, STUDENT, ego=TEACHER, pipeline=pipeline) as suite:
            asked = [("tales", "Once upon a time, Tom"), ("answers", QUESTION)]
            for answer in suite.ask_many(asked, max_tokens=24):
                print(f"{answer.domain}: {answer.text.strip()} ({answer.reason})")
            calibrate(suite)
            handed = suite.ask("answers", QUESTION, max_tokens=24, hand_over="always")
            print(f"EGO says: {handed.text.strip()}")
        for record in questions(better=True):
            pipeline.record_correction(
                "answers", record["prompt"], " I do not know.", record["completion"], problem="form"
            )
        advice = pipeline.should_retrain("answers")
        print(f"retrain answers? {'yes' if advice.retrain else 'no'}: {advice.reason}")
        result = pipeline.retrain("answers")
        print(f"{result.version}: {'active' if result.promoted else 'refused'}")
        for verdict in result.verdicts:
            print(f"  {verdict.reason}")
        with create_cortex_suite(place, STUDENT) as suite:
            answer = suite.ask("answers", QUESTION, max_tokens=24)
            print(f"answers, by {suite.folder('answers').name}: {answer.text.strip()}")
        if result.promoted:
            print(f"rollback: {pipeline.rollback('answers')} is active again")
    return 0


def settings(place: Path) -> KDConfig:
    """How both domains are trained."""
    return KDConfig(
        num_iters=STEPS,
        learning_rate=3e-3,
        warmup_iters=4,
        batch_size=8,
        lora_keys="all",
        lora_rank=8,
        val_fraction=0.25,
        max_tokens=24,
        steps_per_eval=20,
        steps_per_save=STEPS,
        output_dir=str(place),
    )


def distil(place: Path) -> None:
    """Teach the student both domains, an adapter for each."""
    distiller = TrueKnowledgeDistiller(TEACHER, STUDENT, settings(place))
    for domain, records in {"tales": tales(), "answers": questions(better=False)}.items():
        result = distiller.distill_domain(domain, data=records)
        before, after = (result.evaluation[n]["bits_per_byte"] for n in ("before", "after"))
        print(f"{domain}: {before:.2f} bits per byte of held-out text before, {after:.2f} after")


def calibrate(suite: CortexSuite) -> None:
    """Measure on held-out prompts how often the first domain agrees with EGO."""
    openings = [f"Once upon a time, {name} {did}" for name in NAMES for did in DEEDS]
    calibration, _ = calibrate_domain(
        suite, "tales", CalibrationSettings(max_tokens=12), prompts=openings
    )
    print(
        f"tales: calibration error {calibration.ece_before:.3f} before, "
        f"{calibration.ece_after:.3f} after; {calibration.verdict}"
    )


if __name__ == "__main__":
    sys.exit(main())
