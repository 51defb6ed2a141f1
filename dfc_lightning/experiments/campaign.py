"""Many runs, one after the other, with a bar and the time to go."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from dfc_lightning.experiments.errors import sentence, stopping_signal
from dfc_lightning.experiments.ledger import Ledger, Result
from dfc_lightning.experiments.protocol import reported
from dfc_lightning.experiments.runner import Claimed, Run, perform


@dataclass
class Outcome:
    """What became of the runs asked for.

    Args:
        results: of those that are finished, now or before.
        claimed: those another process is at.
        failed: those that ended in an error, and the error.
    """

    results: list[Result] = field(default_factory=list)
    claimed: list[Run] = field(default_factory=list)
    failed: list[tuple[Run, Exception]] = field(default_factory=list)


def carry_out(planned: Sequence[Run], runs: Path, ledger: Ledger) -> Outcome:
    """Run what is missing; an error ends its run only.

    Raises:
        LedgerError: results cannot be read or noted.
    """
    outcome = Outcome()
    done = {run: result for run in planned if (result := run.done(ledger)) is not None}
    missing = [run for run in planned if run not in done]
    if missing:
        ledger.check_writable()
    outcome.results.extend(done.values())
    total = sum(run.epochs for run in missing)
    with tqdm(total=total, unit="epoch", dynamic_ncols=True, disable=not missing, smoothing=0.05) as bar:
        for run in missing:
            seen = bar.n

            def advance(epochs: int, figures: dict[str, float], run: Run = run, seen: int = seen) -> None:
                if not figures:  # epochs of an earlier attempt took no time in this one
                    bar.initial += epochs
                bar.n = seen + epochs
                latest = figures.get(run.recipe.metric)
                bar.set_postfix_str("" if latest is None else f"{run.recipe.metric} {latest:.4g}", refresh=False)
                bar.refresh()

            bar.set_description(str(run))
            try:
                result = perform(run, runs, ledger, advance)
            except Claimed:
                outcome.claimed.append(run)
                bar.total -= run.epochs
                continue
            except SystemExit as stop:
                if stopping_signal(stop) is not None:
                    raise
                outcome.failed.append((run, RuntimeError(f"it left the process with exit code {stop.code}")))
            except Exception as error:
                outcome.failed.append((run, error))
                bar.write(f"{run}: failed: {sentence(error) or traceback.format_exc()}", file=sys.stderr)
            else:
                outcome.results.append(result)
                bar.write(_told(run, result))
            bar.n = seen + run.epochs
    return outcome


def told_failures(failed: Sequence[tuple[Run | Path, Exception]]) -> str:
    """Each run or recipe that failed, and why."""
    return "; ".join(f"{what}: {sentence(error) or error or type(error).__name__}" for what, error in failed)


def positive(text: str) -> int:
    """A whole number above zero, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above zero, e.g. 5")
    return int(text)


def _told(run: Run, result: Result) -> str:
    value, epoch = reported(result.history, result.metric, run.epochs)
    expected = run.recipe.expected
    published = f"; published {expected}" if expected else ""
    part = f" of {run.recipe.epochs}" if run.epochs < run.recipe.epochs else ""
    return f"{run}: {result.metric} {value:.4g} (epoch {epoch}, {run.epochs}{part} epochs){published}"
