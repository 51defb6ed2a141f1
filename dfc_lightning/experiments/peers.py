"""What other projects report of the field's benchmark, beside which ours stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """What a project reports of one network on one data set.

    Args:
        name: the project.
        source: where it is reported, and by what protocol.
        errors: test errors in percent, as they are to be read, by our recipes' names of the rules.
    """

    name: str
    source: str
    errors: dict[str, str]


PEERS: dict[tuple[str, str], tuple[Peer, ...]] = {
    ("cifar10", "vgg5"): (
        Peer(
            "PCX",
            "Pinchetti et al. (2025), github.com/liukidar/pcx: 50 epochs, the best test epoch; settings searched for "
            "each rule; backprop by squared errors, predictive coding with centred nudging",
            {"bp": "10.57", "predictive_coding": "10.53"},
        ),
    ),
    ("cifar10", "resnet20"): (
        Peer(
            "biotorch",
            "github.com/jsalbert/biotorch, Benchmarks.md: 250 epochs of SGD with momentum, at the epoch of best "
            "validation",
            {"bp": "8.63", "fa": "32.16", "dfa": "45.94", "sign_symmetry": "10.05"},
        ),
        Peer(
            "biotorch, Adam",
            "the same, 250 epochs of Adam",
            {"bp": "10.01", "fa": "29.59", "dfa": "32.16", "sign_symmetry": "10.59"},
        ),
    ),
}
"""By column and network, as recipes name them."""

BESIDE = (
    "Difference target propagation (Ernoult et al., 2022) reports no figure for either network; on one of its own it "
    "comes within a point of backprop, at up to 30 times its time."
)
