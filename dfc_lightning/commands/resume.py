"""``dfc resume``: a run goes on in its folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dfc_lightning.experiments.going_on import CONFIG, checkpoint_of
from dfc_lightning.experiments.recipe_cli import RecipeCLI


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: the words after its name.
    """
    arguments = argparse.ArgumentParser(
        prog="dfc resume",
        description="Go on with a run from its last checkpoint, also from within an epoch or a feedback pass: by its "
        "own config.yaml, in its own folder, with its curves and its best epoch so far.",
        epilog="Options of dfc fit change the run from here on: --trainer.max_epochs=40 makes a finished one longer.",
        allow_abbrev=False,
    )
    arguments.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="folder of a run, one with version_* folders, of which the one written to last is taken, or a checkpoint",
    )
    given, options = arguments.parse_known_args(args)
    checkpoint = checkpoint_of(given.run)
    config = checkpoint.parent.parent / CONFIG
    RecipeCLI(["fit", f"--config={config}", *options, f"--ckpt_path={checkpoint}"], resumes=True)
