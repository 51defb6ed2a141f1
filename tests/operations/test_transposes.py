"""Every operation passes errors back by the transpose of how it passes deviations on, and both are autograd's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from cases.chains import NETWORKS as CHAINS
from cases.chains import close, make
from cases.graphs import NETWORKS, GraphCase
from cases.through import NETS, made, swapped
from torch import Tensor, nn

from dfc_lightning import ControlledNetwork, ForwardPass

TIGHT = 1e-10
FIRST: dict[int, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    0: lambda: (nn.Linear(5, 12), (5,)),
    1: lambda: (nn.Conv1d(2, 4, 3, padding=1), (2, 8)),
    2: lambda: (nn.Conv2d(2, 4, 3, padding=1), (2, 6, 6)),
    3: lambda: (nn.Conv3d(2, 4, 3, padding=1), (2, 4, 4, 4)),
}
"""The layer before the operation, and a sample's shape: it returns 12 numbers, or maps of 4 channels."""


class Around(nn.Module):
    """A layer, an operation, a layer."""

    def __init__(self, dims: int, between: Callable[[Tensor], Tensor] | nn.Module) -> None:
        super().__init__()
        self.a, self.shape = FIRST[dims]()
        self.between = between
        with torch.no_grad():
            width = self.rest(self.a(torch.randn(2, *self.shape)), flat=True).shape[1]
        self.b = nn.Linear(width, 3)

    def rest(self, v: Tensor, flat: bool = False) -> Tensor:
        h = self.between(v).flatten(1)
        return h if flat else self.b(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.a(x))


def chunks(h: Tensor) -> Tensor:
    one, other, *_ = h.chunk(3, dim=1)
    return one * other


def attention(h: Tensor) -> Tensor:
    q, k, v = h.view(-1, 3, 2, 2).unbind(1)
    return F.scaled_dot_product_attention(q, k, v)


def unbound(h: Tensor) -> Tensor:
    return torch.stack([each.tanh() for each in h.unbind(2)], dim=1)


OPERATIONS: dict[str, tuple[int, Callable[[], Callable[[Tensor], Tensor]]]] = {
    # Layers
    "linear": (0, lambda: nn.Linear(12, 4)),
    "linear of positions": (1, lambda: nn.Linear(8, 3)),
    "conv1d, strided": (1, lambda: nn.Conv1d(4, 3, 3, stride=2)),
    "conv1d, dilated": (1, lambda: nn.Conv1d(4, 3, 3, dilation=2, padding=1)),
    "conv2d": (2, lambda: nn.Conv2d(4, 3, 3)),
    "conv2d, padded and strided": (2, lambda: nn.Conv2d(4, 3, (3, 2), stride=(2, 1), padding=(1, 0))),
    "conv2d, grouped": (2, lambda: nn.Conv2d(4, 6, 3, groups=2)),
    "conv2d, depthwise": (2, lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1)),
    "conv2d, dilated": (2, lambda: nn.Conv2d(4, 3, 3, dilation=2, padding=2)),
    "conv2d, same": (2, lambda: nn.Conv2d(4, 3, 3, padding="same")),
    "conv2d, same and dilated": (2, lambda: nn.Conv2d(4, 3, 3, padding="same", dilation=2)),
    "conv2d, circular": (2, lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular")),
    "conv2d, reflecting": (2, lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect")),
    "conv2d without bias": (2, lambda: nn.Conv2d(4, 3, 3, bias=False)),
    "conv3d": (3, lambda: nn.Conv3d(4, 3, 2, stride=2)),
    "transposed conv1d": (1, lambda: nn.ConvTranspose1d(4, 3, 3, stride=2, output_padding=1)),
    "transposed conv2d": (2, lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1)),
    "transposed conv2d, grouped": (2, lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2)),
    "transposed conv3d": (3, lambda: nn.ConvTranspose3d(4, 2, 2)),
    # Normalisation
    "batch norm of units": (0, lambda: nn.BatchNorm1d(12)),
    "batch norm of maps": (2, lambda: nn.BatchNorm2d(4)),
    "batch norm of volumes": (3, lambda: nn.BatchNorm3d(4)),
    "batch norm, not affine": (2, lambda: nn.BatchNorm2d(4, affine=False)),
    "batch norm without statistics": (2, lambda: nn.BatchNorm2d(4, track_running_stats=False)),
    "batch norm in evaluation": (2, lambda: nn.BatchNorm2d(4).eval()),
    "batch norm in evaluation, not affine": (2, lambda: nn.BatchNorm2d(4, affine=False).eval()),
    "group norm": (2, lambda: nn.GroupNorm(2, 4)),
    "group norm, not affine": (2, lambda: nn.GroupNorm(2, 4, affine=False)),
    "instance norm": (2, lambda: nn.InstanceNorm2d(4)),
    "layer norm": (0, lambda: nn.LayerNorm(12)),
    "layer norm of maps": (2, lambda: nn.LayerNorm([4, 6, 6])),
    "rms norm": (0, lambda: nn.RMSNorm(12)),
    # Pooling
    "max pooling": (2, lambda: nn.MaxPool2d(2)),
    "max pooling, overlapping": (2, lambda: nn.MaxPool2d(3, stride=1)),
    "max pooling, padded": (2, lambda: nn.MaxPool2d(3, stride=2, padding=1)),
    "max pooling, dilated": (2, lambda: nn.MaxPool2d(2, stride=1, dilation=2)),
    "max pooling in one dimension": (1, lambda: nn.MaxPool1d(3, stride=2, padding=1)),
    "max pooling in three": (3, lambda: nn.MaxPool3d(2)),
    "adaptive max pooling": (2, lambda: nn.AdaptiveMaxPool2d(4)),
    "average pooling": (2, lambda: nn.AvgPool2d(3, stride=2, padding=1)),
    "average pooling in one dimension": (1, lambda: nn.AvgPool1d(3, stride=1)),
    "average pooling in three": (3, lambda: nn.AvgPool3d(2)),
    "adaptive average pooling": (2, lambda: nn.AdaptiveAvgPool2d(4)),
    # Joints and shapes
    "cat": (1, lambda: lambda h: torch.cat([h.tanh(), h[:, :2]], dim=1)),
    "stack": (1, lambda: lambda h: torch.stack([h.tanh(), h], dim=2)),
    "chunk": (1, lambda: chunks),
    "split": (1, lambda: lambda h: h.split([1, 3], dim=1)[1]),
    "unbind": (1, lambda: unbound),
    "permute": (2, lambda: lambda h: h.permute(0, 3, 1, 2).tanh()),
    "transpose": (1, lambda: lambda h: h.transpose(1, 2).softmax(1)),
    "flip and roll": (1, lambda: lambda h: h.flip(2) + h.roll(1, 2)),
    "squeeze and unsqueeze": (0, lambda: lambda h: h.unsqueeze(1).tanh().squeeze(1)),
    "narrow": (0, lambda: lambda h: h.narrow(1, 2, 5)),
    "index": (1, lambda: lambda h: h[:, [0, 0, 3], 2:]),
    "expand": (1, lambda: lambda h: h * h.mean(2, keepdim=True).expand(-1, -1, 8)),
    "padding": (2, lambda: nn.ZeroPad2d((1, 0, 2, 1))),
    "upsampling": (2, lambda: nn.Upsample(scale_factor=2, mode="bilinear")),
    "pixel shuffle": (2, lambda: nn.PixelShuffle(2)),
    # Arithmetic
    "add": (0, lambda: lambda h: h + h.sigmoid()),
    "add with alpha": (0, lambda: lambda h: torch.add(h, h.tanh(), alpha=-0.3)),
    "sub with alpha": (0, lambda: lambda h: torch.sub(h.tanh(), h, alpha=2)),
    "reversed sub": (0, lambda: lambda h: 1 - h.tanh()),
    "neg": (0, lambda: lambda h: -h),
    "mul": (0, lambda: lambda h: h * h.sigmoid()),
    "mul by a number": (0, lambda: lambda h: 0.3 * h),
    "square": (0, lambda: lambda h: h * h),
    "div": (0, lambda: lambda h: h / (1 + h.square())),
    "matmul": (1, lambda: lambda h: h @ h.mT),
    "einsum": (1, lambda: lambda h: torch.einsum("bct,bdt->bcd", h, h.tanh())),
    "mean": (2, lambda: lambda h: h.mean((2, 3))),
    "sum": (1, lambda: lambda h: h.sum(2)),
    "amax": (1, lambda: lambda h: h.amax(2)),
    "top values": (0, lambda: lambda h: h.topk(4, dim=1).values),
    "where": (0, lambda: lambda h: torch.where(h > 0, h, 0.2 * h)),
    "masked fill": (0, lambda: lambda h: h.masked_fill(h.abs() < 0.3, 0.0)),
    "softmax": (0, lambda: lambda h: h.softmax(1)),
    "attention": (0, lambda: attention),
    # Nonlinearities
    "relu": (0, lambda: nn.ReLU()),
    "relu in place": (0, lambda: nn.ReLU(inplace=True)),
    "tanh": (0, lambda: torch.tanh),
    "sigmoid": (0, lambda: torch.sigmoid),
    "leaky_relu": (0, lambda: nn.LeakyReLU(0.2)),
    "gelu": (0, lambda: nn.GELU()),
    "gelu, approximate": (0, lambda: nn.GELU(approximate="tanh")),
    "silu": (0, lambda: nn.SiLU()),
    "elu": (0, lambda: nn.ELU(0.7)),
    "softplus": (0, lambda: nn.Softplus(beta=2)),
    "hardtanh": (0, lambda: nn.Hardtanh(-0.5, 0.7)),
    "relu6": (0, lambda: nn.ReLU6()),
    "prelu, frozen": (0, lambda: nn.PReLU().requires_grad_(False)),
    "glu": (0, lambda: nn.GLU(dim=1)),
}


def around(name: str) -> tuple[Around, Tensor]:
    dims, between = OPERATIONS[name]
    torch.manual_seed(0)
    module = Around(dims, between()).double()
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer += 0.3 * torch.rand_like(buffer)
    return module, torch.randn(5, *module.shape, dtype=torch.float64)


def places(name: str, module: nn.Module, net: ControlledNetwork) -> list[str]:
    """The submodules whose outputs are the points: the layers, or the normalisations that alone hear them."""
    names = {id(m): n for n, m in module.named_modules()}
    untaught = name.endswith("not affine") or name == "instance norm"
    of_layers = {"a": "between" if untaught else "a"}
    return [of_layers.get(p.name, p.name) if p.norm is None else names[id(p.norm)] for p in net.points]


def like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn_like(t) for t in tensors]


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(sum((x * y).detach().sum() for x, y in zip(a, b)))


def are_transposes(forward: ForwardPass, tolerance: float = TIGHT) -> bool:
    """⟨e, J d⟩ = ⟨Jᵀ e, d⟩, beside what the two are made of."""
    deviations, error = like(forward.v), torch.randn_like(forward.output)
    ahead, back = forward.linear_response(deviations), forward.pull(error)
    assert all(p.shape == v.shape for p, v in zip(back, forward.v)) and any(p.any() for p in back)
    return abs(inner([error], [ahead]) - inner(back, deviations)) <= tolerance * float(error.norm() * ahead.norm())


@pytest.mark.parametrize("name", OPERATIONS)
def test_errors_go_back_by_the_transpose_of_how_deviations_go_on(name):
    module, x = around(name)
    assert are_transposes(ControlledNetwork(module, general=True).observe(x))


@pytest.mark.parametrize("name", OPERATIONS)
def test_errors_are_autograd_s(name):
    module, x = around(name)
    net = ControlledNetwork(module, general=True)
    forward = net.observe(x)
    error = torch.randn_like(forward.output)
    seen: dict[str, Tensor] = {}

    def keep(point: str) -> Callable[..., Tensor]:
        def hook(m: nn.Module, args: object, out: Tensor) -> Tensor:
            seen[point] = out
            return out.clone()  # what follows may work in place

        return hook

    points = places(name, module, net)
    handles = [module.get_submodule(p).register_forward_hook(keep(p)) for p in points]
    output = module(x)
    for handle in handles:
        handle.remove()
    assert close(forward.output, output.detach(), TIGHT)
    for pulled, true in zip(
        forward.pull(error, live=True), torch.autograd.grad(output, [seen[p] for p in points], error), strict=True
    ):
        assert (pulled - true).norm() <= TIGHT * true.norm()


@pytest.mark.parametrize("name", OPERATIONS)
def test_several_errors_of_every_sample_go_back_as_each_by_itself(name):
    module, x = around(name)
    forward = ControlledNetwork(module, general=True).observe(x)
    errors = [torch.randn_like(forward.output) for _ in range(3)]
    for live in (False, True):
        together = forward.pull(torch.cat(errors), live=live)
        alone = [torch.cat(each) for each in zip(*(forward.pull(e, live=live) for e in errors))]
        assert all((a - b).norm() <= 1e-12 * b.norm() for a, b in zip(together, alone, strict=True))


BATCH = ("batch norm",)


@pytest.mark.parametrize("name", [n for n in OPERATIONS if not n.startswith(BATCH) or "evaluation" in n])
@pytest.mark.parametrize("size", [1e-7, 1.0])
def test_deviations_are_differences_of_two_passes(name, size):
    module, x = around(name)
    net = ControlledNetwork(module, general=True)
    forward = net.observe(x)
    pushes = [size * d for d in like(forward.v)]
    handles = [
        module.get_submodule(p).register_forward_hook(lambda m, args, out, push=push: out + push)
        for p, push in zip(places(name, module, net), pushes)
    ]
    with torch.no_grad():
        moved = module(x)
    for handle in handles:
        handle.remove()
    found = forward.respond(pushes).output
    assert (found - (moved - forward.output)).norm() <= 1e-9 * found.norm() + 1e-14 * moved.norm()


@pytest.mark.parametrize("name", CHAINS)
def test_the_closed_forms_of_a_chain_are_transposes_too(name):
    assert are_transposes(make(name, "unruly").forward)


@pytest.mark.parametrize("name", NETWORKS)
def test_so_are_whole_networks_and_what_is_shared_by_the_units_of_a_port(name):
    forward = GraphCase(name, conv_feedback="channel").forward
    assert are_transposes(forward)
    ports = [torch.randn(forward.batch_size, n, dtype=torch.float64) for n in forward.widths]
    errors, spread = like(forward.v), forward.spread(ports)
    assert abs(inner(errors, spread) - inner(forward.gathered(errors), ports)) <= TIGHT * abs(inner(errors, errors))


# Elsewhere than at the feedforward state, and through other weights


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_s_errors_at_a_controlled_state_are_autograd_s(name):
    case = make(name, "unruly")
    torch.manual_seed(0)
    pushes = [t.requires_grad_() for t in like(case.forward.v)]
    error = torch.randn_like(case.forward.output)
    true = torch.autograd.grad(case.output(pushes), pushes, error)
    state = case.forward.respond([p.detach() for p in pushes])
    for pulled, expected in zip(case.forward.pull(error, at=state), true):
        assert close(pulled, expected, TIGHT)
    gains = [torch.autograd.grad(case.output(pushes)[:, k].sum(), pushes) for k in range(error.shape[1])]
    rows = [sum(g @ q for g, q in zip(each, case.feedback)) for each in gains]
    assert close(case.forward.gain(state), torch.stack(rows, dim=1), TIGHT)


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_s_errors_at_a_controlled_state_are_autograd_s(name):
    case = GraphCase(name)
    torch.manual_seed(0)
    pushes = [t.requires_grad_() for t in like(case.forward.v)]
    error = torch.randn_like(case.forward.output)
    output, _ = case.run(pushes)
    true = torch.autograd.grad(output, pushes, error, retain_graph=True)
    state = case.forward.respond([p.detach() for p in pushes])
    for pulled, expected in zip(case.forward.pull(error, at=state), true):
        assert (pulled - expected).norm() <= TIGHT * expected.norm()
    still = case.forward.pull(error)
    assert any((a - b).norm() > 0.01 * b.norm() for a, b in zip(still, true))  # it does matter where
    rows = []
    for k in range(error.shape[1]):
        each = torch.autograd.grad(output[:, k].sum(), pushes, retain_graph=True)
        rows.append(sum(g @ q for g, q in zip(case.forward.gathered(each), case.forward.feedback)))
    assert close(case.forward.gain(state), torch.stack(rows, dim=1), 1e-9)


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_errors_through_other_weights_are_autograd_s_of_a_net_with_these_on_the_way_back(name, general):
    module, x, _ = made(name)
    net = ControlledNetwork(module, general=general)
    forward = net.observe(x)
    weights = like([p.weight for p in net.points])
    names = [p.name for p in net.points]
    twin = swapped(module, names, weights)
    seen: list[Tensor] = []
    norms = {id(m): n for n, m in module.named_modules()}
    for point in net.points:
        at = point.name if point.norm is None else norms[id(point.norm)]
        twin.get_submodule(at).register_forward_hook(lambda m, args, out: seen.append(out))
    output = twin(x)
    error = torch.randn_like(output)
    true = torch.autograd.grad(output, seen, error)
    found = forward.pull(error, through=weights)
    for pulled, expected in zip(found, true, strict=True):
        assert close(pulled, expected, TIGHT)
    assert not close(found[0], forward.pull(error)[0], 0.3)
    for pulled, expected in zip(forward.pull(error, through=[p.weight for p in net.points]), forward.pull(error)):
        assert close(pulled, expected, TIGHT)
