"""The device that these tests are about; without one they skip, and say why.

``DFC_TEST_DEVICE=cpu`` runs them on the CPU: a rehearsal of the tests, which tells nothing of a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dfc_lightning.passes.chance import Drawing, mixed

ON = os.environ.get("DFC_TEST_DEVICE", "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="torch sees no GPU here")
    for item in items:
        if "cuda" in item.keywords and ON == "cuda" and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    return torch.device(ON)


@pytest.fixture
def accelerator() -> str:
    return "gpu" if ON == "cuda" else "cpu"


@pytest.fixture
def host_draws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Noise is drawn on the CPU and moved: generators of other devices draw other numbers from equal seeds."""

    def begin(self: Drawing, chance: Any) -> None:
        self.chance, self._generator = chance, torch.Generator().manual_seed(mixed(chance.seed, chance.step))

    def shared(self: Drawing, shape: Any) -> torch.Tensor:
        return torch.randn(tuple(shape), generator=self._generator, dtype=torch.float32).to(self.chance.device)

    monkeypatch.setattr(Drawing, "__init__", begin)
    monkeypatch.setattr(Drawing, "shared", shared)
    yield
