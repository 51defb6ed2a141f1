"""Telling whole checkpoints from torn ones before a trainer is given them."""

from __future__ import annotations

import warnings
import zipfile
import zlib
from pathlib import Path


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


def is_whole(path: Path) -> bool:
    """Whether every part of the archive is there and has the checksum it was written with."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None and bool(archive.namelist())
    except (OSError, EOFError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return False
