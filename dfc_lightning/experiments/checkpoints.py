"""Telling whole checkpoints from torn ones before a trainer is given them."""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dfc_lightning.errors import ControlError


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint in a folder that was written to its end; None if there is none.

    One that was not, on a disk that was full, is passed over with a warning.
    """
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True):
        if is_whole(path):
            return path
        warnings.warn(
            f"{path} was not written to its end, perhaps because the disk was full: the checkpoint before it is taken, "
            "or the run begins anew.",
            stacklevel=2,
        )
    return None


def require_checkpoint(path: Path) -> Mapping[str, Any]:
    """What a checkpoint holds; a file that is torn, or another thing, is refused.

    Raises:
        ControlError: it is; the message names the file and the remedy.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # bytes at random may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ControlError(
            f"The checkpoint {path} cannot be read, perhaps because it was not written to its end; go on from an "
            f"earlier one. Reading it gave: {reason}"
        ) from error
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise ControlError(f"The file {path} is not a checkpoint written by a Trainer: give one that is.")
    return checkpoint


def is_whole(path: Path) -> bool:
    """Whether every part of the archive is there and has the checksum it was written with."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None and bool(archive.namelist())
    except (OSError, EOFError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return False
