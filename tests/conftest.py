"""What all tests share: real data, read once a session."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import pytest
import torch

from dfc_lightning.data import MNIST, FashionMNIST, images

torch.set_num_threads(1)  # networks this small are slower on more


@pytest.fixture(scope="session")
def read_once() -> Callable:
    return functools.cache(images._read_idx)


@pytest.fixture
def real_data(read_once, monkeypatch) -> Callable[[str], MNIST | FashionMNIST]:
    """A function that gives real images by the name of their data set, or skips the test where they are absent."""

    def on_hand(name: str) -> MNIST | FashionMNIST:
        data = {"MNIST": MNIST, "FashionMNIST": FashionMNIST}[name]()
        if data._missing():
            pytest.skip(f"{name} is not in {data.raw} (DFC_DATA_ROOT is {os.environ.get('DFC_DATA_ROOT', 'unset')})")
        monkeypatch.setattr(images, "_read_idx", read_once)
        return data

    return on_hand
