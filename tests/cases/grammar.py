"""A grammar of small modules: a seed gives a module that nobody would write, and batches for it.

A word is a function of a :class:`Grower` and what has been computed so far, h of the shape (B, …). It returns what to
do next with such a tensor, or None where it does not fit. Modules are grown again for every use, as their words hold
the layers that they call.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Step = Callable[[Tensor], Tensor]
Word = Callable[["Grower", Tensor], "Step | None"]


class Words(list[tuple[str, Word, float]]):
    """Words by name, and how often each comes beside the others."""

    def word(self, weight: float) -> Callable[[Word], Word]:
        """Enter a word under its function's name."""

        def enter(function: Word) -> Word:
            self.append((function.__name__.replace("_", " "), function, weight))
            return function

        return enter

    def one_of(self, name: str, weight: float, *steps: Step) -> None:
        """Enter steps without parts of their own."""
        for k, step in enumerate(steps):
            self.append((f"{name} {k}", lambda g, h, step=step: step, weight / len(steps)))


LARGEST = 96
"""Numbers of a sample."""


class Grown(nn.Module):
    """A module made of words."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        self.steps: list[Step] = []
        self.hidden: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = []
        for step in self.steps:
            x = step(x)
        return x


@dataclass
class Sample:
    """A module, the words it is made of, and how it learns.

    Args:
        module: the module, in float64 and training mode.
        words: their names.
        batches: inputs and labels.
        loss: of a module and a batch.
        reduction: of the loss.
        held: whether something in it stays feedforward under control, or is drawn anew: no two runs tell it then.
        tolerance: of gradients; larger where numbers are rounded on purpose.
    """

    module: Grown
    words: list[str]
    batches: list[tuple[Tensor, Tensor]]
    loss: Callable[[Grown, Tensor, Tensor], Tensor]
    reduction: str = "mean"
    held: bool = False
    tolerance: float = 1e-9


@dataclass
class Grower:
    """What words draw on.

    Args:
        rng: all choices.
        vocabulary: all words.
        batch: B of the tensors that words are tried on.
    """

    rng: random.Random
    vocabulary: Words
    batch: int
    parts: list[nn.Module] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    module: Grown = field(default_factory=Grown)
    held: bool = False
    tolerance: float = 1e-9

    def size(self) -> int:
        """A small number, likely that of something else too."""
        return self.rng.choice([2, 3, 4, 4, 5, 6, 6, 8])

    def new(self, part: nn.Module) -> nn.Module:
        """A part of the module, its parameters anywhere."""
        for parameter in part.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        self.parts.append(part.double())
        return part

    def pick(self, ways: Sequence[Step]) -> Step:
        """One of some steps; its number is a word of its own."""
        k = self.rng.randrange(len(ways))
        self.words.append(f"#{k}")
        return ways[k]

    def pick_part(self, parts: Sequence[nn.Module]) -> nn.Module:
        """One of some parts; its kind is a word of its own."""
        part = self.rng.choice(parts)
        self.words.append(type(part).__name__)
        return self.new(part)

    def dim(self, h: Tensor) -> int:
        """A dimension of a sample."""
        return self.rng.randrange(1, h.dim())

    def then(self, h: Tensor, only: Callable[[str], bool] = lambda word: True, deep: int = 0) -> tuple[Step, Tensor]:
        """A word that fits, and what it makes of ``h``."""
        names, words, weights = zip(*(entry for entry in self.vocabulary if only(entry[0])))
        for _ in range(60):
            parts, said, held = len(self.parts), len(self.words), self.held
            (k,) = self.rng.choices(range(len(words)), weights)
            try:
                self.words.append(names[k])
                step = words[k](self, h.clone())
                if step is not None:
                    out = step(h.clone()).detach()
                    apart = out.dim() > 1 and out.shape[0] == len(h) and out.is_floating_point()
                    if apart and 0 < out[0].numel() <= LARGEST and out.isfinite().all() and out.dim() <= 4:
                        return step, out
            except (RuntimeError, IndexError, ValueError, TypeError):
                pass  # does not fit
            del self.parts[parts:], self.words[said:]
            self.held = held
        return (lambda x: x), h

    def branch(self, h: Tensor, length: int) -> tuple[Step, Tensor]:
        """Some words in a row, no branches again."""
        steps = []
        for _ in range(length):
            step, h = self.then(h, lambda word: not word.startswith("branch"))
            steps.append(step)

        def run(x: Tensor) -> Tensor:
            for step in steps:
                x = step(x)
            return x

        return run, h
