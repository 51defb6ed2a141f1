"""What the loss makes of a network's output, or of any other in its place, with nothing taught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfc_lightning.errors import ControlError
from dfc_lightning.losses.finding import find_link
from dfc_lightning.losses.linked_loss import LinkedLoss
from dfc_lightning.network.controlled_network import AtOutput, ControlledNetwork
from dfc_lightning.network.gate import LossReduction
from dfc_lightning.network.learning_rule import Direct, Layerwise
from dfc_lightning.network.unseen import unseen
from dfc_lightning.passes.forward_pass import ForwardPass


def judged(
    network: ControlledNetwork,
    run: Callable[[], Any],
    kind: Direct | Layerwise | None = None,
    loss_reduction: LossReduction = "mean",
) -> tuple[ForwardPass, Tensor]:
    """Call ``run``, which runs the network's module and returns the loss of its output.

    The module stays as it is, in buffers and attributes, and its parameters get no gradient.

    Args:
        network: the controlled network.
        run: see above.
        kind: the feedback weights to bind the pass to; see :meth:`ControlledNetwork.bound`.
        loss_reduction: ``"mean"`` if the loss is a mean over the batch, ``"sum"`` if it is a sum.

    Returns:
        The pass, and ∂ℓ_b/∂r_L of each sample's own loss, (B, n_L).

    Raises:
        ControlError: the loss does not depend on the output.

    Example:
        >>> from torch import nn
        >>> mlp = nn.Linear(2, 2)
        >>> x, y = torch.randn(3, 2), torch.zeros(3, 2)
        >>> forward, grad = judged(ControlledNetwork(mlp), lambda: 0.5 * (mlp(x) - y).square().sum(1).mean())
        >>> torch.allclose(grad, forward.output)
        True
    """
    seen: list[ForwardPass] = []
    leaves: list[Tensor] = []

    def note(forward: ForwardPass, output: Tensor) -> Tensor:
        seen.append(network.bound(forward, kind))
        leaves.append(output.detach().requires_grad_())
        return leaves[0].clone()  # a leaf could not be worked on in place

    loss = _with_output(network, run, note)
    grad = None
    if isinstance(loss, Tensor) and loss.requires_grad:
        (grad,) = torch.autograd.grad(loss, leaves, allow_unused=True)
    if grad is None:
        raise ControlError(
            "The loss does not depend on the network's output, by which feedback weights are to learn. Return a loss "
            "computed, without detach(), from what the network returned."
        )
    share = seen[0].batch_size if loss_reduction == "mean" else 1
    return seen[0], torch.nan_to_num(grad.to(seen[0].output.dtype) * share, 0.0, 0.0, 0.0)


def found_loss(
    network: ControlledNetwork, run: Callable[[], Any], loss_reduction: LossReduction = "mean"
) -> LinkedLoss:
    """What a loss wants of the network's output; see :func:`find_link`.

    The module stays as it is, as by :func:`judged`.

    Args:
        network: the controlled network.
        run: runs the network's module and returns the loss of its output, each time with the same batch and the same
            random draws; called five times, or twice more for an error to say why.
        loss_reduction: ``"mean"`` if the loss is a mean over the batch, ``"sum"`` if it is a sum.

    Raises:
        ControlError: the gradient of the loss does not tell; the message says why.

    Example:
        >>> from torch import nn
        >>> mlp = nn.Linear(2, 2)
        >>> x, y = torch.randn(3, 2), torch.zeros(3, 2)
        >>> found_loss(ControlledNetwork(mlp), lambda: nn.functional.mse_loss(mlp(x), y))
        LinkedLoss(link='identity', scale=1.0, hard=False)
    """
    seen: list[Tensor] = []

    def note(forward: ForwardPass, output: Tensor) -> Tensor:
        seen.append(output.detach())
        return output

    def loss_of(output: Tensor) -> Tensor:
        return _with_output(network, run, lambda forward, own: output.clone())

    _with_output(network, run, note)
    return find_link(loss_of, seen[0], loss_reduction)


def _with_output(network: ControlledNetwork, run: Callable[[], Any], output: AtOutput) -> Any:
    """The loss with what ``output`` makes of the network's output in its place."""
    with unseen(network.module), torch.enable_grad(), network.watched(output):
        return run()
