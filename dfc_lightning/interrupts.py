"""Ctrl-C and SIGTERM while the command is still importing, or is through: a sentence, where there is nothing to lose.

``dfc_lightning`` imports this before all else, since importing PyTorch takes seconds. Programs other than the command
keep their own ways.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType


def leave(number: int, frame: FrameType | None) -> None:
    """End the process at once, with a sentence and the code of the signal."""
    os.write(2, f"error: stopped by {signal.Signals(number).name}.\n".encode())
    os._exit(128 + number)


def is_the_command(argv: list[str], original: list[str]) -> bool:
    """Whether the process is ``dfc``, or ``python -m dfc_lightning``.

    Args:
        argv: ``sys.argv``, which begins with ``-m`` while a module is looked for.
        original: ``sys.orig_argv``, which tells what module that is.
    """
    if argv[:1] == ["-m"]:
        return "-m" in original and original[original.index("-m") + 1 :][:1] == ["dfc_lightning"]
    return bool(argv) and Path(argv[0]).name in ("dfc", "dfc.exe")


if is_the_command(sys.argv, sys.orig_argv):
    for _number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(_number) in (signal.SIG_DFL, signal.default_int_handler):  # not where it is ignored
            signal.signal(_number, leave)
