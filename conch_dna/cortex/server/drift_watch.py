"""Live answers of a server's neurons, compared with what their calibrations let expect.

Knows a suite's calibrations, turns and their counts on disk; nothing of jobs or HTTP. For the
server's loop, whose thread alone counts and writes. Something else to watch: `Turn.outcome`.
"""

import time
from collections.abc import Callable

from conch_dna.cortex.calibration.drift import Finding
from conch_dna.cortex.calibration.drift_file import DriftCount
from conch_dna.cortex.neuron import CortexSuite
from conch_dna.cortex.turn import Turn

# Between two writes of what was counted of a domain, in seconds.
SAVE_S = 5.0


class DriftWatch:
    """A count for every neuron whose calibration says what to expect.

    Args:
        suite: The neurons.
        report: Gets a line for what the one who runs the server should know.
    """

    def __init__(self, suite: CortexSuite, *, report: Callable[[str], None]) -> None:
        self._suite = suite
        self._report = report
        self._counts: dict[str, DriftCount] = {}
        self._next_save = time.monotonic() + SAVE_S
        self._saved = 0
        self.take_in()

    @property
    def findings(self) -> list[tuple[str, Finding]]:
        """Of each kind of each domain; from any thread."""
        counts = self._counts.items()
        return [(name, each) for name, count in counts for each in count.findings]

    def take_in(self) -> None:
        """Begin anew where a domain has another calibration than before."""
        counts = {}
        for name in self._suite.domains:
            calibration = self._suite.domain(name).calibration
            count = self._counts.get(name)
            if calibration is None or calibration.expected is None:
                continue
            if count is None or count.calibration != calibration:
                count = DriftCount(self._suite.adapters_dir, name, calibration, report=self._report)
            counts[name] = count
        self._counts = counts

    def add(self, turn: Turn) -> None:
        """Count a turn whose neuron has answered, if it is of the calibrated kind; each once."""
        outcome, turn.outcome = turn.outcome, None
        count = self._counts.get(turn.domain.name)
        if outcome is None or count is None:
            return
        # An answer that began under another calibration says nothing about this one.
        if count.calibration == turn.domain.calibration:
            count.add(outcome)

    def save_sometimes(self) -> None:
        """Write what was counted, a domain at a time, each every SAVE_S seconds."""
        if time.monotonic() < self._next_save:
            return
        counts = list(self._counts.values())
        if counts:
            # Nobody gets a token while the disk is waited for: not for all domains in one go.
            self._saved += 1
            counts[self._saved % len(counts)].save()
        self._next_save = time.monotonic() + SAVE_S / max(1, len(counts))

    def save(self, *, wait_s: float = 0.0) -> None:
        """Write what was counted.

        Args:
            wait_s: Longest wait for another process that writes, for each domain.
        """
        for count in self._counts.values():
            count.save(wait_s=wait_s)
