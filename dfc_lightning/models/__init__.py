"""LightningModules of the recipes, and the networks they hold."""

from dfc_lightning.models.autoencoder import Autoencoder
from dfc_lightning.models.classifier import Classifier
from dfc_lightning.models.lenet import LeNet
from dfc_lightning.models.mlp import MLP
from dfc_lightning.models.regressor import Regressor
from dfc_lightning.models.resnet import ResNet

__all__ = ["MLP", "Autoencoder", "Classifier", "LeNet", "Regressor", "ResNet"]
