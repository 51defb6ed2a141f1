"""Control points: the layers whose voltage the feedback drives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from dfc_lightning.errors import ControlError
from dfc_lightning.passes.segment import LAYERS, NORMS


@dataclass(frozen=True)
class ControlPoint:
    """A voltage v_i that feedback drives: what a call with trainable parameters gives.

    Args:
        name: the layer's name in the module; of a use that is no layer's, the parameter's; ``#2`` and so on follow
            where it is used again.
        layer: a linear or convolutional layer, or a normalisation that follows none of these directly; of a use, the
            module that the parameter belongs to.
        norm: the normalisation that follows the layer directly; the voltage is then what it returns.
        is_named: whether it is a module of the user's, of any kind, controlled as a whole since it was named.
        use: the parameters of a use that is no layer's own call, or a layer's second.
        multiplies: of a use, the parameter that is W_i in it.
    """

    name: str
    layer: nn.Module
    norm: nn.Module | None = None
    is_named: bool = False
    use: tuple[nn.Parameter, ...] = ()
    multiplies: nn.Parameter | None = None

    def with_norm(self, norm: nn.Module) -> ControlPoint:
        """The same point behind the normalisation that follows the layer directly."""
        return replace(self, norm=norm)

    @property
    def is_module(self) -> bool:
        """Whether it is a call of a layer or of a normalisation by itself, with its parameters as they are."""
        return not self.is_named and not self.use

    @property
    def dense(self) -> bool:
        """Whether the layer is an ``nn.Linear``."""
        return isinstance(self.layer, nn.Linear) and self.is_module

    @property
    def is_layer(self) -> bool:
        """Whether it is a layer, not a normalisation alone."""
        return not self.is_module or not isinstance(self.layer, NORMS)

    @property
    def width(self) -> int:
        """n_i of a dense layer; of others the number of channels, 0 where that is not known."""
        if self.use:
            return 0 if self.multiplies is None else self.multiplies.shape[0]
        return 0 if self.is_named else self.layer.weight.shape[0]  # type: ignore[union-attr,index,return-value]

    @property
    def weight(self) -> Tensor | None:
        """W_i; None of a normalisation that stands by itself, and of a module that was named."""
        if self.use:
            return self.multiplies
        return self.layer.weight if isinstance(self.layer, LAYERS) and self.is_module else None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Weights and biases: the layer's, then the normalisation's; all those of a module that was named."""
        if self.use:
            return list(self.use)
        if self.is_named:
            return list(self.layer.parameters())
        modules = [self.layer] if self.norm is None else [self.layer, self.norm]
        return [p for m in modules for p in (m.weight, getattr(m, "bias", None)) if p is not None]  # type: ignore[misc]


def find_points(module: nn.Module, network: str | None = None, extra_points: Sequence[str] = ()) -> list[ControlPoint]:
    """The trainable layers and normalisations of a module, and its other parameters, in the order of registration.

    What is a point of its own a pass shows: how often each is used, and which parameters meet the samples together.

    Args:
        module: where to look.
        network: name of the submodule to look in; None for all of the module.
        extra_points: names of submodules to control as a whole.

    Raises:
        ControlError: there is none, or a layer cannot be watched.
    """
    scope, prefix = scope_of(module, network)
    extra = [_named(module, name) for name in extra_points]
    within = {id(part) for each in extra for part in each.modules()}
    points = []
    for name, each in scope.named_modules(remove_duplicate=True):
        full = f"{prefix}{name}".rstrip(".")
        if any(each is e for e in extra):
            points += [ControlPoint(full, each, is_named=True)] * any(p.requires_grad for p in each.parameters())
        elif id(each) not in within:
            points += _points_of(full, each)
    _refuse_unseen(scope, prefix, within)
    if not points:
        where = type(module).__name__ if network is None else f"network={network!r}"
        raise ControlError(
            f"No control point in {where}: it has no trainable parameter. Feedback control drives what comes of these."
        )
    _check_layers(points)
    return points


def _points_of(name: str, module: nn.Module) -> list[ControlPoint]:
    """What a module itself may be, or have, of points."""
    if isinstance(module, (*LAYERS, *NORMS)):
        return [ControlPoint(name, module)] * any(p.requires_grad for p in module.parameters())
    own = module.named_parameters(name, recurse=False)
    return [ControlPoint(full.lstrip("."), module, use=(p,)) for full, p in own if p.requires_grad]


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
        if isinstance(each, LAYERS) and hasattr(each, "weight_fake_quant"):
            raise ControlError(
                f"{called} quantises its weight at each call, for quantisation-aware training. Feedback control "
                "teaches parameters as they are; train the module that it was made of, and quantise it when it is "
                "trained, or freeze it with requires_grad_(False)."
            )


def _check_layers(points: Sequence[ControlPoint]) -> None:
    for point in points:
        padding, kernel = getattr(point.layer, "padding", 0), getattr(point.layer, "kernel_size", ())
        if padding == "same" and any(d * (k - 1) % 2 for d, k in zip(point.layer.dilation, kernel)):  # type: ignore
            raise ControlError(
                f"The layer {point.name!r} has padding='same' with an even kernel, which pads one side more than the "
                "other. Pad before it with nn.ZeroPad2d, say, and give it padding=0."
            )
        if any(isinstance(p, UninitializedParameter) for p in point.layer.parameters()):
            raise ControlError(
                f"The layer {point.name!r} has no weights yet. Run one batch through the module before it is "
                "controlled, so that lazy layers learn their shapes."
            )
