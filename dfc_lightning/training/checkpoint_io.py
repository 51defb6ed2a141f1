"""Writing checkpoints so that none is left torn, and reading them so that none runs code."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from dfc_lightning.errors import ControlError


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoints that appear under their name once they are whole, and hold nothing but values.

    A local file is written beside its target, brought to the disk, and renamed: a disk that is full, or a process that
    is killed, leaves the checkpoint that was there before. What is read is unpickled with ``weights_only=True``,
    wherever it comes from, unless the caller says otherwise.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or not _is_local(get_filesystem(path)):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()  # torch.save to a full disk gives no OSError
        torch.save(checkpoint, content)
        try:
            _replace(Path(str(path).removeprefix("file://")), content.getbuffer())
        except OSError as error:
            raise ControlError(
                f"The checkpoint {path} could not be written: {error.strerror or error}. What was there before is as "
                "it was. Make room, or give another folder by Trainer(default_root_dir=…), and resume from it."
            ) from error

    @override
    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        fs = get_filesystem(path)
        if not fs.exists(path):
            raise FileNotFoundError(f"Checkpoint file not found: {path}")
        with fs.open(path, "rb") as file:
            content = file if _is_local(fs) else io.BytesIO(file.read())  # servers may not seek
            return torch.load(content, map_location, weights_only=weights_only is None or weights_only)


def _is_local(fs: Any) -> bool:
    return isinstance(fs, LocalFileSystem)


def _replace(target: Path, content: memoryview) -> None:
    """Give the file this content, or leave it as it was."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
