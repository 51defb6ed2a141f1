from __future__ import annotations

import pydoc_data.topics

import torch

from dfc_lightning.data.tensors import TensorDataModule, TensorPairs
from dfc_lightning.errors import require

KINDS = 96
"""The 95 printable characters of ASCII, ``~`` standing for all others too, and the end of a line."""


class Documentation(TensorDataModule):
    """Python's own documentation of its language, as plain text, character by character; nothing to download.

    It comes with every Python, some 700,000 characters, and differs a little between versions. Characters are
    numbered from 0 to 95: the printable ones of ASCII, whose last, ``~``, stands for all others too, and the end of a
    line.

    A batch is characters of shape (B, length), int64, and the same a character later. The text is cut into pieces that
    do not overlap; each held-out part is a run of it, so that none of its sentences was trained on.

    Args:
        length: Characters in a piece.
        batch_size: Pieces in a training batch.
        held_out: Share of the text in the validation part, and again in the test part, which are its last two.
        eval_batch_size: Pieces in a validation or test batch.
        num_workers: Processes that load batches; 0 loads in the main process.
        shuffle: Whether each training epoch visits the pieces in a new order.
    """

    def __init__(
        self,
        length: int = 64,
        batch_size: int = 32,
        held_out: float = 0.1,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        shuffle: bool = True,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, shuffle)
        require(length >= 1, "length", length, "give a number of characters")
        require(0 < held_out < 0.5, "held_out", held_out, "give a share of the text above 0 and below a half")
        self.length, self.held_out = length, held_out

    def setup(self, stage: str | None = None) -> None:
        """Cut the text, once."""
        if self.train_set is not None:
            return
        codes = encoded("\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())))
        pieces = codes[: len(codes) // (self.length + 1) * (self.length + 1)].view(-1, self.length + 1)
        few = int(self.held_out * len(pieces))
        parts = pieces.split([len(pieces) - 2 * few, few, few])
        self.train_set, self.val_set, self.test_set = (TensorPairs(p[:, :-1], p[:, 1:]) for p in parts)


def encoded(text: str) -> torch.Tensor:
    r"""The numbers of characters, shape (N,), int64.

    Example:
        >>> encoded("a b\n")
        tensor([65,  0, 66, 95])
    """
    codes = [ord(c) - 32 for c in text.replace("\n", chr(127))]
    return torch.tensor([code if 0 <= code < KINDS else KINDS - 2 for code in codes])
