"""What to tell of an error that is no fault of the program's, in a sentence."""

from __future__ import annotations

import errno
import signal

from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from dfc_lightning.data.checks import DataError
from dfc_lightning.errors import ControlError
from dfc_lightning.experiments.ledger import LedgerError
from dfc_lightning.experiments.reading import CompositionError

OURS = (ControlError, CompositionError, DataError, LedgerError, MisconfigurationException)
"""Errors whose messages name the cause and the remedy."""

_REMEDIES = {
    errno.EACCES: "Choose another place, or change its permissions.",
    errno.EPERM: "Choose another place, or change its permissions.",
    errno.EROFS: "Choose a place that can be written to.",
    errno.ENOSPC: "Free some space, and give the command again.",
    errno.EDQUOT: "Free some space, and give the command again.",
    errno.EFBIG: "Raise the limit on the size of files, or choose another place.",
    errno.EEXIST: "Move it away, or choose another place.",
    errno.ENOTDIR: "A file lies where a folder should be: move it away, or choose another place.",
    errno.EISDIR: "Name a file, not a folder.",
    errno.ENOENT: "Check the path.",
}


class RecipeError(ValueError):
    """A recipe that the command line refuses."""


class Stopped(SystemExit):
    """A run stopped by a signal.

    Args:
        number: the signal.
        checkpoint: what to go on from, if there is something.
    """

    def __init__(self, number: signal.Signals, checkpoint: str | None) -> None:
        super().__init__(128 + number)
        self.number, self.checkpoint = number, checkpoint


def sentence(error: BaseException) -> str | None:
    """What to tell of an error; None if it was not foreseen, and its traceback is wanted."""
    if isinstance(error, (*OURS, RecipeError)):
        return str(error)
    if isinstance(error, OSError):
        if error.errno is None or error.strerror is None:  # raised with a sentence of its own
            return str(error)
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}. {_REMEDIES.get(error.errno, 'Give the command again.')}"
    if isinstance(error, ImportError) and "pip install" in str(error):
        return str(error)
    return None


def stopping_signal(error: BaseException) -> signal.Signals | None:
    """The signal that ended a command by this error, if one did."""
    if isinstance(error, Stopped):
        return error.number
    if isinstance(error, SIGTERMException):
        return signal.SIGTERM
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGINT
    if isinstance(error, SystemExit) and isinstance(error.__context__, (KeyboardInterrupt, SIGTERMException)):
        return stopping_signal(error.__context__)  # Lightning exits with code 1 when interrupted
    return None
