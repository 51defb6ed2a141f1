from __future__ import annotations

import torch
from torch import Tensor, nn


class GPT(nn.Module):
    """A language model: pre-norm transformer blocks over embeddings that are the last layer's weight too.

    The blocks are torch's own (Radford et al., 2019, in small). Takes characters of shape (B, T), int64, T at most
    ``length``, and returns logits of the next ones, shape (B, T, kinds).

    Args:
        kinds: Number of characters there are.
        width: Of the embedding; a multiple of ``heads``.
        layers: Number of blocks.
        heads: Of attention, in every block.
        length: The longest sequence.
        dropout: Share of units that are dropped while training.

    Example:
        >>> GPT(kinds=10)(torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5, 10])
    """

    def __init__(
        self,
        kinds: int,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        length: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(kinds, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, kinds, bias=False)
        self.head.weight = self.words.weight
        for embedding in (self.words, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next character, shape (B, T, kinds), for characters of shape (B, T)."""
        h = self.words(x) + self.places(torch.arange(x.shape[1], device=x.device))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=h.dtype)
        for block in self.blocks:
            h = block(h, src_mask=mask, is_causal=True)
        return self.head(self.norm(h))  # type: ignore[no-any-return]
