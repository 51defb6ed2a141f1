"""Options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path

from dfc_lightning.experiments.shipped import recipes_folder


def add_recipes(parser: argparse.ArgumentParser) -> None:
    """Where the recipes lie."""
    parser.add_argument(
        "--recipes",
        type=Path,
        default=recipes_folder(),
        metavar="DIR",
        help="default: recipes, or those that come with the package",
    )
