"""The parameters of a control point: a layer's, and those of the normalisation that follows it directly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dfc_lightning.operations.batch_norm import BatchNorm
from dfc_lightning.operations.linear import Weighted
from dfc_lightning.operations.operation import Frame, Operation, Slot, constant, filled, slots_in
from dfc_lightning.operations.recognise import dropped

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Segment:
    """A point's layer, with its normalisation, as a pass has called them.

    Args:
        layer: the call of the layer, or None for a normalisation that stands by itself.
        norm: the call of the normalisation, or None.
        weight: the layer's weight.
        bias: its bias.
        norm_weight: the normalisation's γ.
        norm_bias: its β.
    """

    layer: Weighted | None
    norm: Operation | None
    weight: nn.Parameter | None = None
    bias: nn.Parameter | None = None
    norm_weight: nn.Parameter | None = None
    norm_bias: nn.Parameter | None = None

    @property
    def heard(self) -> Slot:
        """Slot of what the layer multiplies with its weights."""
        first = self.layer or self.norm
        assert first is not None
        return first.inputs[0]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that there are."""
        return [p for p in (self.weight, self.bias, self.norm_weight, self.norm_bias) if p is not None]

    def shift(self, voltage: Tensor) -> Tensor | float:
        """The constant that is last added to ``voltage``, as its call returned it: a bias, or a normalisation's β."""
        bias, last = (self.bias, self.layer) if self.norm is None else (self.norm.arguments.get("bias"), self.norm)
        if bias is None or last is None:
            return 0.0
        over_channels = last.name not in ("linear", "layer_norm", "rms_norm")
        value = constant(bias, voltage.dtype)
        return value.view(-1, *[1] * (voltage.dim() - 2)) if over_channels else value

    def gradients(self, frame: Frame, signal: Tensor, heard: Tensor) -> list[Tensor]:
        """What each of :attr:`parameters` is taught.

        Args:
            frame: the feedforward values, where the normalisation's derivative is taken.
            signal: the teaching signal in the shape of what the call of the layer, or normalisation, returned.
            heard: what the layer hears, in the shape that its call was given.
        """
        after: list[Tensor] = []
        if self.norm is not None:
            signal, after = self._through_norm(self.norm, frame, signal)
        if self.layer is None or self.weight is None:
            return after
        return [*self.layer.taught(constant(self.weight, frame.dtype), self.bias is not None, signal, heard), *after]

    def _through_norm(self, norm: Operation, frame: Frame, signal: Tensor) -> tuple[Tensor, list[Tensor]]:
        taught = [constant(p, frame.dtype) for p in (self.norm_weight, self.norm_bias) if p is not None]
        with torch.enable_grad():
            x = frame[norm.inputs[0]].detach().requires_grad_()
            leaves = [p.requires_grad_() for p in (t.clone() for t in taught)]
            learned = [p for p in (self.norm_weight, self.norm_bias) if p is not None]
            replaced = {id(p): leaf for p, leaf in zip(learned, leaves)}
            if isinstance(norm, BatchNorm):
                y = norm.live(x, *filled([norm.weight, norm.bias], frame.__getitem__, frame.dtype, instead=replaced))
            else:
                y = norm.at(lambda slot: x, frame.dtype, replaced)[0]
            found = torch.autograd.grad(y, [x, *leaves], signal)
        return found[0], list(found[1:])


@dataclass(frozen=True)
class NamedSegment:
    """A module of the user's that is a point as a whole: its parameters learn by its own local derivative.

    The module is called again for that, with the buffers and dropout masks that it had: it has to give the same then.
    Of several tensors it is called with, what it hears is the first; the others are taken as they were feedforward.

    Args:
        module: the module, which returns the voltage, or a tuple of which that is the first.
        args: its positional arguments, recorded tensors replaced by their slots.
        kwargs: its keyword arguments, likewise.
        buffers: its buffers before the call.
        masks: slots of the masks of dropout in it, in order.
    """

    module: nn.Module
    args: Sequence[Any]
    kwargs: dict[str, Any]
    buffers: dict[str, Tensor]
    masks: Sequence[Slot] = ()
    layer: ClassVar[None] = None

    @property
    def heard(self) -> Slot:
        """Slot of the first tensor that it is called with."""
        return slots_in((self.args, self.kwargs))[0]

    def shift(self, voltage: Tensor) -> Tensor | float:
        """None that is known apart from the rest; see :meth:`Segment.shift`."""
        return 0.0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of them."""
        return list(self.module.parameters())

    def gradients(self, frame: Frame, signal: Tensor, heard: Tensor) -> list[Tensor]:
        """What each of :attr:`parameters` is taught; see :meth:`Segment.gradients`."""
        return by_derivative(self.parameters, frame.dtype, signal, lambda leaves: self.again(frame, heard, leaves))

    def again(self, frame: Frame, heard: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The voltage for what is heard, with other tensors for the parameters."""

        def value(slot: Slot) -> Tensor:
            return heard if slot == self.heard else frame[slot]

        args, kwargs = filled((self.args, self.kwargs), value, frame.dtype)
        state = {name: constant(buffer, frame.dtype).clone() for name, buffer in self.buffers.items()}
        state |= {name: p for (name, _), p in zip(self.module.named_parameters(), parameters)}
        with _Masking([frame.values[s] for s in self.masks]):
            made = torch.func.functional_call(self.module, state, tuple(args), kwargs)
        return made if isinstance(made, Tensor) else made[0]


class _Masking(TorchFunctionMode):
    """Dropout by masks that were drawn before; None for one whose result nothing hears."""

    def __init__(self, masks: Sequence[Tensor | None]) -> None:
        super().__init__()
        self._masks = iter(masks)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = dropped(func, args, kwargs or {})
        if given is None:
            return func(*args, **(kwargs or {}))
        mask = next(self._masks, None)
        return given if mask is None else given * mask


def by_derivative(
    parameters: Sequence[nn.Parameter],
    dtype: torch.dtype,
    signal: Tensor,
    voltage: Callable[[Sequence[Tensor]], Tensor],
) -> list[Tensor]:
    """What parameters are taught by the derivative of a voltage.

    Args:
        parameters: the parameters.
        dtype: of the pass.
        signal: the teaching signal, in the shape of the voltage.
        voltage: the voltage, given other tensors for the parameters.
    """
    with torch.enable_grad():
        leaves = [constant(p, dtype).clone().requires_grad_() for p in parameters]
        found = torch.autograd.grad(voltage(leaves), leaves, signal, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves)]
