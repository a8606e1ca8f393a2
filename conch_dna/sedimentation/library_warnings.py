"""Warnings of libraries that say nothing to a user, switched off where they arise.

Knows what the libraries do; nothing of what they are used for.
To add one: a context manager that names the library, its version and the reason.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unclosed_files_allowed() -> Iterator[None]:
    """Around model2vec 0.8, which reads and writes its JSON files without closing them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
