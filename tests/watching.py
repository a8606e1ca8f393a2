"""What runs say and where they break off, for tests of what is left then."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class Said(list[str]):
    """Messages and warnings of a run; gets its progress."""

    def __call__(self, event: str, row: dict[str, Any]) -> None:
        if event in ("message", "warning"):
            self.append(row["message"])


@contextmanager
def stopped(where: Any, name: str, *, call: int) -> Iterator[None]:
    """What runs meanwhile breaks off at the n-th call of a function, and must.

    Args:
        where: The module or class that has the function.
        name: Of the function.
        call: Which call does not come to be, from 1.
    """
    calls = 0
    real = getattr(where, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise RuntimeError("stopped")
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, counted)
        with pytest.raises(RuntimeError, match="stopped"):
            yield
    assert calls == call
