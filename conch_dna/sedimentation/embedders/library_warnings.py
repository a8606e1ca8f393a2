"""Warnings and bars of libraries that say nothing to a user, switched off where they arise.

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


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Around transformers 5, which shows a bar of its own for weights that load in a moment."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
