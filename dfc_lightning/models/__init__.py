"""LightningModules of the recipes, and the networks they hold."""

from dfc_lightning.models.autoencoder import Autoencoder
from dfc_lightning.models.classifier import Classifier
from dfc_lightning.models.gpt import GPT
from dfc_lightning.models.language_model import LanguageModel
from dfc_lightning.models.lenet import LeNet
from dfc_lightning.models.mlp import MLP
from dfc_lightning.models.regressor import Regressor
from dfc_lightning.models.resnet import ResNet
from dfc_lightning.models.vgg import VGG5
from dfc_lightning.models.warm_up_cosine import WarmUpCosine

__all__ = [
    "GPT",
    "MLP",
    "VGG5",
    "Autoencoder",
    "Classifier",
    "LanguageModel",
    "LeNet",
    "Regressor",
    "ResNet",
    "WarmUpCosine",
]
