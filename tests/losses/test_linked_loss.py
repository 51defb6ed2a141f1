"""What a loss is found to want of the output, against autograd of the loss itself at other outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfc_lightning import ControlError, ControlledNetwork, Label, LinkedLoss, find_link
from dfc_lightning.losses.link import LINKS, change, linked, slope

B, N = 6, 4
HARD = torch.tensor([0, 3, 1, 2, 2, 0])
ONE_HOT = F.one_hot(HARD, N).double()
SOFT = torch.softmax(torch.randn(B, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1)
MANY = (SOFT > 0.25).double()
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 4.0], dtype=torch.float64)
IGNORED = torch.tensor([0, -100, 1, 2, -100, 0])

Loss = Callable[[Tensor], Tensor]


def ce(target: Tensor, **settings: Any) -> Loss:
    return lambda r: F.cross_entropy(r, target, **settings)


def bce(target: Tensor, **settings: Any) -> Loss:
    return lambda r: F.binary_cross_entropy_with_logits(r, target, **settings)


def squared(target: Tensor, factor: float = 1.0) -> Loss:
    return lambda r: factor * F.mse_loss(r, target)


TELLING: dict[str, tuple[Loss, Any, float | None]] = {
    "cross entropy": (ce(HARD), "softmax", 1.0),
    "smoothed": (ce(HARD, label_smoothing=0.1), "softmax", 1.0),
    "of probabilities": (ce(SOFT), "softmax", 1.0),
    "mixed up": (lambda r: 0.3 * ce(HARD)(r) + 0.7 * ce(HARD.flip(0))(r), "softmax", 1.0),
    "seven times": (lambda r: 7 * ce(HARD)(r), "softmax", 7.0),
    "of a batch's share": (lambda r: ce(HARD)(r) / 128, "softmax", 1 / 128),
    "by its log softmax": (lambda r: F.nll_loss(F.log_softmax(r, 1), HARD), "softmax", 1.0),
    "class weights": (ce(HARD, weight=WEIGHTS), "softmax", None),
    "some ignored": (ce(IGNORED), "softmax", None),
    "binary": (bce(MANY), "sigmoid", 1 / N),
    "binary, soft": (bce(SOFT), "sigmoid", 1 / N),
    "binary, of a sigmoid": (lambda r: F.binary_cross_entropy(torch.sigmoid(r), MANY), "sigmoid", 1 / N),
    "positives weigh more": (bce(MANY, pos_weight=WEIGHTS), "sigmoid", None),
    "squared": (squared(SOFT), "identity", 2 / N),
    "half squared": (squared(SOFT, N / 2), "identity", 1.0),
    "with a term beside": (lambda r: ce(HARD)(r) + 3.0, "softmax", 1.0),
}


def output(dtype: torch.dtype = torch.float64, size: float = 1.0) -> Tensor:
    return size * torch.randn(B, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def gradient(loss: Loss, r: Tensor) -> Tensor:
    """∂ℓ_b/∂r_L of each sample's own loss."""
    r = r.detach().requires_grad_()
    return len(r) * torch.autograd.grad(loss(r), r)[0]


@pytest.mark.parametrize("name", TELLING)
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_the_error_of_any_output_is_known_without_the_loss(name: str, size: float) -> None:
    loss, link, scale = TELLING[name]
    r = output(size=size)
    if name == "binary, of a sigmoid":  # whose own gradient is lost where the sigmoid is 1
        r = r.clamp(-15.0, 15.0)
    found = find_link(loss, r)
    assert found.link == link
    assert found.scale == (scale if scale is None else pytest.approx(scale, rel=1e-12))
    label = found.told(r, gradient(loss, r))
    for deviation in (None, torch.zeros_like(r), 1e-6 * output(), output(size=3.0).flip(0)):
        seen = gradient(loss, r if deviation is None else r + deviation)
        assert torch.allclose(label.loss_grad(deviation), seen, rtol=1e-9, atol=1e-10)
    some = torch.tensor([3, 1])
    assert torch.allclose(label.samples(some).loss_grad(r[some]), label.loss_grad(r)[some], rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "y"),
    [("cross entropy", ONE_HOT), ("smoothed", 0.9 * ONE_HOT + 0.025), ("of probabilities", SOFT), ("squared", SOFT),
     ("class weights", ONE_HOT), ("binary", MANY), ("positives weigh more", MANY), ("seven times", ONE_HOT)],
)  # fmt: skip
def test_the_label_is_the_one_that_the_loss_was_given(name: str, y: Tensor) -> None:
    loss, r = TELLING[name][0], output()
    assert torch.allclose(find_link(loss, r).told(r, gradient(loss, r)).label, y, atol=1e-12)


def test_what_a_sample_weighs_is_told_with_it() -> None:
    r = output()
    loss = TELLING["class weights"][0]
    label = find_link(loss, r).told(r, gradient(loss, r))
    each = WEIGHTS[HARD].unsqueeze(1)
    assert torch.allclose(label.weight, each / each.mean())  # torch divides by the sum of the weights
    ignored = TELLING["some ignored"][0]
    label = find_link(ignored, r).told(r, gradient(ignored, r))
    assert torch.equal(label.weight.squeeze(1) == 0, IGNORED < 0)
    assert torch.equal(label.error()[IGNORED < 0], torch.zeros(2, N, dtype=torch.float64))
    loss = TELLING["positives weigh more"][0]
    with pytest.raises(ControlError, match="pos_weight"):
        find_link(loss, r).told(r, gradient(loss, r)).weight  # noqa: B018


@pytest.mark.parametrize("name", ["cross entropy", "smoothed", "class weights", "binary", "squared", "seven times"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_few_digits_do_for_finding_it(name: str, dtype: torch.dtype) -> None:
    loss, link, scale = TELLING[name]
    cast = lambda r: loss(r.double())  # noqa: E731
    found = find_link(cast, output(dtype))
    assert found.link == link
    assert found.scale == (None if scale is None else pytest.approx(scale, rel=1e-6))
    assert find_link(cast, output(dtype).flip(0)) == found  # the same, whichever batch it is found from


def test_a_sum_is_told_from_a_mean() -> None:
    loss = lambda r: F.cross_entropy(r, HARD, reduction="sum")  # noqa: E731
    assert find_link(loss, output(), "sum") == LinkedLoss("softmax", 1.0, hard=True)
    assert find_link(loss, output()).scale == B


@pytest.mark.parametrize("name", ["class weights", "some ignored", "mixed up", "of probabilities"])
def test_weights_and_soft_labels_may_come_later(name: str) -> None:
    """The first batch, of hard labels without weights, need not show all that a loss does."""
    r, d = output(), output().flip(0)
    first = find_link(ce(HARD), r)
    assert first == LinkedLoss("softmax", 1.0, hard=True)
    label = first.told(r, gradient(TELLING[name][0], r))
    assert torch.allclose(label.loss_grad(d), gradient(TELLING[name][0], r + d), atol=1e-10)


@pytest.mark.parametrize("name", ["class weights", "positives weigh more"])
def test_a_saturated_output_still_tells_its_label(name: str) -> None:
    """Where it is right nothing is wanted; where it is wrong all of the label."""
    loss, link, _ = TELLING[name]
    r = torch.zeros(B, N, dtype=torch.float64)
    r[:, 0] = 200.0
    label = find_link(loss, r).told(r, gradient(loss, r))
    assert torch.isfinite(label.offset).all() and torch.isfinite(label.scale).all()
    y = ONE_HOT if link == "softmax" else MANY
    wrong = (y - linked(link, r)).abs() > 1e-6
    assert torch.allclose(label.label[wrong], y[wrong])
    assert torch.allclose(label.loss_grad(), gradient(loss, r), atol=1e-12)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("size", [1e-12, 0.3, 3.0, 300.0])
def test_small_changes_keep_their_digits(link: Any, size: float) -> None:
    r, d = output(), output(size=size).flip(0)
    exact = linked(link, r.double() + d) - linked(link, r)
    if size < 1e-6:
        exact = (slope(link, r) @ d.unsqueeze(2)).squeeze(2)
    assert torch.allclose(change(link, r, d), exact, rtol=1e-9, atol=1e-30 if size < 1e-6 else 1e-14)


@pytest.mark.parametrize("link", LINKS)
def test_slopes_are_those_of_autograd(link: Any) -> None:
    r, d = output(), output().flip(0)
    expected = torch.stack([torch.autograd.functional.jacobian(lambda o: linked(link, o[None])[0], o) for o in r + d])
    label = Label(link, r, torch.zeros_like(r), torch.ones(B, 1))
    assert torch.allclose(label.slope(d), expected, atol=1e-12)


REFUSED: dict[str, tuple[Loss, str]] = {
    "hinge": (lambda r: F.multi_margin_loss(r, HARD), "only in jumps"),
    "absolute": (lambda r: F.l1_loss(r, SOFT), "only in jumps"),
    "linear": (lambda r: (r * SOFT).sum(), "does not change with the output"),
    "huber": (lambda r: F.huber_loss(r, SOFT), "nearest g, .* misses"),
    "focal": (lambda r: ((1 - r.softmax(1)[range(B), HARD]) ** 2 * F.cross_entropy(r, HARD, reduction="none")).mean(),
              "nearest g, .* misses"),
    "a distance": (lambda r: (r - SOFT).norm(dim=1).mean(), "nearest g, .* misses"),
    "squared, of a softmax": (lambda r: F.mse_loss(r.softmax(1), ONE_HOT), "nearest g, .* misses"),
    "its own label": (lambda r: ce(r.argmax(1))(r), "misses"),
    "of the batch": (lambda r: (r - SOFT).square().mean().sqrt(), "misses"),
    "with a root": (lambda r: (r.sqrt() - SOFT).square().sum(), "not finite"),
    "the other way": (lambda r: -ce(HARD)(r), "away from a label"),
    "no probabilities": (lambda r: ce(HARD)(r) + r[:, 0].sum(), "no probabilities"),
    "weighed squares": (lambda r: ((r - SOFT).square() * SOFT).sum(), "weights of their own"),
    "weights of soft labels": (ce(SOFT, weight=WEIGHTS), "weights of their own"),
    "none": (lambda r: r.detach().sum(), "does not depend on the output"),
    "zero": (lambda r: 0 * r.sum(), "it is zero"),
    "by chance": (lambda r: F.mse_loss(r, torch.randn(B, N, dtype=torch.float64)), "chance has a part"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_tells_no_label_is_refused_with_the_reason(name: str) -> None:
    loss, reason = REFUSED[name]
    with pytest.raises(ControlError, match=rf"(?s){reason}.*Name the rule's link.*DFC\(\)"):
        find_link(loss, output())


def test_another_loss_than_the_one_named_is_refused() -> None:
    r = output()
    grad = gradient(squared(3 * output().flip(0)), r)
    for named in (LinkedLoss("softmax"), LinkedLoss("sigmoid"), LinkedLoss("softmax", None, True)):
        with pytest.raises(ControlError, match=r"(?s)not the .*cross entropy.*sample \d.*link=None"):
            named.told(r, grad)
    with pytest.raises(ControlError, match="with hard labels"):
        LinkedLoss("softmax", None, True).told(r, gradient(ce(SOFT), r))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinkedLoss("logit"), "link='logit'.*softmax"),
        (lambda: LinkedLoss("softmax", 0.0), r"scale=0\.0"),
        (lambda: LinkedLoss("softmax", float("nan")), "scale=nan"),
        (lambda: LinkedLoss("softmax", None), "scale=None.*hard=True"),
        (lambda: LinkedLoss("identity", None, hard=True), "scale=None.*cross entropy"),
        (lambda: find_link(ce(HARD), output(), "none"), "loss_reduction='none'"),
    ],
)
def test_settings_without_sense_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("general", [False, True])
def test_a_pass_tells_the_label_by_what_its_loss_is_known_to_be(general: bool) -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, N)).double()
    forward = ControlledNetwork(module, general=general).observe(torch.randn(B, 3, dtype=torch.float64))
    loss = lambda r: 7 * ce(HARD)(r)  # noqa: E731
    grad = gradient(loss, forward.output)
    with pytest.raises(ControlError, match="Name the rule's link.*find_link"):
        forward.label(grad)
    known = forward.with_loss(find_link(loss, forward.output))
    some = torch.tensor([4, 0])
    for label, y in ((known.label(grad), ONE_HOT), (known.samples(some).label(grad[some]), ONE_HOT[some])):
        assert torch.allclose(label.label, y, atol=1e-12)
        assert torch.allclose(label.weight, torch.full((len(y), 1), 7.0, dtype=torch.float64))
    assert torch.allclose(forward.label(grad / 7, "softmax").label, ONE_HOT, atol=1e-12)
