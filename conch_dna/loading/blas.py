"""The BLAS of mlx's float32 products on a Linux CPU.

Knows libraries by name, nothing of models. To add one: its name and file in `BlasBeforeMlx`, in
the order of their speed.
"""

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

from conch_dna.errors import ConchError


class BlasBeforeMlx:
    """Loads a BLAS right before mlx is imported, so that commands without mlx need none.

    mlx's Linux wheel carries a reference BLAS; symbols of a library that was loaded globally
    before it take precedence, which makes float32 products about 30 times faster. torch's own
    library, which comes with sentence-transformers, exports them too; it takes 0.4 s to load.
    """

    state = "not loaded yet: mlx was not imported"

    def watch(self) -> None:
        """Have the BLAS loaded when mlx is imported, if that is still to come."""
        if sys.platform != "linux":
            self.state = "not needed: this is not Linux"
        elif "mlx.core" in sys.modules:
            self.state = "the wheel's own: mlx was imported before conch_dna"
        else:
            sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Load what `CONCH_DNA_BLAS` asks for when mlx.core is looked up; find nothing."""
        if name == "mlx.core":
            self.state = self._load(os.environ.get("CONCH_DNA_BLAS") or "auto")
            sys.meta_path.remove(self)

    def _load(self, choice: str) -> str:
        """Load the best BLAS of a choice, and say which it is.

        Raises:
            ConchError: The choice is unknown, or what it names is not there.
        """
        libraries = {"openblas": "libopenblas.so.0", "torch": _torch_library()}
        if choice not in ("auto", "none", *libraries):
            raise ConchError(f"CONCH_DNA_BLAS is {choice!r}, not auto, openblas, torch or none")
        if choice == "none":
            return "the wheel's own: CONCH_DNA_BLAS is none"
        for name in libraries if choice == "auto" else [choice]:
            try:
                ctypes.CDLL(libraries[name], mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            return name
        if choice != "auto":
            raise ConchError(
                f"CONCH_DNA_BLAS is {choice}, and {libraries[choice]} cannot be loaded; install "
                "it, or choose auto"
            )
        return (
            "the wheel's own, which is slow: neither libopenblas.so.0 (Debian package "
            "libopenblas0-pthread) nor torch is installed"
        )


def _torch_library() -> str:
    """The path of torch's shared library, looked up without importing torch; may not exist."""
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    return str(folder / "lib" / "libtorch_cpu.so")


BLAS = BlasBeforeMlx()


def blas_state() -> str:
    """Which BLAS mlx's float32 products use on this machine, or why none was loaded."""
    return BLAS.state
