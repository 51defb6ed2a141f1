from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

_NONLINEARITIES: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}
_INITIALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "xavier_normal": nn.init.xavier_normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "kaiming_normal": nn.init.kaiming_normal_,
    "orthogonal": nn.init.orthogonal_,
}


class MLP(nn.Sequential):
    """A fully connected network: flatten, then linear layers with a nonlinearity between them; linear output.

    Takes an input of shape (B, ...) with sizes[0] entries a sample and returns an output of shape (B,
    sizes[-1]). Biases start at zero.

    Args:
        sizes: Number of units of every layer, from input to output.
        nonlinearity: Of all hidden layers, or a list with one for each: ``"tanh"``, ``"relu"``,
            ``"leaky_relu"``, ``"elu"``, ``"gelu"``, ``"softplus"``, ``"sigmoid"`` or ``"identity"``.
        initialization: Distribution of the weights: ``"xavier_normal"``, ``"xavier_uniform"``,
            ``"kaiming_normal"`` or ``"orthogonal"``.

    Example:
        >>> MLP([784, 256, 32, 256, 784], nonlinearity=["tanh", "identity", "tanh"])
        MLP(
          (0): Flatten(start_dim=1, end_dim=-1)
          (1): Linear(in_features=784, out_features=256, bias=True)
          (2): Tanh()
          (3): Linear(in_features=256, out_features=32, bias=True)
          (4): Identity()
          (5): Linear(in_features=32, out_features=256, bias=True)
          (6): Tanh()
          (7): Linear(in_features=256, out_features=784, bias=True)
        )
    """

    def __init__(
        self,
        sizes: list[int],
        nonlinearity: str | list[str] = "tanh",
        initialization: str = "xavier_normal",
    ) -> None:
        if len(sizes) < 2:
            raise ValueError(f"sizes={sizes} must give at least the input and the output size.")
        hidden = len(sizes) - 2
        names = [nonlinearity] * hidden if isinstance(nonlinearity, str) else list(nonlinearity)
        if len(names) != hidden:
            raise ValueError(
                f"nonlinearity={names} has {len(names)} entries, but sizes={sizes} has {hidden} hidden "
                "layers. Give one for each, or one name for all."
            )
        nonlinearities = [nonlinearity_named(name) for name in names]
        initialize = _choose("initialization", initialization, _INITIALIZATIONS)

        layers: list[nn.Module] = [nn.Flatten()]
        for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            linear = nn.Linear(fan_in, fan_out)
            initialize(linear.weight)
            nn.init.zeros_(linear.bias)
            layers.append(linear)
            if i < hidden:
                layers.append(nonlinearities[i]())
        super().__init__(*layers)

    def __getitem__(self, idx: Any) -> Any:
        # nn.Sequential would build a slice by this class's own constructor.
        return nn.Sequential(*list(self)[idx]) if isinstance(idx, slice) else super().__getitem__(idx)


def nonlinearity_named(name: str) -> Callable[[], nn.Module]:
    """What makes the module of a nonlinearity."""
    return _choose("nonlinearity", name, _NONLINEARITIES)


def _choose(argument: str, value: str, choices: dict[str, Any]) -> Any:
    if value not in choices:
        raise ValueError(f"{argument}={value!r} is unknown. Choose one of: {', '.join(choices)}.")
    return choices[value]
