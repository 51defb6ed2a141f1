"""What becomes of the samples of :mod:`cases.grammar`; ``python -m cases.fuzz 0 5000`` tells it of many seeds."""

from __future__ import annotations

import re
import sys
import traceback
import warnings
from collections import Counter
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cases.grammar import Sample
from cases.words import grow
from dfc_lightning import DFC, Backprop, ControlError, ControlledNetwork

NAMED = re.compile(r"'?\bparts\.\d+|operation (?!that)\w+|\bin \w+,|call of \w+|detach\(\)")
"""A layer or an operation."""


class Outcome(NamedTuple):
    """What became of a sample."""

    kind: Literal["trained", "refused", "unfit", "wrong"]
    told: str
    sample: Sample | None = None


def gradients(
    sample: Sample, batch: int, seed: int, network: ControlledNetwork | None = None, rule=None
) -> list[Tensor]:
    """Of all parameters, after one step; by plain autograd without a network."""
    x, y = sample.batches[batch]
    sample.module.zero_grad()
    torch.manual_seed(seed)
    if network is None:
        sample.loss(sample.module, x.clone(), y).backward()
    else:
        with network.taught_by(rule or Backprop(), sample.reduction):
            loss = sample.loss(sample.module, x.clone(), y)
        loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in sample.module.parameters()]


def plain(seed: int) -> tuple[list[list[Tensor]], list[Tensor]] | None:
    """Gradients of each batch, and the buffers in the end; None where autograd cannot or nothing is finite."""
    sample = grow(seed)
    try:
        found = [gradients(sample, batch, seed) for batch in range(2)]
    except (RuntimeError, IndexError, ValueError, TypeError):
        return None
    if not all(g.isfinite().all() for grads in found for g in grads):
        return None
    return found, [b.clone() for b in sample.module.buffers()]


def rounding(seed: int, batch: int) -> float:
    """How far plain gradients move with the last digits of the input, many times over."""
    found = []
    for scale in (1.0, 1 + 1e-13):
        sample = grow(seed)
        sample.batches = [(scale * x, y) for x, y in sample.batches]
        found.append([gradients(sample, k, seed) for k in range(batch + 1)][-1])
    return 10 * float(sum((a - b).square().sum() for a, b in zip(*found)).sqrt())


def pushed(seed: int, network: ControlledNetwork, voltages: list[Tensor], driven: list[Tensor]) -> Tensor | None:
    """The module's output, which is the network's, with voltages driven; None where a module does not return them.

    The point of a module that goes on to something else, or whose voltage a normalisation without parameters alone
    hears, lies within it, or behind.
    """
    outputs = []
    for drive in (False, True):
        twin, returned = grow(seed), []
        for point, push in zip(network.points, driven):
            at = next(
                b
                for a, b in zip(network.module.modules(), twin.module.modules())
                if a is (point.layer if point.norm is None else point.norm)
            )

            at.register_forward_hook(lambda m, args, out, kept=returned: kept.append(out.detach().clone()))
            if drive:
                at.register_forward_hook(lambda m, args, out, push=push: out + push)
        torch.manual_seed(seed)
        outputs.append(twin.module(twin.batches[0][0].clone()).detach())
        if not drive and not all(r.shape == v.shape and torch.allclose(r, v) for r, v in zip(returned, voltages)):
            return None
    return outputs[1]


def outcome(seed: int, deep: bool = True) -> Outcome:
    """Train a sample by backprop under control, and see whether it is what autograd makes of it.

    Args:
        seed: of the sample.
        deep: ask also for a step of DFC, and whether it responds to being driven as it does when run.
    """
    expected = plain(seed)
    sample = grow(seed)
    if expected is None:
        return Outcome("unfit", "", sample)
    try:
        for observed in (False, True):
            sample = grow(seed)
            network = ControlledNetwork(sample.module, seed=0)
            if observed:
                torch.manual_seed(seed + 1)
                network.observe(sample.batches[0][0].clone())
            for batch, theirs in enumerate(expected[0]):
                ours = gradients(sample, batch, seed, network)
                whole = float(torch.cat([g.flatten() for g in theirs]).norm())
                for (name, _), a, b in zip(sample.module.named_parameters(), ours, theirs):
                    apart = float((a - b).norm())
                    if not apart <= sample.tolerance * (whole + 1e-3) and not apart <= rounding(seed, batch):
                        return Outcome(
                            "wrong",
                            f"gradient of {name} {apart:.1e} of {whole:.1e} apart, batch {batch}, observed {observed}",
                            sample,
                        )
            for (name, a), b in zip(sample.module.named_buffers(), expected[1]):
                if not torch.allclose(a.double(), b.double(), 1e-9, 1e-9):
                    return Outcome("wrong", f"buffer {name} differs, observed {observed}", sample)
        if deep:
            torch.manual_seed(seed)
            forward = network.observe(sample.batches[0][0].clone())
            driven = [0.1 * torch.randn_like(v) for v in forward.v]
            if not sample.held:
                output, response = pushed(seed, network, forward.v, driven), forward.respond(driven).output
                change = response if output is None else output - forward.output
                if not (response - change).norm() <= 10 * sample.tolerance * (change.norm() + 1):
                    return Outcome(
                        "wrong",
                        f"response {float((response - change).norm()):.1e} of {float(change.norm()):.1e} apart",
                        sample,
                    )
            taught = gradients(sample, 0, seed, network, DFC())
            if not all(g.isfinite().all() for g in taught):
                return Outcome("wrong", "a step of DFC is not finite", sample)
    except ControlError as error:
        return Outcome("refused" if NAMED.search(str(error)) else "wrong", f"{type(error).__name__}: {error}", sample)
    except Exception as error:
        return Outcome("wrong", f"{type(error).__name__}: {error} {traceback.format_exc(limit=-3)}", sample)
    return Outcome("trained", "", sample)


def main(first: int, last: int) -> None:
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    warnings.simplefilter("ignore")
    for seed in range(first, last):
        found = outcome(seed)
        counts[found.kind] += 1
        if found.kind == "wrong":
            print(seed, found.told[:1500], "|", ", ".join(found.sample.words), flush=True)
        if found.kind == "refused":
            reasons[re.sub(r"'[^']*'|\([^)]*\)|\d+", "…", found.told)[:110]] += 1
    print(dict(counts))
    for reason, count in reasons.most_common(40):
        print(count, reason)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
