"""A progress bar for feedback passes, beside Lightning's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from tqdm.auto import tqdm


@contextlib.contextmanager
def stage_bar(trainer: pl.Trainer, label: str, total: int | float, done: int) -> Iterator[Callable[[], None]]:
    """Show a bar in the style of the trainer's, or none if it has none.

    Args:
        trainer: the trainer.
        label: what is under way.
        total: number of steps; infinity if unknown.
        done: steps made before.

    Yields:
        A function that advances the bar by a step.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        rich = bar.progress
        task = rich.add_task(label, total=total, completed=done)

        def advance() -> None:
            rich.update(task, advance=1)
            bar.refresh()  # as Lightning's bars, this one is drawn anew only when asked

        try:
            yield advance
        finally:
            rich.update(task, visible=False)
    elif isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        length = None if total == float("inf") else int(total)
        with tqdm(desc=label, total=length, initial=done, leave=False, dynamic_ncols=True) as line:
            yield lambda: line.update() and None
    else:
        yield lambda: None
