"""Damaged, short and foreign files of images are named, with what to do, and end no command in a traceback."""

import gzip
import math
import pickle
import re
import sys

import numpy as np
import pytest
import torch
from cases.paths import RECIPES
from data.test_data import write_cifar, write_idx

from dfc_lightning.data import CIFAR10, MNIST, TensorPairs
from dfc_lightning.data.checks import DataError

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
BATCH = "data_batch_3"


@pytest.fixture
def mnist(tmp_path):
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / "MNIST" / "raw" / f"{prefix}-images-idx3-ubyte", torch.zeros(20, 28, 28).byte())
        write_idx(tmp_path / "MNIST" / "raw" / f"{prefix}-labels-idx1-ubyte", torch.arange(20).byte() % 10)
    return tmp_path / "MNIST" / "raw"


def put(values):
    return lambda path: write_idx(path, values)


def gzipped(change):
    def damage(path):
        content = gzip.compress(path.read_bytes())
        path.unlink()
        path.with_name(path.name + ".gz").write_bytes(change(content))

    return damage


DAMAGED_IDX = {
    "empty": (IMAGES, lambda path: path.write_bytes(b"")),
    "cut in the header": (IMAGES, lambda path: path.write_bytes(path.read_bytes()[:9])),
    "cut in the pixels": (IMAGES, lambda path: path.write_bytes(path.read_bytes()[:-100])),
    "cut in the labels": (LABELS, lambda path: path.write_bytes(path.read_bytes()[:-3])),
    "longer": (LABELS, lambda path: path.write_bytes(path.read_bytes() + b"x")),
    "words": (IMAGES, lambda path: path.write_text("<html>not found</html>")),
    "no images": (IMAGES, put(torch.zeros(0, 28, 28).byte())),
    "fewer images than labels": (IMAGES, put(torch.zeros(15, 28, 28).byte())),
    "fewer labels than images": (LABELS, put(torch.zeros(15).byte())),
    "images of another size": (IMAGES, put(torch.zeros(20, 32, 32).byte())),
    "labels in the place of images": (IMAGES, put(torch.zeros(20).byte())),
    "images in the place of labels": (LABELS, put(torch.zeros(20, 28, 28).byte())),
    "a label beyond the classes": (LABELS, put(torch.full((20,), 47).byte())),
    "gzip cut short": (IMAGES, gzipped(lambda content: content[:-20])),
    "gzip of words": (IMAGES, gzipped(lambda content: b"words")),
    "gzip damaged within": (IMAGES, gzipped(lambda content: content[:12] + b"\xff" * 8 + content[20:])),
    "gzip empty": (IMAGES, gzipped(lambda content: b"")),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGED_IDX.values(), ids=DAMAGED_IDX)
def test_damaged_idx_files_are_named_with_what_to_do(mnist, name, damage):
    damage(mnist / name)
    with pytest.raises(DataError, match=rf"{name}.*(Replace|replace)"):
        MNIST(mnist.parent.parent, validation_size=5).setup("fit")


def test_fewer_images_than_are_held_out_is_said(mnist):
    with pytest.raises(DataError, match=r"20 images leave none .*validation_size=5000.*--data.init_args"):
        MNIST(mnist.parent.parent).setup("fit")


def dumped(**changes):
    def damage(path):
        content = {"data": np.zeros((60, 3072), np.uint8), "labels": [k % 10 for k in range(60)]} | changes
        path.write_bytes(pickle.dumps(content, protocol=2))

    return damage


def pixels(value):
    array = np.zeros((60, 3072), np.float32)
    array[7, 11] = value
    return array


DAMAGED_CIFAR = {
    "NaN": (dumped(data=pixels(math.nan)), "NaN or infinity"),
    "infinity": (dumped(data=pixels(math.inf)), "NaN or infinity"),
    "minus infinity": (dumped(data=pixels(-math.inf)), "NaN or infinity"),
    "numbers that are no bytes": (dumped(data=pixels(0.5)), "not bytes"),
    "labels that are NaN": (dumped(labels=[math.nan] * 60), "labels"),
    "labels beyond the classes": (dumped(labels=[10] * 60), "labels"),
    "negative labels": (dumped(labels=[-1] * 60), "labels"),
    "fewer labels": (dumped(labels=[1] * 59), "damaged"),
    "no labels": (dumped(labels=[]), "damaged"),
    "words for labels": (dumped(labels=["cat"] * 60), "damaged"),
    "images of another size": (dumped(data=np.zeros((60, 784), np.uint8)), "damaged"),
    "a list": (lambda path: path.write_bytes(pickle.dumps([1, 2])), "damaged"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "damaged"),
    "words": (lambda path: path.write_text("<html>not found</html>"), "damaged"),
    "binary": (lambda path: path.write_bytes(bytes(range(256))), "damaged"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGED_CIFAR.values(), ids=DAMAGED_CIFAR)
def test_damaged_batches_of_cifar_are_named_with_what_to_do(tmp_path, damage, words):
    write_cifar(tmp_path)
    damage(tmp_path / "cifar-10-batches-py" / BATCH)
    with pytest.raises(DataError, match=rf"{BATCH}.*{words}.*[Rr]eplace") as refused:
        CIFAR10(tmp_path, validation_size=5).setup("fit")
    assert "-nan" not in str(refused.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["inputs", "targets"])
def test_tensors_that_are_no_numbers_are_refused(which, value):
    given = {"inputs": torch.zeros(5, 3), "targets": torch.zeros(5, 2)}
    given[which][3, 1] = value
    with pytest.raises(DataError, match=rf"{which} hold NaN or infinity: remove"):
        TensorPairs(**given)


def test_large_finite_tensors_are_accepted():
    TensorPairs(torch.full((5, 3), 3e38), torch.arange(5))
    TensorPairs(torch.zeros(0, 3), torch.zeros(0))


@pytest.mark.parametrize("command", ["fit", "reproduce"])
def test_a_command_ends_in_the_sentence(tmp_path, monkeypatch, capsys, command):
    pytest.importorskip("jsonargparse")
    from dfc_lightning import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dfc"])
    recipes = RECIPES
    write_cifar(tmp_path)
    dumped(data=pixels(math.nan))(tmp_path / "cifar-10-batches-py" / BATCH)
    monkeypatch.setenv("DFC_DATA_ROOT", str(tmp_path))
    words = {
        "fit": ["fit", f"--config={recipes}/cifar10/resnet20_bp.yaml", "--data.init_args.validation_size=5"],
        "reproduce": ["reproduce", f"--recipes={recipes}", "--column=cifar10", "--rule=resnet20_bp", "--seeds=1"],
    }
    with pytest.raises(SystemExit) as stopped:
        cli.main(words[command])
    said = str(stopped.value.code)
    assert re.match(rf"error: .*{BATCH} is damaged: its pixels hold NaN or infinity", said), said
    assert "Traceback" not in capsys.readouterr().err
