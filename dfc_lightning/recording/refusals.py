"""What to say of a pass that cannot be controlled."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dfc_lightning.errors import ControlError
from dfc_lightning.operations.layout import SHARED, Layout
from dfc_lightning.operations.operation import Operation


def called_twice(name: str) -> ControlError:
    """What to say of a layer that is called again before the step is over."""
    return ControlError(
        f"The layer {name!r} is called twice in one step. Feedback control settles one pass of the network; call it "
        "once in training_step."
    )


def hidden(name: str, parameters: Sequence[str]) -> ControlError:
    """What to say of a call that does more with parameters than one voltage tells."""
    return ControlError(
        f"The parameters {', '.join(parameters)} go into {name}, which returns several tensors: what it makes of them "
        "inside is out of sight. Name the module that calls it in extra_points=['…'], to have it controlled as a "
        "whole, write it in torch's functions of tensors, or freeze it with requires_grad_(False)."
    )


def not_reached(names: list[str], some: bool) -> ControlError:
    """What to say of layers that a pass did not reach; ``some`` if it has reached others."""
    if not some:
        return ControlError(
            f"The network was not called: none of its layers ({', '.join(names)}) was run in this step. Call it once "
            "in training_step; a module compiled before training hides its layers, so compile it later."
        )
    return ControlError(
        f"The layers {', '.join(names)} were not run in this step, and cannot be taught. Freeze them with "
        "requires_grad_(False), or name the submodule to control with network='…'."
    )


def refuse_detach(program: Sequence[Operation], layouts: Sequence[Layout | str]) -> None:
    """Raise a :class:`ControlError` if what is fed forward to the output passes a detach(), or ``.data``."""
    cutting = [each for each in program if each.name == "detach" or each.function == Tensor.data.__get__]  # type: ignore[attr-defined]
    if any(layouts[each.outputs[0]] != SHARED for each in cutting):
        raise ControlError(
            "The network's output depends on a detach(), or on .data, within it: what is fed forward there, no error "
            "comes back for. Take it out, write it as an autograd.Function with a backward of its own, or freeze the "
            "layers before it with requires_grad_(False)."
        )
