"""What is killed on an adapter's way out of the house: fusing, merging, exporting, making students.

Each command's place holds something whole or nothing, and the adapters stay as they were. Killed
between the last file and the last word, a command finds its place taken, which is not a fault.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from _kill_operations import DOMAIN, Command, Facts, Operation, Operations, files, not_whole, rows
from _kill_operations import NAMES as OTHERS

OTHER = "walks"
WEIGHTS = "*.safetensors"
SMALL = ("--batch-size", "2", "--seed", "3")


class Exports(Operations):
    """Operations, and those that need adapters that are there already."""

    def _distilled(self) -> Path:
        base = self.folder / "two"
        if not base.is_dir():
            for domain, word in ((DOMAIN, "cat"), (OTHER, "road")):
                texts = [
                    {"prompt": f"Once upon a time {n}", "completion": f" there was a {word} {n}."}
                    for n in range(12)
                ]
                data = rows(self.folder / f"{domain}.jsonl", texts)
                self.whole([[*self._distill(base, "--data", data), "--domain", domain]])
        return base

    def _operation(
        self,
        commands: Callable[[Path], list[Command]],
        places: Sequence[str],
        *patterns: str,
    ) -> Operation:
        """An operation that begins with two adapters.

        Args:
            commands: Of a trial's folder.
            places: Folders that are made in it, each whole or not there.
            patterns: Of the files that must be the same each time.
        """
        base = self._distilled()
        adapters = [Path("adapters") / each / "adapters_kd" for each in (DOMAIN, OTHER)]

        def lost(folder: Path, runs: list[str]) -> list[str]:
            made = [folder / each for each in places if (folder / each).exists()]
            return not_whole([*(folder / each for each in adapters), *made])

        def result(folder: Path) -> Facts:
            left = (".writing-*", "*/.writing-*", "*.fusing/*", "adapters/*/*.merging/*")
            kept = {
                str(path.relative_to(folder)): "left" for each in left for path in folder.glob(each)
            }
            return {**files(folder, *patterns), **kept}

        return Operation(base, commands, lost, result)

    def _adapter(self, folder: Path) -> str:
        return str(folder / "adapters" / DOMAIN / "adapters_kd")

    def fusing(self) -> Operation:
        """An adapter is fused into 3 bits, its scales are trained, and it is judged."""
        how = ("--bits", "3", "--group-size", "32", "--steps", "4", "--max-kl", "100", *SMALL)

        def commands(folder: Path) -> list[Command]:
            return [["fuse", self._adapter(folder), str(folder / "fused"), *how, "--resume"]]

        return self._operation(commands, ["fused"], f"fused/{WEIGHTS}")

    def merging(self) -> Operation:
        """Two adapters teach one, which is judged."""
        how = ("--into", "both", "--steps", "6", "--recall-margin", "1", *SMALL)

        def commands(folder: Path) -> list[Command]:
            where = ("--adapters", str(folder / "adapters"))
            return [["merge", DOMAIN, OTHER, *where, *how, "--resume"]]

        place = "adapters/both/adapters_kd"
        return self._operation(commands, [place], f"{place}/{WEIGHTS}")

    def leaving(self) -> Operation:
        """An adapter leaves in three forms and comes back from one."""

        def commands(folder: Path) -> list[Command]:
            def to(form: str, name: str) -> Command:
                return ["export", self._adapter(folder), str(folder / name), "--to", form]

            back = ["import", str(folder / "peft"), str(folder / "back")]
            return [
                to("peft", "peft"),
                to("gguf-lora", "lora.gguf"),
                to("gguf", "whole.gguf"),
                [*back, "--model", "embedded:student"],
            ]

        patterns = ("*.gguf", "*.Modelfile", f"peft/{WEIGHTS}", f"back/{WEIGHTS}")
        return self._operation(commands, ["peft", "back"], *patterns)

    def student(self) -> Operation:
        """A model of fewer layers and neurons is made of another."""
        texts = self.folder / "lines.txt"
        texts.write_text("".join(f"Once there was a cat who saw {n} dogs.\n" for n in range(40)))
        how = ("--layers", "2", "--mlp", "0.5", "--text", str(texts), "--tokens", "256")

        def commands(folder: Path) -> list[Command]:
            return [["student", "make", "embedded:student", str(folder / "small"), *how]]

        return self._operation(commands, ["small"], f"small/{WEIGHTS}", "small/config.json")


NAMES = (*OTHERS, "fusing", "merging", "leaving", "student")
