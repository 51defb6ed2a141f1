"""The samples of a batch may lie in any dimension, folded with others or not, as long as they keep apart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases.chains import close
from torch import Tensor, nn

from dfc_lightning import DFC, Backprop, ControlledNetwork
from dfc_lightning.rules import MinimumNorm
from dfc_lightning.settling import Euler


class Net(nn.Module):
    """What ``run`` makes of three linear layers, a module, and 6 samples of 4 steps of 8 numbers."""

    def __init__(self, run: Callable[[Net, Tensor], Tensor], wide: int = 8, m: nn.Module | None = None) -> None:
        super().__init__()
        self.run, self.m = run, m
        self.a, self.b, self.c = nn.Linear(8, wide), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def attention(m: Net, x: Tensor) -> Tensor:
    q, k, v = m.a(x).reshape(x.shape[0], x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return m.c(m.b(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1))


def attention_by_hand(m: Net, x: Tensor) -> Tensor:
    """With heads folded into the batch and a mask of padding, as fairseq has it."""
    b, t, _ = x.shape
    q, k, v = m.a(x.transpose(0, 1)).chunk(3, dim=-1)
    q, k, v = (each.contiguous().view(t, b * 2, 4).transpose(0, 1) for each in (q, k, v))
    padding = (x[..., 0] > 0.5).repeat_interleave(2, dim=0)
    scores = torch.bmm(q, k.transpose(1, 2)).masked_fill(padding[:, None], -10.0)
    h = (scores.softmax(-1) @ v).transpose(0, 1).contiguous().view(t, b, 8)
    return m.c(m.b(h).mean(0))


def attention_by_sums(m: Net, x: Tensor) -> Tensor:
    q, k, v = m.a(x).view(*x.shape[:2], 3, 2, 4).unbind(2)
    weights = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
    return m.c(m.b(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2)).amax(1))


def folded(m: Net, x: Tensor) -> Tensor:
    return m.c(torch.relu(m.b(torch.relu(m.a(x.flatten(0, 1))))).reshape(x.shape[0], x.shape[1], -1).mean(1))


def folded_time_first(m: Net, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x.transpose(0, 1).flatten(0, 1)))
    h = h * torch.sigmoid(m.b(h)) + h
    return m.c(h.unflatten(0, (x.shape[1], -1)).mean(0))


def folded_between(m: Net, x: Tensor) -> Tensor:
    h = torch.relu(m.a(x)).flatten(0, 1)
    return m.c((F.max_pool1d(m.b(h), 3, 1, 1) + h).view(x.shape[0], -1, 8).sum(1))


def normalised(m: Net, x: Tensor) -> Tensor:
    h = m.m(m.a(x).flatten(0, 1)).view(x.shape).permute(1, 2, 0)
    return m.c(torch.relu(m.b(torch.tanh(h).permute(2, 0, 1)))[:, -1])


def stepped(m: Net, x: Tensor) -> Tensor:
    steps = torch.relu(m.a(x.transpose(0, 1)))
    h = torch.stack([torch.tanh(step) for step in steps], dim=2)
    return m.c(m.b(h.movedim(2, 1))[:, [0, 2, 3]].max(1).values)


def windows(m: Net, x: Tensor) -> Tensor:
    h = torch.relu(m.a(x)).view(x.shape[0], 2, 2, 8).reshape(-1, 2, 8)
    h = m.b(h).softmax(1) * h
    return m.c(h.view(x.shape[0], 4, 8).mean(1))


def conv_of_frames(m: Net, x: Tensor) -> Tensor:
    maps = m.m(x.reshape(-1, 2, 2, 2))
    h = F.max_pool2d(torch.relu(maps), 2, 1).flatten(1).unflatten(0, (x.shape[0], x.shape[1]))
    return m.c(torch.tanh(m.b(torch.relu(m.a(h)))).mean(1))


def twins(m: Net, x: Tensor) -> Tensor:
    one, two = torch.tanh(m.a(torch.cat([x[:, 0], x[:, 1]]))).chunk(2)
    return m.c(torch.relu(m.b(one)) - two)


def tokens(m: Net, x: Tensor) -> Tensor:
    return m.c(torch.relu(m.b(torch.relu(m.a(x)))).flatten(0, 1))


def tokens_that_mix(m: Net, x: Tensor) -> Tensor:
    h = torch.relu(m.a(x))
    return m.c(torch.relu(m.b(h + h.mean(1, keepdim=True)))).flatten(0, 1)


def recurrent(m: Net, x: Tensor) -> Tensor:
    return m.c(torch.relu(m.b(m.m(m.a(x.transpose(0, 1)))[0][-1])))


def recurrent_from(m: Net, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x[:, 0])).unsqueeze(0)
    return m.c(m.b(m.m(x, (h, h.cos()))[0][:, -1]))


def attending(m: Net, x: Tensor) -> Tensor:
    padding = torch.zeros(x.shape[:2], dtype=torch.bool)
    padding[::2, -1] = True
    return m.c(m.b(m.m(h := torch.tanh(m.a(x)), h, x, key_padding_mask=padding)[0]).mean(1))


def encoded(m: Net, x: Tensor) -> Tensor:
    return m.c(m.b(m.m(m.a(x))).mean(1))


def table_added(m: Net, x: Tensor) -> Tensor:
    place = torch.linspace(-1, 1, x.shape[1] * 8, dtype=x.dtype).view(x.shape[1], 8)  # no buffer
    return m.c(m.b(torch.tanh(m.a(x) + place)).mean(1))


class Case(NamedTuple):
    """A forward pass; how wide its first layer is; a module in it; whether that is named; and a loss's labels."""

    run: Callable[[Net, Tensor], Tensor]
    wide: int = 8
    module: Callable[[], nn.Module] | None = None
    named: bool = False
    labels: int = 1


CASES = {
    "attention": Case(attention, 24),
    "attention by hand": Case(attention_by_hand, 24),
    "attention by sums": Case(attention_by_sums, 24),
    "frames folded": Case(folded),
    "frames folded, time first": Case(folded_time_first),
    "frames folded between layers": Case(folded_between),
    "normalised over samples and time": Case(normalised, module=lambda: nn.BatchNorm1d(8)),
    "time first, step by step": Case(stepped),
    "windows": Case(windows),
    "frames convolved": Case(conv_of_frames, module=lambda: nn.Conv2d(2, 8, 1)),
    "twins": Case(twins),
    "tokens": Case(tokens, labels=4),
    "tokens that mix": Case(tokens_that_mix, labels=4),
    "recurrent": Case(recurrent, module=lambda: nn.GRU(8, 8), named=True),
    "recurrent from a state": Case(recurrent_from, module=lambda: nn.LSTM(8, 8, batch_first=True), named=True),
    "attending": Case(attending, module=lambda: nn.MultiheadAttention(8, 2, batch_first=True), named=True),
    "encoded": Case(encoded, module=lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), named=True),
    "a table added": Case(table_added),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    torch.manual_seed(0)
    return CASES[request.param]


def controlled(case: Case) -> ControlledNetwork:
    net = Net(case.run, case.wide, None if case.module is None else case.module()).double()
    return ControlledNetwork(net, extra_points=["m"] if case.named else [])


def data(case: Case, batch: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 4, 8, dtype=torch.float64), torch.arange(batch * case.labels) % 3


def check_gradients(case: Case, batches: Sequence[int]) -> None:
    """Those of one network, for batches of these sizes, are backprop's."""
    net = controlled(case)
    for batch in batches:
        x, y = data(case, batch)
        plain = copy.deepcopy(net.module)
        plain.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        net.module.zero_grad()
        with net.taught_by(Backprop()):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        for ours, theirs in zip(net.module.parameters(), plain.parameters()):
            assert (ours.grad - theirs.grad).norm() <= 1e-10 * theirs.grad.norm() + 1e-14


def test_gradients_are_those_of_backprop(case):
    check_gradients(case, (6, 5, 4, 1 if case.run is not normalised else 3))  # 4: as many as steps


def test_the_first_batch_may_have_as_many_samples_as_steps(case):
    check_gradients(case, (4, 6))


def test_it_settles(case):
    net = controlled(case)
    x, y = data(case)
    with net.taught_by(DFC()) as lesson:
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    assert lesson.settled.converged.all()
    assert all(p.grad.isfinite().all() for p in net.module.parameters())


def test_a_push_has_the_effect_that_the_jacobian_says(case):
    """To first order; and the Jacobian's products are each other's transpose."""
    net = controlled(case)
    forward = net.observe(data(case)[0])
    driven = [torch.randn_like(v) for v in forward.v]
    error = torch.randn_like(forward.output)
    response = forward.linear_response(driven)
    small = forward.respond([1e-6 * d for d in driven]).output
    pulled = forward.pull(error)
    assert [p.shape for p in pulled] == [v.shape for v in forward.v]
    assert close(small * 1e6, response, 1e-4)
    assert close((error * response).sum(), sum((p * d).sum() for p, d in zip(pulled, driven)), 1e-9)
    columns = (
        torch.cat(forward.jacobians(), 2) @ torch.cat([d.flatten(1) for d in forward.gathered(driven)], 1)[..., None]
    )
    assert close(columns[..., 0], response, 1e-9)
    some = forward.samples(torch.arange(0, forward.batch_size, 2))
    assert close(some.respond([d[::2] for d in driven]).output, forward.respond(driven).output[::2], 1e-9)
    assert close(some.output, forward.output[::2], 1e-12)


RULES = {"minimum norm": MinimumNorm(), "simulated": DFC(settling=Euler(steps=5), integrate=True)}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_other_rules_teach_it_too(case, rule):
    net = controlled(case)
    x, y = data(case)
    with net.taught_by(rule):
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.module.parameters() if p is not None)
