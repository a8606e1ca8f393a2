"""A doorway: `python -m conch_dna.training.benchmark` measures what adapters are worth.

It hands the names on and knows nothing; what they do stands in conch_dna/cortex/benchmark/.
Nothing in the package imports from here.
"""

from conch_dna.cortex.benchmark.command import main, run_benchmark

__all__ = ["main", "run_benchmark"]

if __name__ == "__main__":
    main(prog_name="python -m conch_dna.training.benchmark")
