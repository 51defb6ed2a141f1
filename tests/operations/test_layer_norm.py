"""Layer and root-mean-square normalisation in deviations, beside the functions themselves in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfc_lightning.operations.layer_norm import LayerNorm
from dfc_lightning.operations.layout import FIRST, Layout
from dfc_lightning.operations.operation import Frame, Slot

SHAPES = {
    "vectors": ((6, 5), (5,), FIRST),
    "maps": ((6, 3, 4), (3, 4), FIRST),
    "time first": ((3, 6, 5), (5,), Layout(1)),
}


def made(kind: str, shape: str, dtype: torch.dtype) -> tuple[LayerNorm, Frame, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size, over, layout = SHAPES[shape]
    x = torch.randn(size, generator=generator, dtype=torch.float64).mul(2).add(3).to(dtype)
    weight, bias = (torch.randn(over, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    function, rest = (F.layer_norm, [bias]) if kind == "layer" else (F.rms_norm, [1e-3])
    call = LayerNorm(function, [Slot(0), over, weight, *rest], {}, [Slot(0)], [Slot(1)], centred=kind == "layer")
    return call, Frame([x, call.at(lambda slot: x, dtype)[0]], 6, dtype, [layout, layout]), x


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-6, 1.0])
def test_a_deviation_keeps_its_digits(kind, shape, size):
    call, frame, x = made(kind, shape, torch.float32)
    d = size * torch.randn_like(x)
    (found,) = call.deviations(frame, [d, None])
    wide, run = x.double(), lambda v: call.at(lambda slot: v, torch.float64)[0]
    true = run(wide + d.double()) - run(wide)
    assert (found - true).norm() <= 1e-5 * true.norm()


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("shape", SHAPES)
def test_tangents_and_errors_are_the_derivatives(kind, shape):
    call, frame, x = made(kind, shape, torch.float64)
    run = lambda v: call.at(lambda slot: v, torch.float64)[0]  # noqa: E731
    d = torch.randn_like(x)
    _, true = torch.func.jvp(run, (x,), (d,))
    assert torch.allclose(call.tangents(frame, [d, None])[0], true, 1e-11, 1e-12)
    errors = [torch.randn_like(x) for _ in range(3)]
    (found,) = call.pulled(frame, [frame.layouts[1].joined(errors)])
    _, back = torch.func.vjp(run, x)
    for mine, error in zip(frame.layouts[0].split(found, 6), errors, strict=True):
        assert torch.allclose(mine, back(error)[0], 1e-11, 1e-12)
