"""What is being made, beside the place where it is to stand once it is good enough.

Knows folders and what they were begun with; nothing of models. It outlives the process: whatever
is whole in it needs not be made again.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from conch_dna.checkpoints import (
    DIGESTS,
    FolderLock,
    differences,
    read_json,
    remove_folder,
    remove_left,
    remove_unfinished,
    verify_folder,
    write_json,
)
from conch_dna.errors import ConchError, NotWholeError
from conch_dna.screen.progress import Report

RUN_FILE, RUN_LOCK = "run.json", "run.lock"


class WorkFolder:
    """A folder beside another one, whose name says what is done in it.

    Args:
        place: Where the finished thing is to stand.
        doing: The last part of the folder's name, such as "fusing".
        thing: What is made, such as "model", for messages.
        report: Gets what must be made again.

    Raises:
        ConchError: The place has no name, as / and . have none.
    """

    def __init__(self, place: Path, doing: str, thing: str, report: Report) -> None:
        if not place.name:
            raise ConchError(f"{place} has no name of its own: name a folder")
        self.place = place
        self.path = place.with_name(f"{place.name}.{doing}")
        self.thing = thing
        self.report = report

    def require_place(self, marker: str, *, overwrite: bool) -> None:
        """Refuse a place that is taken.

        Args:
            marker: The file that shows that what stands there is such a thing.
            overwrite: Whether such a thing may be replaced.

        Raises:
            ConchError: Another thing stands there, or such a one that is not to be replaced.
        """
        if self.place.exists() and not (self.place / marker).is_file():
            raise ConchError(f"{self.place} is there and is no {self.thing}: name another folder")
        if self.place.exists() and not overwrite:
            remove_left(self.path)
            if self._was_killed_last():
                self.remove()
            raise ConchError(f"{self.place} is there: add --overwrite, or name another folder")

    def _was_killed_last(self) -> bool:
        """Whether what stands at the place is what lies in here, so that nothing is left to do."""
        there = {(each.stat().st_dev, each.stat().st_ino) for each in self.place.iterdir()}
        within = (each.stat() for each in self.path.glob("*/*") if each.is_file())
        return any((each.st_dev, each.st_ino) in there for each in within)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes out, and removes what a killed one left half-written."""
        with FolderLock(self.path, elsewhere="choose another folder"):
            remove_unfinished(self.path)
            remove_left(self.path)
            yield

    def begin(self, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Compare with what lies here, and write down what is begun.

        Args:
            identity: What must be the same to go on.
            resume: Go on.
            overwrite: Begin anew.

        Raises:
            ConchError: Something was begun that is neither to be gone on with nor to be
                overwritten, or it was begun with other settings; or the folder is another one's.
        """
        run, path = None, self.path / RUN_FILE
        if path.exists():
            try:
                run = read_json(path, needs={"identity": dict})
            except NotWholeError as error:
                if not overwrite:
                    raise ConchError(f"{error}: add --overwrite to begin anew") from error
        elif others := [p.name for p in self.path.iterdir() if not p.name.startswith(RUN_LOCK)]:
            raise ConchError(
                f"{self.path} holds {min(others)} and is no unfinished {self.thing}: move it away"
            )
        if run and resume:
            if changed := differences(run["identity"], identity):
                raise ConchError(
                    f"{self.path} was begun with other settings: {'; '.join(changed)}. Resume with "
                    "the same ones, or add --overwrite to begin anew"
                )
            return
        if run and not overwrite:
            raise ConchError(
                f"{self.path} holds an unfinished {self.thing}: add --resume to go on, or "
                "--overwrite to begin anew"
            )
        for path in self.path.iterdir():
            if path.is_dir():
                remove_folder(path)
        write_json(self.path / RUN_FILE, {"identity": identity})

    def has(self, name: str) -> bool:
        """Whether a folder in here is whole; one that is not is made again."""
        if not (self.path / name).is_dir():
            return False
        try:
            verify_folder(self.path / name)
        except NotWholeError as error:
            self.report("warning", {"message": f"{error}; it is made again"})
            return False
        return True

    def writers(self, name: str) -> dict[str, Callable[[Path], None]]:
        """The files of a folder in here, for `write_folder`: second names, no copies."""
        files = (path for path in (self.path / name).iterdir() if path.name != DIGESTS)
        return {path.name: partial(_same_file, path) for path in files}

    def remove(self) -> None:
        """Nothing in it is needed any more."""
        if self.path.is_dir():
            remove_folder(self.path)


def _same_file(source: Path, target: Path) -> None:
    """A second name of a file, or where the disk has no such, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
