"""Errors that a user can act on.

Knows nothing of what raises them. The command line prints them as one line and exits with 2.
To add one: subclass `ConchError` only where a caller must tell it from the others.
"""


class ConchError(Exception):
    """A mistake or circumstance the user can remedy; the message says how."""


class NonFiniteLossError(ConchError):
    """The loss became NaN or infinite; names the step, the examples and the last checkpoint."""


class NotWholeError(ConchError):
    """A checkpoint or cache shard on disk is truncated or altered."""


class FolderInUseError(ConchError):
    """Another process is writing to the folder."""


class Interrupted(ConchError):
    """The run was stopped by Ctrl-C after its state was saved."""
