"""Control points: the layers whose voltage the feedback drives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from dfc_lightning.errors import ControlError
from dfc_lightning.passes.segment import LAYERS, NORMS


@dataclass(frozen=True)
class ControlPoint:
    """A voltage v_i that feedback drives: a layer's output, v_i = W_i r_{i−1} + b_i, or a normalisation's.

    Args:
        name: the layer's name in the module.
        layer: a linear or convolutional layer, or a normalisation that follows none of these directly.
        norm: the normalisation that follows the layer directly; the voltage is then what it returns.
        is_named: whether it is a module of the user's, of any kind, controlled as a whole since it was named.
    """

    name: str
    layer: nn.Module
    norm: nn.Module | None = None
    is_named: bool = False

    def with_norm(self, norm: nn.Module) -> ControlPoint:
        """The same point behind the normalisation that follows the layer directly."""
        return replace(self, norm=norm)

    @property
    def dense(self) -> bool:
        """Whether the layer is an ``nn.Linear``."""
        return isinstance(self.layer, nn.Linear) and not self.is_named

    @property
    def is_layer(self) -> bool:
        """Whether it is a layer, not a normalisation alone."""
        return self.is_named or not isinstance(self.layer, NORMS)

    @property
    def width(self) -> int:
        """n_i of a dense layer; of others the number of channels, 0 where that is not known."""
        return 0 if self.is_named else self.layer.weight.shape[0]  # type: ignore[union-attr,index,return-value]

    @property
    def weight(self) -> Tensor | None:
        """W_i; None of a normalisation that stands by itself, and of a module that was named."""
        return self.layer.weight if isinstance(self.layer, LAYERS) and not self.is_named else None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Weights and biases: the layer's, then the normalisation's; all those of a module that was named."""
        if self.is_named:
            return list(self.layer.parameters())
        modules = [self.layer] if self.norm is None else [self.layer, self.norm]
        return [p for m in modules for p in (m.weight, getattr(m, "bias", None)) if p is not None]  # type: ignore[misc]


def find_points(module: nn.Module, network: str | None = None, extra_points: Sequence[str] = ()) -> list[ControlPoint]:
    """The trainable layers and normalisations of a module, in the order of their registration.

    Args:
        module: where to look.
        network: name of the submodule to look in; None for all of the module.
        extra_points: names of submodules to control as a whole.

    Raises:
        ControlError: there is none, a parameter belongs to several, or a trainable parameter to none of them.
    """
    scope, prefix = scope_of(module, network)
    extra = [_named(module, name) for name in extra_points]
    within = {id(part) for each in extra for part in each.modules()}
    points = [
        ControlPoint(f"{prefix}{name}".rstrip("."), layer, is_named=id(layer) in within)
        for name, layer in scope.named_modules()
        if any(p.requires_grad for p in layer.parameters())
        and (any(layer is e for e in extra) or (isinstance(layer, (*LAYERS, *NORMS)) and id(layer) not in within))
    ]
    _refuse_unseen(scope, prefix, within)
    where = type(module).__name__ if network is None else f"network={network!r}"
    if not any(point.is_layer for point in points):
        raise ControlError(
            f"No control point in {where}: it has no trainable linear or convolutional layer. Feedback control drives "
            "the outputs of such layers."
        )
    _check_parameters(points, scope, prefix)
    return points


def scope_of(module: nn.Module, network: str | None) -> tuple[nn.Module, str]:
    """The submodule to control, and the prefix of the names in it.

    Raises:
        ControlError: there is none of that name.
    """
    if network is None:
        return module, ""
    try:
        return module.get_submodule(network), f"{network}." if network else ""
    except AttributeError as error:
        names = ", ".join(repr(name) for name, _ in module.named_children())
        raise ControlError(
            f"network={network!r} is no submodule of {type(module).__name__}; its submodules are {names}."
        ) from error


def _named(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        if name in dict(module.named_parameters()):
            cause = (
                f"{name!r} is a parameter of {type(module).__name__}, no submodule. Put it into a module of its own "
                "that is called with what it is applied to, and name that; or freeze it with requires_grad_(False)"
            )
        else:
            names = ", ".join(repr(each) for each, _ in module.named_modules() if each)
            cause = f"{name!r} is no submodule of {type(module).__name__}. Its submodules are {names}"
        raise ControlError(f"extra_points=[{name!r}] is not possible: {cause}.") from error


def _refuse_unseen(scope: nn.Module, prefix: str, within: set[int]) -> None:
    """Raise a :class:`ControlError` for layers that run out of sight, or whose weights are made anew for each call.

    Args:
        scope: where to look.
        prefix: of the names in it.
        within: ids of the modules that are controlled as a whole.
    """
    for name, each in scope.named_modules():
        if id(each) in within or not any(p.requires_grad for p in each.parameters()):
            continue
        called = f"The module {prefix + name!r}" if prefix + name else "The module"
        if isinstance(each, torch.jit.ScriptModule):
            raise ControlError(
                f"{called} is compiled by torch.jit, by script or trace: its layers run out of sight. Train the module "
                "that it was made of, and compile it when it is trained; or freeze it: for p in m.parameters(): "
                "p.requires_grad_(False)."
            )
        masked = [n.removesuffix("_orig") for n, _ in each.named_parameters(recurse=False) if n.endswith("_orig")]
        masked = [n for n in masked if f"{n}_mask" in dict(each.named_buffers(recurse=False))]
        if masked:
            raise ControlError(
                f"{called} is pruned: its {' and '.join(masked)} is made anew from a mask at each call. Feedback "
                f"control teaches parameters as they are; prune when the module is trained, make it permanent with "
                f"torch.nn.utils.prune.remove(m, {masked[0]!r}), or freeze it with requires_grad_(False)."
            )
        if isinstance(each, LAYERS) and hasattr(each, "weight_fake_quant"):
            raise ControlError(
                f"{called} quantises its weight at each call, for quantisation-aware training. Feedback control "
                "teaches parameters as they are; train the module that it was made of, and quantise it when it is "
                "trained, or freeze it with requires_grad_(False)."
            )


def _check_parameters(points: list[ControlPoint], scope: nn.Module, prefix: str) -> None:
    owner: dict[int, str] = {}
    for point in points:
        padding, kernel = getattr(point.layer, "padding", 0), getattr(point.layer, "kernel_size", ())
        if padding == "same" and any(d * (k - 1) % 2 for d, k in zip(point.layer.dilation, kernel)):  # type: ignore
            raise ControlError(
                f"The layer {point.name!r} has padding='same' with an even kernel, which pads one side more than the "
                "other. Pad before it with nn.ZeroPad2d, say, and give it padding=0."
            )
        for parameter in point.layer.parameters():
            if isinstance(parameter, UninitializedParameter):
                raise ControlError(
                    f"The layer {point.name!r} has no weights yet. Run one batch through the module before it is "
                    "controlled, so that lazy layers learn their shapes."
                )
            other = owner.setdefault(id(parameter), point.name)
            if other != point.name:
                raise ControlError(
                    f"The layers {other!r} and {point.name!r} share a parameter. Each layer of a controlled network "
                    "learns from its own input; give them parameters of their own."
                )
        if not point.is_named and not isinstance(getattr(point.layer, "weight", None), (nn.Parameter, type(None))):
            owner = {k: v for k, v in owner.items() if v != point.name}  # parametrized: its weight is no parameter
    untaught = [name for name, p in scope.named_parameters() if p.requires_grad and id(p) not in owner]
    if untaught:
        names = [f"{prefix}{name}" for name in untaught]
        owners = dict.fromkeys(f"{prefix}{_owner(name)}" for name in untaught if _owner(name))
        named = f"name their modules in extra_points={list(owners)}, " if owners else ""
        if any(not _owner(name) for name in untaught):
            named += "put those that belong to no submodule into one, called with what they are applied to, and name "
            named += "it in extra_points=['…'], "
        raise ControlError(
            f"No control point can teach the parameters {_listed(names)}: only weights and biases of linear and "
            "convolutional layers, and of the usual normalisations, learn by feedback control. Freeze them with "
            f"requires_grad_(False), {named}or name the submodule made of such layers with network='…'; parameters "
            "outside it are left to autograd."
        )


def _owner(name: str) -> str:
    """The module that a parameter's name says it belongs to; for a parametrized one the module it is made for."""
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]


def _listed(names: list[str], most: int = 4) -> str:
    shown: Iterator[str] = (repr(name) for name in names[:most])
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
