"""``python -m conch_dna``: the command line under its module name.

It knows nothing about the commands; those stand in the cli.py of their part.
"""

from conch_dna.cli import main

if __name__ == "__main__":
    main(prog_name="python -m conch_dna")
