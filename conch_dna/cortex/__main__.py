"""``python -m conch_dna.cortex``: the commands of CORTEX under their module's name.

It knows nothing about them; add those to ``conch_dna/cortex/cli.py``.
"""

from conch_dna.cortex.cli import cortex

if __name__ == "__main__":
    cortex(prog_name="python -m conch_dna.cortex")
