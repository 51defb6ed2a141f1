"""What a loss wants of the network's output, so that a controlled output's error is known without asking the loss."""

from dfc_lightning.losses.finding import find_link
from dfc_lightning.losses.link import LINKS, Link
from dfc_lightning.losses.linked_loss import Label, LinkedLoss

__all__ = ["LINKS", "Label", "Link", "LinkedLoss", "find_link"]
