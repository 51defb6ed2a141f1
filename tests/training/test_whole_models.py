"""Tokens, attention, tied weights and recurrence through the Trainer: they learn, ranks equal one, runs go on."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from cases.fits import Innocent, clusters, differing, loader, quiet, saver
from cases.interruptions import Interrupt, raise_at
from cases.processes import EVERYTHING, Witnessed, fit, furthest, learned, trained_on_two
from torch import Tensor, nn

from dfc_lightning import DFC, DFCStrategy, KolenPollack, LayeredDFC, PredictiveCoding


class Mixed(nn.Module):
    """A class token and positions, attention, a layer that is called twice, and two that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.attention = nn.Linear(2, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.randn(4, 8) / 4)
        self.norm, self.step, self.one, self.two = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight, self.act, self.head = self.one.weight, nn.PReLU(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), self.patch(x.view(-1, 3, 2))], 1) + self.places
        h = h + self.attention(n := self.norm(h), n, n, need_weights=False)[0]
        h = h.mean(1)
        for _ in range(2):
            h = h + torch.tanh(self.step(h))
        return self.head(self.two(self.act(self.one(h))))


class Rows(nn.Module):
    """A recurrent layer of torch's over three steps."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.head = nn.GRU(2, 10, batch_first=True), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.reads(x.view(-1, 3, 2))[0][:, -1])


NETS: dict[str, type[nn.Module]] = {"mixed": Mixed, "rows": Rows}
RULES: dict[str, dict[str, Any]] = {
    "layered DFC": {"rule": LayeredDFC()},
    "direct DFC": {"rule": DFC(), "feedback": EVERYTHING},
    "Kolen-Pollack": {"rule": KolenPollack()},
    "predictive coding": {"rule": PredictiveCoding()},
}
CASES = [
    "mixed, layered DFC",
    "mixed, direct DFC",
    "mixed, Kolen-Pollack",
    "rows, layered DFC",
    "rows, predictive coding",
]


def with_net(module: Any, case: str) -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module.net = NETS[case.split(", ")[0]]()
    return module


def fitted(case: str, processes: int, at_call: Any = None, **settings: Any) -> tuple[L.Trainer, Witnessed]:
    module = with_net(Witnessed(), case)
    module.at_call = at_call or module.at_call
    return fit({"precision": "64-true", **RULES[case.split(", ")[1]]}, processes, module=module, **settings)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return trained_on_two(fitted, CASES, tmp_path_factory.mktemp("two"))


@pytest.mark.processes
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_on_the_joint_batch(case, two):
    worst, apart = furthest(fitted, case, two)
    assert apart <= 1e-9, worst


@pytest.mark.parametrize("case", CASES[:3])
def test_a_run_resumes_bit_for_bit(case, tmp_path):
    with pytest.raises(Interrupt):
        fitted(case, 1, raise_at(7 if "Kolen" in case else 12), callbacks=[saver(tmp_path)], enable_checkpointing=True)
    resumed = learned(*fitted(case, 1, ckpt_path=tmp_path / "interrupted.ckpt"))
    assert not differing(resumed, learned(*fitted(case, 1)))


@pytest.mark.parametrize("case", CASES)
def test_it_learns_what_it_has_not_seen_in_mixed_precision(case):
    held, module = clusters(300, seed=1), with_net(Innocent(), case)
    settings = {**RULES[case.split(", ")[1]], "seed": 1}
    quiet(DFCStrategy(**settings), max_epochs=8, precision="bf16-mixed").fit(module, loader(clusters(240), 16))
    with torch.no_grad():
        found = (module(held.tensors[0]).argmax(1) == held.tensors[1]).float().mean()
    assert found > 0.7  # chance is a third
