"""``python -m conch_dna.cortex``: the commands of CORTEX under their module's name.

It knows nothing about them; add those to ``conch_dna/cortex/cli.py``.
"""

from conch_dna.__main__ import run

if __name__ == "__main__":
    run("conch_dna.cortex.cli", "cortex", name="python -m conch_dna.cortex")
