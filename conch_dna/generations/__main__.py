"""``python -m conch_dna.generations``: the commands of model lines under their module's name.

It knows nothing about them; add those to ``conch_dna/generations/cli.py``.
"""

from conch_dna.generations.cli import generations

if __name__ == "__main__":
    generations(prog_name="python -m conch_dna.generations")
