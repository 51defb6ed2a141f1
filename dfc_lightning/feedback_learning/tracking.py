"""Kolen-Pollack learning (Akrout et al. 2019): feedback weights take the steps that an optimizer gives the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dfc_lightning.errors import ControlError
from dfc_lightning.network.controlled_network import ControlledNetwork


class Tracking:
    """Gives each B_i every step that W_i is given: by the same gradient, an optimizer of the same kind and settings.

    Both then decay by ``lr`` · ``decay``, and by whatever decay the optimizer itself has, so that B_i − W_i dies away
    as ∏(1 − lr · decay). Clipping, accumulation, several processes and skipped steps are what they are for W_i, as
    its gradient is taken at the moment of the optimizer's own step. Nothing is known of W_i itself.

    Args:
        network: the controlled network, with layerwise feedback weights.
        optimizers: those of its weights.
        decay: in units of the learning rate.

    Raises:
        ControlError: a feedback weight cannot follow an optimizer of that kind.
    """

    def __init__(self, network: ControlledNetwork, optimizers: Sequence[Optimizer], decay: float = 0.0) -> None:
        self.network, self.decay = network, decay
        self._followers: list[_Follower] = []
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ControlError(
                    "Feedback weights cannot follow LBFGS, whose steps are searched along the loss. Give an optimizer "
                    "that steps by the gradient, such as SGD or Adam, or feedback weights that stay as they are."
                )
            self._followers.append(_Follower(optimizer, self._pairs, decay))

    def close(self) -> None:
        """Follow no more."""
        for follower in self._followers:
            follower.close()

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of each follower's optimizer."""
        return [follower.state_dict() for follower in self._followers]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from saved states, after the network's feedback weights and the optimizers are loaded."""
        if len(states) != len(self._followers):
            raise ValueError(f"it is of {len(states)} optimizers, not of {len(self._followers)}")
        for follower, state in zip(self._followers, states):
            follower.load_state_dict(state)

    def _pairs(self) -> Pairs:
        """The B_i by W_i, of those that errors travel back through; several where W_i is used several times."""
        weights, found = self.network.weights, dict[nn.Parameter, list[nn.Parameter]]()
        for point, b, carries in zip(self.network.points, weights.values, weights.carrying):
            if carries and isinstance(point.weight, nn.Parameter):
                found.setdefault(point.weight, []).append(b)
        return found


Pairs = dict[nn.Parameter, list[nn.Parameter]]


class _Follower:
    """An optimizer that goes the way of another, for other parameters."""

    def __init__(self, leader: Optimizer, pairs: Callable[[], Pairs], decay: float) -> None:
        self.leader, self.decay = leader, decay
        self._pairs = pairs
        self._own: Optimizer | None = None
        self._state: dict[str, Any] = {}
        self._of_leader: dict[Tensor, Any] | None = {p: copy.deepcopy(state) for p, state in leader.state.items()}
        self._hook = leader.register_step_post_hook(self._follow)

    def close(self) -> None:
        self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        return self._state if self._own is None else self._own.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._own, self._state = None, state

    @torch.no_grad()
    def _follow(self, *_: Any) -> None:
        pairs = self._pairs()
        own = self._own
        if own is None or {b for group in own.param_groups for b in group["params"]} != {
            b for each in pairs.values() for b in each
        }:
            own = self._own = self._made()
        for mine, group in zip(own.param_groups, self.leader.param_groups):
            mine |= {name: value for name, value in group.items() if name != "params"}
        for w, followers in pairs.items():
            for b in followers:
                b.grad = None if w.grad is None else w.grad.to(b)
        own.step()
        for followers in pairs.values():
            for b in followers:
                b.grad = None
        if self.decay:
            self._decay(pairs)

    def _decay(self, pairs: Pairs) -> None:
        for group in self.leader.param_groups:
            left = 1 - group["lr"] * self.decay
            for w in group["params"]:
                if w in pairs and w.grad is not None:
                    for each in (w, *pairs[w]):
                        each.mul_(left)

    def _made(self) -> Optimizer:
        """One of the leader's kind and settings, in the state that the leader was in when following began."""
        pairs, before = self._pairs(), self._own
        own = copy.deepcopy(
            self.leader, {id(p): pairs.get(p, [p])[0] for g in self.leader.param_groups for p in g["params"]}
        )
        own.state.clear()
        for mine, group in zip(own.param_groups, self.leader.param_groups):
            mine["params"] = [b for w in group["params"] for b in pairs.get(w, ())]
        if before is not None:  # other layers learn now: the rest go on as they were
            own.state.update({b: before.state[b] for each in pairs.values() for b in each if b in before.state})
        elif self._state:
            own.load_state_dict(self._state)
            self._state = {}
        else:
            for w, b in ((w, b) for w, each in pairs.items() for b in each):
                if self._of_leader and w in self._of_leader:
                    own.state[b] = {
                        name: value.to(b.dtype) if _is_moment(value, w) else copy.deepcopy(value)
                        for name, value in self._of_leader[w].items()
                    }
        self._of_leader = None
        return own


def _is_moment(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
