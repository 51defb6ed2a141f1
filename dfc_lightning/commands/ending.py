"""How a command ends: whatever a person can do wrong, a sentence on stderr and a code that is not zero."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lightning.pytorch.utilities.exceptions import SIGTERMException

from dfc_lightning.experiments.errors import Stopped, sentence, stopping_signal
from dfc_lightning.experiments.going_on import CONFIG, folder_of


@contextmanager
def ending_in_a_sentence(words: Sequence[str], resumes_itself: bool) -> Iterator[None]:
    """Turn errors of people and systems into sentences and codes; those not foreseen keep their tracebacks.

    Args:
        words: the command, without ``dfc``.
        resumes_itself: whether the same command goes on where it was stopped.
    """
    try:
        with _signals_raised():
            yield
            sys.stdout.flush()
    except BaseException as error:
        number = stopping_signal(error)
        if number is not None:
            print(f"\nerror: stopped by {number.name}. {_going_on(error, words, resumes_itself)}", file=sys.stderr)
            raise SystemExit(128 + number) from error
        told = sentence(error)
        if told is None:
            raise
        if isinstance(error, BrokenPipeError):  # nor can the interpreter flush at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(f"error: {told}") from error


def _going_on(error: BaseException, words: Sequence[str], resumes_itself: bool) -> str:
    command = shlex.join(["dfc", *words])
    if resumes_itself:
        return f"What is finished is noted; the same command goes on from the last complete epoch: {command}"
    checkpoint = error.checkpoint if isinstance(error, Stopped) else None
    if checkpoint is None:
        return f"There is no checkpoint to go on from; to begin again: {command}"
    run = Path(checkpoint).parent.parent
    if words[0] in ("fit", "resume") and folder_of(Path(checkpoint)) is not None and (run / CONFIG).is_file():
        return f"To go on from there: {shlex.join(['dfc', 'resume', str(run)])}"
    kept = [word for word in words if not word.startswith("--ckpt_path=")]
    return f"To go on from its last checkpoint: {shlex.join(['dfc', *kept, f'--ckpt_path={checkpoint}'])}"


@contextmanager
def _signals_raised() -> Iterator[None]:
    """Have Ctrl-C and SIGTERM raised as exceptions; a trainer, which waits for the end of a batch, goes first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def terminate(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a worker that was forked
            os._exit(128 + number)
        if signal.getsignal(number) is terminate:
            raise SIGTERMException

    before = {signal.SIGINT: signal.getsignal(signal.SIGINT), signal.SIGTERM: signal.getsignal(signal.SIGTERM)}
    try:
        if before[signal.SIGINT] is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if before[signal.SIGTERM] is not signal.SIG_IGN:
            signal.signal(signal.SIGTERM, terminate)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
