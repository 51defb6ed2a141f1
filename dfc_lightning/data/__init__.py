"""LightningDataModules of the recipes."""

from dfc_lightning.data.cifar import CIFAR10, CIFAR100
from dfc_lightning.data.digits import Digits
from dfc_lightning.data.documentation import Documentation
from dfc_lightning.data.images import MNIST, FashionMNIST
from dfc_lightning.data.student_teacher import StudentTeacher
from dfc_lightning.data.tensors import TensorDataModule, TensorPairs

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "Digits",
    "Documentation",
    "FashionMNIST",
    "StudentTeacher",
    "TensorDataModule",
    "TensorPairs",
]
