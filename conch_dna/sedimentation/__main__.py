"""``python -m conch_dna.sedimentation``: the commands of stores under their module's name.

It knows nothing about them; add those to ``conch_dna/sedimentation/cli.py``.
"""

from conch_dna.__main__ import run

if __name__ == "__main__":
    run("conch_dna.sedimentation.cli", "sediment", name="python -m conch_dna.sedimentation")
