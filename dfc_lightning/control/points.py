"""Control points: the layers whose voltage the feedback drives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from dfc_lightning.control.checks import ControlError
from dfc_lightning.control.nonlinearity import Nonlinearity


@dataclass
class ControlPoint:
    """The output of a linear layer, v_i = W_i r_{i−1} + b_i, and the nonlinearity that follows it.

    Args:
        name: the layer's name in the module.
        layer: the layer.
        nonlinearity: φ_i; None until the first forward pass has shown it.
        overwrites: whether φ_i works in place and destroys the voltage.
    """

    name: str
    layer: nn.Linear
    nonlinearity: Nonlinearity | None = None
    overwrites: bool = False

    @property
    def width(self) -> int:
        """n_i."""
        return self.layer.out_features

    @property
    def parameters(self) -> list[Tensor]:
        """The weight and, if there is one, the bias."""
        return [p for p in (self.layer.weight, self.layer.bias) if p is not None]


def find_points(module: nn.Module, network: str | None = None) -> list[ControlPoint]:
    """The trainable Linear layers of a module, in the order of their registration.

    Args:
        module: where to look.
        network: name of the submodule to look in; None for all of the module.

    Raises:
        ControlError: there is none, a parameter belongs to several, or a trainable parameter to none of them.
    """
    scope = module
    if network is not None:
        try:
            scope = module.get_submodule(network)
        except AttributeError as error:
            names = ", ".join(repr(name) for name, _ in module.named_children())
            raise ControlError(
                f"network={network!r} is no submodule of {type(module).__name__}; its submodules are {names}."
            ) from error
    prefix = f"{network}." if network else ""
    points = [
        ControlPoint(f"{prefix}{name}".rstrip("."), layer)
        for name, layer in scope.named_modules()
        if isinstance(layer, nn.Linear) and any(p.requires_grad for p in layer.parameters())
    ]
    where = type(module).__name__ if network is None else f"network={network!r}"
    if not points:
        raise ControlError(
            f"No control point in {where}: it has no trainable nn.Linear layer. Feedback control drives the outputs "
            "of Linear layers; use a network of these and elementwise nonlinearities."
        )
    _check_parameters(points, scope, prefix)
    return points


def _check_parameters(points: list[ControlPoint], scope: nn.Module, prefix: str) -> None:
    owner: dict[int, str] = {}
    for point in points:
        for parameter in point.parameters:
            if isinstance(parameter, UninitializedParameter):
                raise ControlError(
                    f"The layer {point.name!r} has no weights yet. Run one batch through the module before it is "
                    "controlled, so that lazy layers learn their shapes."
                )
            other = owner.setdefault(id(parameter), point.name)
            if other != point.name:
                raise ControlError(
                    f"The layers {other!r} and {point.name!r} share a parameter. Each layer of a controlled chain "
                    "learns from its own input; give them parameters of their own."
                )
    untaught = [f"{prefix}{name}" for name, p in scope.named_parameters() if p.requires_grad and id(p) not in owner]
    if untaught:
        raise ControlError(
            f"No segment of the controlled chain can teach the parameters {_listed(untaught)}: only weights and "
            "biases of Linear layers learn by feedback control. Freeze them with requires_grad_(False), or name the "
            "submodule that is a chain of Linear layers with network='…'; parameters outside it are left to autograd."
        )


def _listed(names: list[str], most: int = 4) -> str:
    shown: Iterator[str] = (repr(name) for name in names[:most])
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
