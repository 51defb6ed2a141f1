"""``dfc doctor``: what is installed and found here, and the command that mends what is missing."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from dfc_lightning.data import CIFAR10, MNIST, FashionMNIST
from dfc_lightning.data.images import Images
from dfc_lightning.experiments.shipped import known_recipes, shipped

_DISTRIBUTION = "dfc_lightning"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: the words after its name.
    """
    arguments = argparse.ArgumentParser(
        prog="dfc doctor",
        description="Versions, threads, devices and data as found here, and the command that mends what is missing. "
        "Ends with code 1 if something that is needed is.",
        allow_abbrev=False,
    )
    arguments.parse_args(args)
    wanting = _packages()
    _machine()
    wanting += _data()
    print("\nall is well" if not wanting else "\nto do:\n" + "\n".join(f"  {remedy}" for remedy in wanting))
    if any(remedy.startswith("pip ") for remedy in wanting):
        sys.exit(1)


def _packages() -> list[str]:
    """Print versions; commands for what is missing or too old."""
    remedies: list[str] = []
    print(f"python        {platform.python_version()}, {sys.executable}")
    print(f"dfc_lightning {_version(_DISTRIBUTION)}, {Path(__file__).resolve().parent.parent}")
    for text in metadata.requires(_DISTRIBUTION) or []:
        requirement = Requirement(text)
        extra = requirement.marker is not None and requirement.marker.evaluate({"extra": "recipes"})
        if requirement.marker is not None and not extra:
            continue
        found = _version(requirement.name)
        fits = found is not None and requirement.specifier.contains(found, prereleases=True)
        state = found if fits else f"{found or 'not installed'}: needs {requirement.specifier or 'any'}"
        print(f"{requirement.name:13} {state}")
        if not fits:
            named = f"{requirement.name}[{','.join(requirement.extras)}]" if requirement.extras else requirement.name
            remedies.append(f'pip install "{named}{requirement.specifier}"')
    return remedies


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> None:
    """Print threads and devices."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    given = [f"{name}={os.environ[name]}" for name in _THREAD_VARIABLES if os.environ.get(name)]
    chosen = ", ".join(given) or "dfc fit measures what suits a small network; --threads=N overrides"
    print(f"threads       {torch.get_num_threads()} of {cores} cores; {chosen}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    apple = ["Apple MPS"] if torch.backends.mps.is_available() else []
    print(f"devices       CPU{''.join(f', {name}' for name in [*gpus, *apple])}")


def _data() -> list[str]:
    """Print which recipes and data are there; how to have the data that are not."""
    root = os.environ.get("DFC_DATA_ROOT")
    print(f"recipes       {len(known_recipes())}, {shipped('recipes') or 'not found'}")
    print(f"data          {root or Path('data').absolute()}, {'by' if root else 'for want of'} DFC_DATA_ROOT")
    sets: tuple[Images, ...] = (MNIST(), FashionMNIST(), CIFAR10())
    missing = [each.dataset for each in sets if not each.is_there()]
    for each in sets:
        print(f"  {each.dataset:13} {'not found' if each.dataset in missing else 'found'}")
    remedy = f"export DFC_DATA_ROOT=FOLDER  # that holds {', '.join(missing)}, or into which recipes download them"
    return [remedy] if missing else []
