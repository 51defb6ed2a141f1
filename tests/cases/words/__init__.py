"""All words of :mod:`cases.grammar`, and what a seed makes of them."""

from __future__ import annotations

import random

import torch
from torch import nn

from cases.grammar import Grower, Sample, Step, Words
from cases.words import branches, functions, layers, shapes, writing
from cases.words.losses import LOSSES

WORDS = Words([*layers.WORDS, *functions.WORDS, *branches.WORDS, *shapes.WORDS, *writing.WORDS])


def grow(seed: int) -> Sample:
    """The sample of a seed."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        rng = random.Random(seed)
        g = Grower(rng, WORDS, rng.choice([3, 4, 4, 5, 6]))
        shape = [(g.size(),), (g.size(), g.size()), (rng.choice([2, 3, 4]), 4, rng.choice([3, 4, 5]))][rng.randrange(3)]
        x = h = torch.randn(g.batch, *shape, dtype=torch.float64)
        layer = lambda word: word.startswith("layer")  # noqa: E731
        steps: list[Step] = []
        for k in range(rng.randrange(3, 9)):
            step, h = g.then(h, layer if k in (0, 3) else lambda word: True)
            steps.append(step)
        end = g.new(nn.Linear(h[0].numel(), rng.choice([2, 3, 3, 4])))
        steps += [lambda v: v.flatten(1), end]
        module = g.module
        module.parts.extend(g.parts)
        module.steps = steps
        outputs = end.out_features
        other = torch.randn(rng.choice([g.batch, g.batch, 2, 7, 8]), *shape, dtype=torch.float64)
        batches = [(b, torch.randint(outputs, (len(b),))) for b in (x, other)]
        name, loss, reduction = LOSSES[rng.choices(range(len(LOSSES)), [entry[3] for entry in LOSSES])[0]][:3]
    return Sample(module.train(), [*g.words, name], batches, loss, reduction, g.held, g.tolerance)
