"""Nothing of a hidden layer may reach the loss but through the network's output: no error would come back for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfc_lightning.errors import ControlError


class _Cut(torch.autograd.Function):
    """Hands a voltage on without its history; a gradient that comes back has gone past the output."""

    @staticmethod
    def forward(ctx: Any, voltage: Tensor, anchor: Tensor, name: str) -> Tensor:
        ctx.cut_at = name
        ctx.mark_dirty(voltage)  # what follows may work in place, as it may on the layer's own output
        return voltage

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ControlError(
            f"The loss depends on what the layer {ctx.cut_at!r} has computed by a way beside the network's output. "
            "Feedback control takes the loss of that output alone, and would not teach the rest: let the last layer "
            "come last, detach() what is only to be looked at, or let the network return what the loss is of, and say "
            "output='returned'."
        )


def cut(output: Tensor, name: str, in_place: bool = False) -> Tensor:
    """A layer's output without its history, on which a gradient that comes back is an error.

    Args:
        output: the output.
        name: of the layer.
        in_place: whether it is the tensor itself that is to lose its history, since others hold it too.
    """
    handed = output.detach_() if in_place else output.detach()
    if not (torch.is_grad_enabled() and output.is_floating_point()):
        return handed
    anchor = torch.zeros((), requires_grad=True, device=output.device)
    return _Cut.apply(handed, anchor, name)  # type: ignore[no-any-return]


class Step:
    """The step that a pass is part of: what happens in it is told from the backward pass that follows.

    Args:
        open: whether it is not over.
    """

    def __init__(self) -> None:
        self.open = True


class _Guard(torch.autograd.Function):
    """Lets gradients by the input be taken while the step is open, and nothing learn of them afterwards."""

    @staticmethod
    def forward(ctx: Any, received: Tensor, step: Step) -> Tensor:
        ctx.guarded = step
        return received.view_as(received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if not ctx.guarded.open:
            raise ControlError(
                "The loss depends on a call of the network whose input wants a gradient, or on that gradient, as a "
                "penalty of it does. Feedback control teaches one call, which wants none, and sends nothing back "
                "through the other: detach() what comes of it, or train this loss by backpropagation."
            )
        return _Guard.apply(grads[0], ctx.guarded), None


def refuse_empty(name: str, received: Tensor) -> None:
    """Raise a :class:`ControlError` if a layer is given no samples."""
    if received.dim() > 0 and received.shape[0] == 0:
        raise ControlError(
            f"The layer {name!r} is given no samples: its input has the shape {tuple(received.shape)}. An empty batch "
            "teaches nothing; return None from training_step before the network is called, which skips the batch, or "
            "leave it out of the data."
        )


def wants_input_gradient(name: str, received: Tensor) -> bool:
    """Whether a layer is called for the gradient by the network's input: such a call is left to autograd.

    Raises:
        ControlError: its input was made by parameters that want to learn.
    """
    return _sources(name, received)[0]


def guarded(name: str, received: Tensor, step: Step) -> Tensor | None:
    """What the first layer of a call for the gradient by its input is given instead; None for as it is."""
    of_input, has_guard = _sources(name, received)
    return _Guard.apply(received, step) if of_input and not has_guard else None  # type: ignore[no-any-return]


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer is called with."""
    return args[0] if args else kwargs["input"]


def with_guard(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], step: Step) -> Any:
    """The arguments of a call for the gradient by its input, or None for as they are."""
    with_ = guarded(name, input_of(args, kwargs), step)
    if with_ is None:
        return None
    return ((with_, *args[1:]), kwargs) if args else (args, {**kwargs, "input": with_})


def _sources(name: str, received: Tensor) -> tuple[bool, bool]:
    """Whether a tensor comes of one that is no parameter and wants a gradient, and whether by a guard alone."""
    if not (received.requires_grad and torch.is_grad_enabled()):
        return False, False
    if received.grad_fn is None:
        leaves, has_guard = [received], False
    else:
        leaves, has_guard, _ = _begins(received.grad_fn)
    of_input = any(not isinstance(leaf, nn.Parameter) for leaf in leaves)
    if leaves and not (of_input or has_guard):
        raise _wants_to_learn(f"The input of the layer {name!r}")
    return of_input or has_guard, has_guard and not of_input


def refuse_history(what: str, tensor: Tensor) -> None:
    """Raise a :class:`ControlError` if a tensor was made by something that wants to learn."""
    if tensor.requires_grad and torch.is_grad_enabled() and (tensor.grad_fn is None or _begins(tensor.grad_fn)[0]):
        raise _wants_to_learn(what)


def _wants_to_learn(what: str) -> ControlError:
    return ControlError(
        f"{what} wants a gradient, but feedback control sends none back through a layer: what computes it would not "
        "learn. Freeze that with requires_grad_(False), or detach() it."
    )


def refuse_unseen(tensor: Tensor) -> None:
    """Raise a :class:`ControlError` for what comes of a layer's output by a way that was not recorded."""
    if tensor.grad_fn is not None and torch.is_grad_enabled() and (name := _begins(tensor.grad_fn)[2]):
        raise ControlError(
            f"Something that comes of the layer {name!r} was computed out of sight: by what torch.jit has compiled, "
            f"torch.func, or an extension of torch ({tensor.grad_fn.name()}). Write it in torch's functions of "
            "tensors, or as an autograd.Function with a backward of its own, or freeze the layers before it with "
            "requires_grad_(False)."
        )


def _begins(start: Any) -> tuple[list[Tensor], bool, str]:
    """What a history begins with, behind neither cut nor guard; whether there is a guard; the name of a cut layer."""
    waiting, seen, found, has_guard, cut_at = [start], set(), [], False, ""
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "cut_at"):
            cut_at = node.cut_at
        elif hasattr(node, "guarded"):
            has_guard = True
        elif hasattr(node, "variable"):
            found.append(node.variable)
        else:
            waiting.extend(source for source, _ in node.next_functions if source is not None)
    return found, has_guard, cut_at


def only_aside() -> ControlError:
    """What to say if the network was called for the gradient by its input alone."""
    return ControlError(
        "The network was called only with an input that wants a gradient, as for adversarial examples or saliency. "
        "Such a call is left to autograd; the call that is to be taught is given its input with detach()."
    )


def only_without_gradients(names: Sequence[str]) -> ControlError:
    """What to say of layers that were called where gradients were switched off alone."""
    return ControlError(
        f"The layers {', '.join(names)} were called without gradients only, so that the loss does not depend on them. "
        "Take the call that is to be taught out of no_grad(), and give torch.utils.checkpoint use_reentrant=False."
    )
