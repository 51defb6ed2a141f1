"""LightningModules of the recipes, and the network they hold."""

from dfc_lightning.models.autoencoder import Autoencoder
from dfc_lightning.models.classifier import Classifier
from dfc_lightning.models.mlp import MLP
from dfc_lightning.models.regressor import Regressor

__all__ = ["MLP", "Autoencoder", "Classifier", "Regressor"]
