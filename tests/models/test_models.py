import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from dfc_lightning.data import Digits, TensorPairs
from dfc_lightning.models import MLP, Autoencoder, Classifier, LeNet, Regressor, ResNet


def trainer(**options):
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **options}
    return L.Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **options)


def loader(inputs, targets, batch_size=4):
    pairs = TensorPairs(inputs, targets)
    return DataLoader(pairs, batch_size=batch_size, collate_fn=pairs.collate)


def test_mlp_is_a_chain_of_linear_layers_with_their_nonlinearities():
    network = MLP([12, 5, 4, 3], nonlinearity=["tanh", "identity"])
    kinds = [nn.Flatten, nn.Linear, nn.Tanh, nn.Linear, nn.Identity, nn.Linear]
    assert [type(module) for module in network] == kinds
    x = torch.randn(2, 3, 2, 2)
    hidden = network[3](torch.tanh(network[1](x.flatten(1))))
    assert torch.equal(network(x), network[5](hidden))
    assert torch.equal(network[:5](x), hidden)


def test_mlp_starts_with_zero_biases_and_xavier_normal_weights():
    linear = MLP([300, 500])[1]
    assert not linear.bias.any()
    assert abs(linear.weight.std() - (2 / 800) ** 0.5) < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": [3, 3, 3], "nonlinearity": "tan"}, "nonlinearity='tan' .*tanh, relu"),
        ({"sizes": [3, 3], "initialization": "xavier"}, "initialization='xavier' .*xavier_normal"),
        ({"sizes": [3, 3, 3], "nonlinearity": ["tanh", "tanh"]}, "nonlinearity=.* 2 entries.* 1 hidden"),
        ({"sizes": [3]}, r"sizes=\[3\]"),
    ],
)
def test_mlp_refuses_what_it_cannot_build(options, message):
    with pytest.raises(ValueError, match=message):
        MLP(**options)


CONVOLUTIONAL = {
    "LeNet": (LeNet(), (1, 28, 28), 10, 6 * 26 + 16 * 151 + 120 * 401 + 84 * 121 + 10 * 85),
    "LeNet, colour": (LeNet(3, 32, 100, "tanh"), (3, 32, 32), 100, 6 * 76 + 16 * 151 + 120 * 401 + 84 * 121 + 100 * 85),
    "ResNet": (
        ResNet(),
        (3, 32, 32),
        10,
        # Convolutions with two parameters a channel from their normalisations; shortcuts; the dense layer.
        16 * (27 + 2)
        + 6 * 16 * (144 + 2)
        + 32 * (144 + 2) + 5 * 32 * (288 + 2) + 32 * (16 + 2)
        + 64 * (288 + 2) + 5 * 64 * (576 + 2) + 64 * (32 + 2)
        + 10 * 65,
    ),
    "ResNet, one block": (
        ResNet(1, 3, blocks=1, widths=(4, 4)),
        (1, 8, 8),
        3,
        4 * (9 + 2) + 2 * 4 * (36 + 2) + 2 * 4 * (36 + 2) + 4 * (4 + 2) + 3 * 5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutional_networks_have_their_shapes_and_numbers_of_parameters(name):
    network, shape, classes, parameters = CONVOLUTIONAL[name]
    assert network(torch.randn(2, *shape)).shape == (2, classes)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert Classifier(network).errors["val_error"].num_classes == classes


def test_a_residual_block_adds_what_it_hears():
    network = ResNet(blocks=1, widths=(4,)).eval()
    block = network.stages[0][0]
    nn.init.zeros_(block.norm2.weight)
    x = torch.randn(2, 3, 8, 8)
    heard = F.relu(network.norm(network.conv(x)))
    torch.testing.assert_close(network(x), network.head(heard.mean((2, 3))))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LeNet(size=30), "size=30.*28 or 32"),
        (lambda: LeNet(nonlinearity="tan"), "nonlinearity='tan' .*tanh, relu"),
        (lambda: ResNet(blocks=0), "blocks=0"),
        (lambda: ResNet(widths=()), r"widths=\(\)"),
    ],
)
def test_convolutional_networks_refuse_what_they_cannot_build(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_error_is_the_percentage_counted_by_hand():
    x, y = torch.randn(10, 6), torch.randint(0, 3, (10,))
    model = Classifier(MLP([6, 3]))
    (logged,) = trainer().test(model, loader(x, y), verbose=False)
    logits = model(x)
    assert logged["test/error"] == pytest.approx(100 * (logits.argmax(1) != y).float().mean().item())
    assert logged["test/loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)


def test_a_smoothed_label_is_soft():
    logits, y = torch.randn(10, 4), torch.randint(0, 4, (10,))
    soft = torch.full((10, 4), 0.02).scatter(1, y.unsqueeze(1), 0.94)
    found = Classifier(MLP([6, 4]), label_smoothing=0.08).loss(logits, (logits, y))
    assert found.item() == pytest.approx(-(soft * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"label_smoothing=1.0"):
        Classifier(MLP([6, 4]), label_smoothing=1.0)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Autoencoder(MLP([6, 2, 6])), lambda output, x, y: (output - x.flatten(1)).square().mean()),
        (Regressor(MLP([6, 3])), lambda output, x, y: (output - y).square().mean()),
    ],
    ids=["Autoencoder", "Regressor"],
)
def test_loss_is_the_mean_squared_error_over_samples_and_entries(model, expected):
    x, y = torch.randn(10, 1, 2, 3), torch.randn(10, 3)
    (logged,) = trainer().test(model, loader(x, y), verbose=False)
    assert logged["test/loss"] == pytest.approx(expected(model(x), x, y).item(), rel=1e-5)


def test_train_loss_is_the_mean_of_the_batch_losses():
    x, y = torch.randn(5, 6), torch.randn(5, 3)
    model = Regressor(MLP([6, 3]), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    run = trainer()
    run.fit(model, loader(x, y))
    losses = [F.mse_loss(model(x[part]), y[part]) for part in (slice(4), slice(4, 5))]
    assert run.callback_metrics["train/loss"] == pytest.approx(sum(losses).item() / 2, rel=1e-5)


def test_number_of_classes_is_inferred_or_asked_for():
    assert Classifier(MLP([6, 4, 3])).errors["val_error"].num_classes == 3
    with pytest.raises(ValueError, match="num_classes=None"):
        Classifier(nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten()))


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=0, factor=0.5, threshold=1e9, threshold_mode="abs"
        ),
    ],
    ids=["every epoch", "plateau"],
)
def test_scheduler_steps_once_an_epoch(scheduler):
    batches = loader(torch.randn(8, 6), torch.randn(8, 3))
    run = trainer(max_epochs=2, num_sanity_val_steps=0)
    run.fit(Regressor(MLP([6, 3]), scheduler=scheduler), batches, batches)
    assert run.optimizers[0].param_groups[0]["lr"] in (0.5e-3, 0.25e-3)


def test_plain_backprop_learns_digits():
    L.seed_everything(0, verbose=False)
    data = Digits()
    model = Classifier(MLP([64, 32, 10]), lambda parameters: torch.optim.Adam(parameters, lr=3e-3))
    run = trainer(max_epochs=5)
    run.fit(model, data)
    assert {"train/loss", "train/error", "val/loss", "val/error"} <= run.callback_metrics.keys()
    (logged,) = run.test(model, data, verbose=False)
    assert logged["test/error"] < 8


def test_float64_trainer_converts_float32_data():
    data = Digits()
    model = Classifier(MLP([64, 10]))
    run = trainer(precision="64-true", limit_train_batches=2, limit_val_batches=1)
    run.fit(model, data)
    assert model.network[1].weight.dtype == torch.float64
    assert run.callback_metrics["train/loss"].isfinite()
