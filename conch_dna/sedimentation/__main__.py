"""``python -m conch_dna.sedimentation``: the commands of stores under their module's name.

It knows nothing about them; add those to ``conch_dna/sedimentation/cli.py``.
"""

from conch_dna.sedimentation.cli import sediment

if __name__ == "__main__":
    sediment(prog_name="python -m conch_dna.sedimentation")
