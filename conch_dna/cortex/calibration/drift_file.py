"""What a server has counted of drift, beside the calibration that it is compared with.

Knows one domain's folder, its lock and JSON; nothing of servers. The file is bound to its
calibration by a digest: of another one it is begun anew, of the same a restart goes on with it.
Servers that share a folder share one count: each adds, under the lock, what came since it wrote
last to what the file says by then. To keep something else: `Drift.to_json`.
"""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from conch_dna.checkpoints import content_digest, json_text, read_json, write_json
from conch_dna.cortex.calibration.confidence import Calibration, load_calibration
from conch_dna.cortex.calibration.drift import Drift, Finding, Kind, Outcome
from conch_dna.errors import ConchError

DRIFT_FILE, LOCK_FILE = "drift.json", "drift.lock"
# Answers that wait for a file that cannot be written; later ones are counted in memory alone.
MOST_WAITING = 10_000


def digest_of(calibration: Calibration) -> str:
    """What a count belongs to."""
    return content_digest(json_text(calibration.to_json()))


def now() -> str:
    """The time, as it is written down."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def remedy(domain: str) -> str:
    """What to do where a domain drifts."""
    return (
        "calibrate on prompts as they are asked now: "
        f"'conch-dna cortex calibrate {domain} --prompts FILE --ego MODEL'"
    )


def read_drift(folder: Path, calibration: Calibration) -> Drift | None:
    """What was counted against a calibration.

    Args:
        folder: The domain's.
        calibration: With expectations.

    Returns:
        None where nothing was, or only against another calibration.

    Raises:
        ConchError: The file cannot be read.
    """
    path = folder / DRIFT_FILE
    if calibration.expected is None or not path.exists():
        return None
    document = read_json(path, needs={"calibration": str})
    if document.pop("calibration") != digest_of(calibration):
        return None
    try:
        return Drift.from_json(document, calibration.expected)
    except ConchError as error:
        raise ConchError(f"{path}: {error}") from error


class DriftCount:
    """One domain's count in a process, and its file. For one thread.

    Args:
        adapters_dir: The folder of all domains.
        domain: Its name.
        calibration: In use, with expectations.
        report: Gets a line for each drift that begins, and where the file is of no use.

    Attributes:
        calibration: In use.
    """

    def __init__(
        self,
        adapters_dir: Path,
        domain: str,
        calibration: Calibration,
        *,
        report: Callable[[str], None],
    ) -> None:
        assert calibration.expected is not None
        self.calibration = calibration
        self._adapters_dir = adapters_dir
        self._domain = domain
        self._folder = Path(adapters_dir) / domain
        self._report = report
        self._digest = digest_of(calibration)
        self._waiting: list[tuple[Outcome, str]] = []
        self._problem = ""
        self._drift = self._read() or Drift(calibration.expected, now())
        # What a server before has found it has told.
        self._told: set[Kind] = self._drift.kinds

    @property
    def findings(self) -> list[Finding]:
        """Of each kind that is watched, what this process has not written yet among it."""
        return self._drift.findings

    def add(self, outcome: Outcome) -> None:
        """Count a live answer; it is written by `save`."""
        time = now()
        self._drift.add(outcome, time)
        self._tell()
        if len(self._waiting) < MOST_WAITING:
            self._waiting.append((outcome, time))

    def save(self, *, wait_s: float = 0.0) -> None:
        """Write what was counted since the last time; what cannot be written waits for the next.

        Args:
            wait_s: Longest wait for another process that writes.
        """
        if not self._waiting:
            return
        from filelock import FileLock, Timeout

        try:
            # The lock's file would bring back a folder that somebody has deleted.
            if not self._folder.is_dir():
                raise ConchError("its folder is gone")
            with FileLock(self._folder / LOCK_FILE, timeout=wait_s, poll_interval=0.01):
                self._merge()
        except Timeout:
            return
        except (OSError, ConchError) as error:
            self._say_once(f"what is counted of {self._domain}'s drift is not kept: {error}")

    def _merge(self) -> None:
        if not self._is_current():
            # Another calibration has come, against which another server may count already.
            self._waiting = []
            return
        drift = self._read()
        if drift is None or len(self._waiting) == MOST_WAITING:
            # There is nothing to add to, or not all waited: then what is counted here stands.
            drift = self._drift
        else:
            for outcome, time in self._waiting:
                drift.add(outcome, time)
        write_json(self._folder / DRIFT_FILE, {"calibration": self._digest} | drift.to_json())
        self._drift, self._waiting = drift, []
        self._problem = ""
        self._tell()

    def _is_current(self) -> bool:
        found = load_calibration(
            self._adapters_dir,
            self._domain,
            self.calibration.adapter_digest,
            report=lambda line: None,
        )
        return found is not None and digest_of(found) == self._digest

    def _read(self) -> Drift | None:
        try:
            return read_drift(self._folder, self.calibration)
        except ConchError as error:
            self._say_once(f"what was counted of {self._domain}'s drift is left out: {error}")
            return None

    def _say_once(self, line: str) -> None:
        if line != self._problem:
            self._problem = line
            self._report(line)

    def _tell(self) -> None:
        if self._drift.kinds <= self._told:
            return
        for each in self.findings:
            if each.drifted and each.kind not in self._told:
                self._told.add(each.kind)
                self._report(f"{self._domain} drifts: {each}; {remedy(self._domain)}")
