"""``python -m conch_dna.generations``: the commands of model lines under their module's name.

It knows nothing about them; add those to ``conch_dna/generations/cli.py``.
"""

from conch_dna.__main__ import run

if __name__ == "__main__":
    run("conch_dna.generations.cli", "generations", name="python -m conch_dna.generations")
