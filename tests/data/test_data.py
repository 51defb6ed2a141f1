import gzip
import os
import pickle
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch.utils.data import DataLoader

from dfc_lightning.data import CIFAR10, MNIST, Digits, FashionMNIST, StudentTeacher, TensorPairs

IMAGES = {"MNIST": MNIST, "FashionMNIST": FashionMNIST}


def small_student_teacher(seed=0):
    return StudentTeacher(teacher_hidden_sizes=(20, 20), train_size=50, validation_size=20, test_size=30, seed=seed)


def write_idx(path, values):
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb") if path.suffix == ".gz" else open(path, "wb") as file:
        file.write(header + values.numpy().tobytes())


@pytest.fixture(scope="module")
def image_root(tmp_path_factory):
    """Both data sets as random images, 600 + 100 of them; MNIST plain, Fashion-MNIST gzipped."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for folder, suffix in (("MNIST", ""), ("FashionMNIST", ".gz")):
        for prefix, size in (("train", 600), ("t10k", 100)):
            images = torch.randint(0, 256, (size, 28, 28), dtype=torch.uint8, generator=generator)
            labels = torch.randint(0, 10, (size,), dtype=torch.uint8, generator=generator)
            write_idx(root / folder / "raw" / f"{prefix}-images-idx3-ubyte{suffix}", images)
            write_idx(root / folder / "raw" / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
    return root


def write_cifar(root, size=60):
    """Six batches of random images in the layout of CIFAR-10, the last for the test."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        images = torch.randint(0, 256, (size, 3 * 32 * 32), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, 10, (size,), generator=generator)
        (folder / name).write_bytes(pickle.dumps({"data": images.numpy(), "labels": labels.tolist()}, protocol=2))


@pytest.fixture(scope="module")
def cifar_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cifar")
    write_cifar(root)
    return root


@pytest.fixture(params=["Digits", "MNIST", "FashionMNIST", "CIFAR10", "StudentTeacher"])
def make(request, image_root, cifar_root):
    """A function that makes and sets up one kind of data from a seed."""

    def make(seed=0):
        if request.param in IMAGES:
            data = IMAGES[request.param](root=image_root, validation_size=100, seed=seed)
        elif request.param == "CIFAR10":
            data = CIFAR10(root=cifar_root, validation_size=100, seed=seed)
        else:
            data = {"Digits": Digits, "StudentTeacher": small_student_teacher}[request.param](seed=seed)
        data.prepare_data()
        data.setup("fit")
        data.setup("test")
        return data

    return make


def test_split_is_disjoint(make):
    data = make()
    held_out = {x.numpy().tobytes() for x in data.val_set.inputs}
    assert len(held_out) >= 0.99 * len(data.val_set)
    assert not any(x.numpy().tobytes() in held_out for x in data.train_set.inputs)


def test_split_is_reproducible_and_leaves_the_global_generator_alone(make):
    torch.manual_seed(1)
    first = make()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = make()
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("train_set", "val_set", "test_set"):
        assert torch.equal(getattr(first, name).inputs, getattr(second, name).inputs)
        assert torch.equal(getattr(first, name).targets, getattr(second, name).targets)
    assert not torch.equal(make(seed=1).val_set.inputs, first.val_set.inputs)


@pytest.mark.parametrize(
    ("data", "shape", "target_shape", "target_dtype"),
    [
        (lambda root: Digits(batch_size=7), (7, 1, 8, 8), (7,), torch.int64),
        (lambda root: MNIST(root, 7, validation_size=50), (7, 1, 28, 28), (7,), torch.int64),
        (lambda root: FashionMNIST(root, 7, validation_size=50), (7, 1, 28, 28), (7,), torch.int64),
        (lambda root: StudentTeacher(batch_size=7, test_size=7), (7, 15), (7, 5), torch.float32),
    ],
)
def test_batches_have_the_documented_shapes(data, shape, target_shape, target_dtype, image_root):
    data = data(image_root)
    data.setup("fit")
    x, y = next(iter(data.train_dataloader()))
    assert (x.shape, x.dtype) == (shape, torch.float32)
    assert (y.shape, y.dtype) == (target_shape, target_dtype)


def test_loader_serves_every_sample_once_and_pairs_inputs_with_their_targets():
    pairs = TensorPairs(torch.arange(10.0).unsqueeze(1), torch.arange(10))
    batches = list(DataLoader(pairs, batch_size=4, shuffle=True, collate_fn=pairs.collate))
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(x.squeeze(1), y.float())
    assert torch.equal(y.sort().values, torch.arange(10))


def test_collate_stacks_single_samples_too():
    pairs = TensorPairs(torch.randn(4, 3), torch.arange(4))
    single, whole = pairs.collate([pairs[i] for i in (2, 0)]), pairs.__getitems__([2, 0])
    assert all(torch.equal(a, b) for a, b in zip(single, whole, strict=True))


def test_standardize_maps_pixels_as_documented(image_root):
    plain, standard = (MNIST(image_root, validation_size=0, standardize=flag) for flag in (False, True))
    for data in (plain, standard):
        data.setup()
    assert plain.train_set.inputs.min() == 0 and plain.train_set.inputs.max() == 1
    torch.testing.assert_close(standard.test_set.inputs, (plain.test_set.inputs - 0.1307) / 0.3081)


def test_cifar_is_read_as_torchvision_reads_it(cifar_root, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)  # of the genuine files
    monkeypatch.setattr(datasets.CIFAR10, "_load_meta", lambda self: None)
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    data = CIFAR10(cifar_root, batch_size=7, validation_size=0, augment=False, shuffle=False)
    data.prepare_data()
    data.setup()
    for pairs, train in ((data.train_set, True), (data.test_set, False)):
        theirs = datasets.CIFAR10(cifar_root, train)
        order = torch.arange(len(theirs))
        if train:
            order = torch.randperm(len(theirs), generator=torch.Generator().manual_seed(0))  # the split's
        pixels = torch.tensor(theirs.data)[order].float() / 255
        torch.testing.assert_close(pairs.inputs.permute(0, 2, 3, 1), (pixels - mean) / std)
        assert pairs.targets.tolist() == torch.tensor(theirs.targets)[order].tolist()
    x, y = next(iter(data.train_dataloader()))
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((7, 3, 32, 32), torch.float32, (7,), torch.int64)


def test_augmentation_shifts_and_mirrors_training_images_alone(cifar_root):
    data = CIFAR10(cifar_root, validation_size=100)
    data.setup()
    assert type(data.val_set) is type(data.test_set) is TensorPairs
    torch.manual_seed(0)
    plain, (found, targets) = data.train_set.inputs[:150], data.train_set.__getitems__(range(150))
    assert torch.equal(targets, data.train_set.targets[:150])
    padded = torch.nn.functional.pad(plain, [4] * 4)
    where = []
    for image, result in zip(padded, found, strict=True):
        # Random images: each is found at one place only, and one way round.
        (place,) = (
            (i, j, mirrored)
            for i in range(9)
            for j in range(9)
            for mirrored in (False, True)
            if torch.equal(result.flip(2) if mirrored else result, image[:, i : i + 32, j : j + 32])
        )
        where.append(place)
    assert {i for i, _, _ in where} == {j for _, j, _ in where} == set(range(9))
    assert 50 < sum(mirrored for _, _, mirrored in where) < 100
    assert not torch.equal(data.train_set.__getitems__(range(150))[0], found)
    assert data.train_set[3][0].shape == (3, 32, 32)


def test_a_damaged_or_malicious_batch_of_cifar_is_refused(tmp_path):
    write_cifar(tmp_path, size=3)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    content = path.read_bytes()
    for damaged in (content[:-9], pickle.dumps({"data": 1}), pickle.dumps(os.system)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="data_batch_2 is damaged"):
            CIFAR10(tmp_path, validation_size=1).setup("fit")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"CIFAR10: data_batch_2 not found.*<root>/cifar-10-batches-py"):
        CIFAR10(tmp_path, validation_size=1).setup("fit")


def test_digits_are_standardised():
    data = Digits(validation_size=0, test_size=0)
    data.setup("fit")
    assert abs(data.train_set.inputs.mean()) < 1e-3
    assert abs(data.train_set.inputs.std() - 1) < 1e-3


def test_no_validation_set_gives_no_validation_loader(image_root):
    data = MNIST(image_root, validation_size=0)
    data.setup("fit")
    assert data.val_dataloader() == []
    assert len(data.train_set) == 600


@pytest.mark.parametrize("folder", ["MNIST", "FashionMNIST"])
def test_present_files_are_read_without_download_or_writing(folder, image_root, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    listing = sorted(image_root.rglob("*"))
    data = IMAGES[folder](image_root, validation_size=100)
    data.prepare_data()
    data.setup()
    assert sorted(image_root.rglob("*")) == listing


def test_root_is_the_argument_then_the_environment_then_data(monkeypatch):
    monkeypatch.setenv("DFC_DATA_ROOT", "from_environment")
    assert MNIST("given").root == Path("given")
    assert MNIST().root == Path("from_environment")
    monkeypatch.delenv("DFC_DATA_ROOT")
    assert MNIST().root == Path("data")


def test_failed_download_says_what_is_missing_where_and_what_to_do(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    def download(self):
        raise URLError("no network")

    monkeypatch.setattr(datasets.MNIST, "download", download)
    with pytest.raises(FileNotFoundError) as error:
        FashionMNIST(tmp_path).prepare_data()
    for part in (
        "t10k-labels-idx1-ubyte",
        str(tmp_path / "FashionMNIST" / "raw"),
        "no network",
        "<root>/FashionMNIST/raw",
        "DFC_DATA_ROOT",
        "--data.init_args.root",
    ):
        assert part in str(error.value)


def test_damaged_file_is_named(tmp_path, image_root):
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        content = (image_root / "MNIST" / "raw" / name).read_bytes()
        (tmp_path / "MNIST" / "raw").mkdir(parents=True, exist_ok=True)
        (tmp_path / "MNIST" / "raw" / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is damaged"):
        MNIST(tmp_path).setup("fit")


def test_digits_without_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "dfc_lightning\[recipes\]"'):
        Digits().setup("fit")


@pytest.mark.parametrize(("kind", "size"), [(MNIST, 60_000), (CIFAR10, 50_000), (Digits, 1600)])
def test_impossible_validation_size_is_refused(kind, size):
    with pytest.raises(ValueError, match=f"validation_size={size} "):
        kind(validation_size=size)


def test_loader_before_setup_says_so():
    with pytest.raises(RuntimeError, match=r"Call setup\(\)"):
        Digits().train_dataloader()


def test_teacher_is_the_same_for_every_split_size():
    a, b = (StudentTeacher(teacher_hidden_sizes=(20,), train_size=50, test_size=n) for n in (3, 9))
    for data in (a, b):
        data.setup()
    assert torch.equal(a.train_set.targets, b.train_set.targets)


@pytest.mark.real_data
@pytest.mark.parametrize(("folder", "mean", "std"), [("MNIST", 0.0, 1.0), ("FashionMNIST", 0.2860, 0.3530)])
def test_real_images_have_the_published_sizes_and_statistics(real_data, folder, mean, std):
    data = real_data(folder)
    data.prepare_data()
    data.setup()
    assert [len(pairs) for pairs in (data.train_set, data.val_set, data.test_set)] == [55_000, 5_000, 10_000]
    pixels = torch.cat([data.train_set.inputs, data.val_set.inputs])
    assert abs(pixels.mean() - mean) < 1e-3
    assert abs(pixels.std() - std) < 1e-3
    assert torch.equal(data.test_set.targets.unique(), torch.arange(10))
