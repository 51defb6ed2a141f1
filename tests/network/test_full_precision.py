"""Control is computed without TF32 and autocast; settings are as before afterwards, come what may."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dfc_lightning.precision import full_precision


def settings() -> tuple[bool, str]:
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


@pytest.fixture
def rounded() -> Iterator[tuple[bool, str]]:
    """With TF32 wherever torch can have it."""
    before = settings()
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("medium")
    yield settings()
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


def test_on_a_gpu_nothing_is_rounded_within_and_all_is_as_before_after(rounded):
    assert rounded == (True, "medium")
    with pytest.raises(ZeroDivisionError), full_precision(torch.device("cuda")):
        assert settings() == (False, "highest")
        raise ZeroDivisionError
    assert settings() == rounded


def test_on_a_cpu_the_settings_of_gpus_stay_and_autocast_ends(rounded):
    with torch.autocast("cpu", torch.bfloat16), full_precision(torch.device("cpu")):
        assert settings() == rounded and not torch.is_autocast_enabled("cpu")
