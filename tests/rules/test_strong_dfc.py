"""Strong-DFC on networks of any kind: what its update is, what it minimises, and that it learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.chains import Case, close, degrees, flat, make
from cases.fits import Innocent, clusters, loader, quiet, strategy, weights
from cases.graphs import GraphCase
from torch import Tensor, nn

from dfc_lightning import (
    Backprop,
    ControlError,
    ControlledNetwork,
    FeedbackLearner,
    FeedbackLearning,
    LearningRule,
    LinkedLoss,
    StrongDFC,
    StrongSampled,
    TwoPhaseStrongDFC,
)
from dfc_lightning.metrics import control_effort
from dfc_lightning.network.judging import judged
from dfc_lightning.passes.chance import Chance, Drawing
from dfc_lightning.settling import Euler, PIController, SteadyState, StrongSimulation

CALM = StrongSimulation(steps=40, dt=0.01, tau_ratio=0.05)
NOISY = replace(CALM, sigma=0.02, sigma_output=0.03, tau_noise=0.1)
PI = PIController(0.01, 2.0, leak="control")
LONG = StrongSimulation(steps=4000, dt=0.05, tau_ratio=0.1)
"""Until all is at rest."""
EXACT = SteadyState(rtol=1e-12)
STILL = PIController(0.2, 0.5, leak="control")


def two_phase(case: Case, **settings: Any) -> Any:
    rule = TwoPhaseStrongDFC(link="softmax" if case.loss == "cross_entropy" else "identity", **settings)
    return rule.teach(case.forward, case.loss_grad)


# What it does, by running the network alone


def stepped(case: GraphCase, label: Tensor, simulation: StrongSimulation, pi: PIController) -> tuple[Tensor, Tensor]:
    """u and the output's activity at the end, of a module that runs once a step with each point's voltage replaced."""
    _, somata = case.run([None] * len(case.network.points))
    somata = [v.detach() for v in somata]
    output, u = case.run([None] * len(somata))[0].detach(), torch.zeros_like(label)
    u_int, share = u, simulation.dt / simulation.tau_ratio
    for _ in range(simulation.steps):
        error = label - torch.softmax(output, 1)
        u_int = u_int + simulation.dt * (error - pi.alpha * u)
        u = u_int + pi.k_p * error
        apical, at = case.forward.apical(u), iter(range(len(somata)))

        def follow(basal: Tensor, apical: Sequence[Tensor] = apical, at: Any = at) -> Tensor:
            i = next(at)
            somata[i] = somata[i] + share * (basal + apical[i] - somata[i])
            return somata[i] - basal

        output = run_with(case, follow)
    return u, output


def run_with(case: GraphCase, push: Callable[[Tensor], Tensor]) -> Tensor:
    handles, names = [], {id(m): n for n, m in case.module.named_modules()}
    for point in case.network.points:
        name = point.name if point.norm is None else names[id(point.norm)]
        hook = lambda m, args, out: (out + push(out)).clone()  # noqa: E731
        handles.append(case.held.get_submodule(name).register_forward_hook(hook))
    with torch.no_grad():
        output = case._before_softmax(case.x)
    for handle in handles:
        handle.remove()
    return output


@pytest.mark.parametrize("name", ["plain", "residual", "mixed", "pre-norm"])
def test_any_network_moves_as_one_run_step_by_step(name: str) -> None:
    case = GraphCase(name)
    label = torch.softmax(case.forward.output, 1) - case.loss_grad
    run = CALM.run(case.forward, -case.loss_grad, "softmax", PI)
    u, output = stepped(case, label, CALM, PI)
    assert close(run.settled.control, u, 1e-9)
    assert close(case.forward.output + run.settled.response.output, output, 1e-9)
    assert (output - case.forward.output).norm() > 0.1 * case.forward.output.norm()  # it is moved far


@pytest.mark.parametrize("general", [False, True])
def test_a_chain_learns_alike_whatever_it_is_seen_as(general: bool) -> None:
    found = []
    for seen_as in (False, general):
        module = Innocent().double().net
        x, y = clusters(size=8, dtype=torch.float64)[:]
        network = ControlledNetwork(module, seed=0, general=seen_as)
        torch.manual_seed(3)
        with network.taught_by(StrongDFC(NOISY, PI, "softmax")) as lesson:
            loss = F.cross_entropy(network(x), y, label_smoothing=0.1)
        loss.backward()
        found.append([p.grad for p in module.parameters()] + lesson.update.feedback)
    assert all(close(a, b, 1e-9) for a, b in zip(*found))
    assert all(t.norm() > 0 for t in found[0])


def test_the_update_keeps_its_digits_in_float32() -> None:
    case = make("tanh_ce", "random")
    for rule in (TwoPhaseStrongDFC(CALM, PI, "softmax"), StrongDFC(NOISY, PI, "softmax")):
        torch.manual_seed(0)
        exact = rule.teach(case.forward, case.loss_grad)
        small = case.to(torch.float32)
        torch.manual_seed(0)
        found = rule.teach(small.forward, case.loss_grad.float())
        assert close(flat(found).double(), flat(exact), 1e-4)


def test_it_is_no_backprop_in_disguise() -> None:
    case = make("tanh_ce", "random", batch=16)
    true = flat(Backprop().teach(case.forward, case.loss_grad))
    torch.manual_seed(0)
    for rule in (TwoPhaseStrongDFC(CALM, PI, "softmax"), StrongDFC(NOISY, PI, "softmax")):
        assert 20 < degrees(flat(rule.teach(case.forward, case.loss_grad)), true) < 90


# Its steady state


@pytest.mark.parametrize("case", ["tanh", "tanh_ce", "plain", "residual"])
def test_the_steady_state_is_where_the_simulation_comes_to_rest(case: str) -> None:
    net = GraphCase(case) if case in ("plain", "residual") else make(case, "random")
    link = "identity" if case == "tanh" else "softmax"
    pi = PIController(0.4, 0.5, leak="control")
    found, way = (
        TwoPhaseStrongDFC(settling, pi, link).teach(net.forward, net.loss_grad)
        for settling in (SteadyState(), replace(LONG, steps=1500))
    )
    assert found.settled.converged.all() and found.settled.iterations < 30
    assert close(found.settled.control, way.settled.control, 1e-8)
    for mine, theirs in zip(found.gradients, way.gradients):  # a bias before a normalisation is taught nothing
        assert close(torch.cat([t.flatten() for t in mine]), torch.cat([t.flatten() for t in theirs]), 1e-7)


def test_a_leak_stands_for_half_a_time_constant_of_the_authors_dynamics() -> None:
    """u ≈ (k_p + T) e after a time T in which the error has hardly changed."""
    case = make(((30, 40, 40, 10), "tanh", "cross_entropy"), "random", batch=16)
    theirs = flat(two_phase(case, settling=StrongSimulation(tau_ratio=0.02)))
    assert TwoPhaseStrongDFC(StrongSimulation()).control.controller == replace(PI, alpha=1e-3)
    assert degrees(flat(two_phase(case)), theirs) < 1
    assert float(flat(two_phase(case)).norm() / theirs.norm()) == pytest.approx(1, abs=0.02)
    at_rest = flat(two_phase(case, settling=LONG, controller=replace(PI, alpha=1e-3)))
    assert degrees(at_rest, theirs) > 5 and at_rest.norm() > 1.5 * theirs.norm()


# What it minimises


def at_the_label(case: Case, response: Any) -> Tensor:
    """∂g(r_L)/∂[v_1 … v_L] at the controlled state, (B, n_L, Σ n_i), from dense slopes."""
    v = [v + b + a for v, b, a in zip(case.forward.v, response.basal, response.driven)]
    if case.loss == "cross_entropy":
        p = torch.softmax(v[-1], 1)
        back = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    else:
        back = torch.eye(v[-1].shape[1], dtype=v[-1].dtype).expand(len(case.x), -1, -1)
    found = [back]
    for w, voltage in zip(reversed(case.layers.weights[1:]), reversed(v[:-1])):
        found.insert(0, (found[0] @ w) * (1 - torch.tanh(voltage).square()).unsqueeze(1))
    return torch.cat(found, dim=2)


def effort(case: Case) -> Tensor:
    """H = ½‖Qu‖² in the mean over samples."""
    settled = two_phase(case, settling=EXACT, controller=STILL).settled
    assert (settled.residual < 1e-9).all()
    return 0.5 * control_effort(case.forward.apical(settled.control))["total"]


def moved(case: Case, direction: Sequence[Tensor], step: float) -> Case:
    weights, biases, phi = case.layers
    return replace(case, layers=type(case.layers)([w + step * d for w, d in zip(weights, direction)], biases, phi))


@pytest.mark.parametrize("name", ["tanh", "tanh_ce"])
def test_the_gradient_of_the_control_is_what_the_theorem_says(name: str) -> None:
    """∂H/∂W_i = −uᵀQᵀQ (JQ + αI)⁻¹ J_i r_{i−1}ᵀ (Meulemans et al. 2022), against finite differences of H itself."""
    case = make(name, "weight_product", batch=3)
    settled = two_phase(case, settling=EXACT, controller=STILL).settled
    u, q = settled.control, case.forward.stacked_feedback
    j = at_the_label(case, settled.response)
    inner = j @ q + STILL.alpha * torch.eye(len(u[0]), dtype=u.dtype)
    rows = -(torch.linalg.solve(inner.mT, (u @ q.T @ q).unsqueeze(2)).mT @ j).squeeze(1)
    gradients = [t.T @ r / len(u) for t, r in zip(rows.split(case.widths, dim=1), case.forward.heard(settled.response))]
    torch.manual_seed(0)
    for _ in range(2):
        direction = [torch.randn_like(w) for w in case.layers.weights]
        told = sum(float((g * d).sum()) for g, d in zip(gradients, direction))
        step = 1e-5
        seen = float(effort(moved(case, direction, step)) - effort(moved(case, direction, -step))) / (2 * step)
        assert abs(seen - told) < 1e-4 * abs(told)


def test_with_feedback_in_the_row_space_the_update_descends_the_control() -> None:
    """With Q = Jᵀ at the controlled state and a small α, the change of the voltages is −∂H/∂v itself."""
    case, pi = make("tanh", "weight_product", batch=1), replace(STILL, alpha=1e-6)
    for _ in range(12):
        response = two_phase(case, settling=EXACT, controller=pi).settled.response
        case = case.with_feedback(at_the_label(case, response)[0].T.contiguous())
    update = two_phase(case, settling=EXACT, controller=pi, plasticity="voltage_difference")
    settled = update.settled
    rows, q = settled.control @ case.forward.stacked_feedback.T, case.forward.stacked_feedback
    j = at_the_label(case, settled.response)[0]
    descent = rows @ q @ torch.linalg.inv(j @ q) @ j  # what the theorem says, for α → 0
    heard = case.forward.heard(settled.response)
    for found, t, r in zip(update.weights, descent.split(case.widths, dim=1), heard):
        assert close(-found, t.T @ r, 1e-4)


def test_learning_makes_the_help_superfluous() -> None:
    case = make("tanh", "weight_product", batch=6)
    efforts = []
    for _ in range(40):
        update = two_phase(case, settling=CALM, controller=PI)
        efforts.append(float(control_effort(case.forward.apical(update.settled.control))["total"]))
        weights, biases = ([t - 0.3 * g for t, g in zip(mine, taught)] for mine, taught in zip(
            case.layers[:2], (update.weights, update.biases)))  # fmt: skip
        case = replace(case, layers=type(case.layers)(weights, biases, case.layers.nonlinearities))
    assert efforts[-1] < 0.05 * efforts[0]


# What it learns


SHORT_PASSES = FeedbackLearning(
    StrongSampled(StrongSimulation(steps=20, dt=0.01, tau_ratio=0.05, apical_tau=0.1, sigma=0.15)),
    initial_passes=1,
    passes_per_epoch=1,
    lr=1e-3,
    clip_norm=1.0,
    clip_each=True,
)
LEARNERS: dict[str, tuple[LearningRule, FeedbackLearning]] = {
    "single phase": (StrongDFC(NOISY, PI), replace(SHORT_PASSES, passes_per_epoch=0, lr=1e-4)),
    "two phases": (TwoPhaseStrongDFC(CALM, PI), SHORT_PASSES),
}


def conv() -> nn.Module:
    """With batch statistics and dropout."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 8, 2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(96, 3),
    )  # fmt: skip


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("net", ["chain", "chain, bf16-mixed", "convolutional"])
def test_it_learns_what_holds_for_data_it_has_not_seen(name: str, net: str) -> None:
    rule, learning = LEARNERS[name]
    module = Innocent(lr=0.01)
    if net == "convolutional":
        module.net = conv()
    s = strategy(rule=rule, feedback=learning)
    precision = "bf16-mixed" if net.endswith("mixed") else "32-true"
    quiet(s, max_epochs=3, precision=precision).fit(module, loader(clusters(size=320), batch_size=16))
    x, y = clusters(size=400, seed=5)[:]
    assert (module.eval()(x).argmax(1) == y).float().mean() > 0.9
    assert s.learner.steps == (20 + 3 * 20 if name == "single phase" else 4 * 20)


@pytest.mark.parametrize("rule", [StrongDFC(), TwoPhaseStrongDFC()], ids=["single phase", "two phases"])
def test_as_it_comes_it_learns(rule: LearningRule) -> None:
    module = Innocent(lr=0.03)
    quiet(strategy(rule=rule), max_epochs=1).fit(module, loader(clusters(size=192), batch_size=16))
    x, y = clusters(size=400, seed=5)[:]
    assert (module.eval()(x).argmax(1) == y).float().mean() > 0.85


# Feedback passes that know the loss


@pytest.mark.parametrize(
    "net", [lambda: Innocent().net, lambda: conv()[:-2].append(nn.Linear(96, 3))], ids=["chain", "batch statistics"]
)
def test_a_pass_sees_the_gradient_of_each_samples_own_loss_and_leaves_no_trace(net: Callable[[], nn.Module]) -> None:
    module = Innocent()
    module.net = net()
    module.double()
    x, y = clusters(size=8, dtype=torch.float64)[:]

    def loss(reduction: str) -> Tensor:
        return F.cross_entropy(module(x), y, reduction=reduction)

    output = module(x).detach().requires_grad_()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    (true,) = torch.autograd.grad(F.cross_entropy(output, y, reduction="sum"), output)
    network = ControlledNetwork(module, "net")
    for reduction in ("mean", "sum"):
        forward, grad = judged(network, lambda r=reduction: loss(r), loss_reduction=reduction)
        assert close(grad, true, 1e-12) and close(forward.output, output, 1e-12)
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_feedback_passes_move_nothing_but_feedback_weights_and_no_metric() -> None:
    found = []
    for learning in (replace(SHORT_PASSES, initial_passes=0, passes_per_epoch=0), replace(SHORT_PASSES, lr=1e-30)):
        module, s = Innocent(), strategy(rule=TwoPhaseStrongDFC(CALM, PI), feedback=learning)
        trainer = quiet(s)
        trainer.fit(module, loader())
        found.append((s.learner.steps, weights(module), trainer.callback_metrics))
    (none, plain, logged), (some, taught, also) = found
    assert (none, some) == (0, 3 * 5)
    assert close(taught, plain, 1e-5)  # with feedback weights that hardly move
    assert {"loss", "accuracy", "samples"} <= logged.keys() == also.keys()
    assert all(float(logged[name]) == pytest.approx(float(also[name]), rel=1e-4) for name in logged)


def test_each_gradient_is_clipped_by_itself() -> None:
    network = ControlledNetwork(Innocent().net, seed=0)
    forward = network.observe(clusters(size=8)[:][0])
    gradients = [torch.full_like(q, 10.0 ** (i - 1)) for i, q in enumerate(network.feedback)]
    seen: list[Tensor] = []
    learner = FeedbackLearner(network, FeedbackLearning(clip_norm=1.0, clip_each=True, weight_decay=0.0))
    step = torch.optim.Adam.step

    def noting(self: Any, *args: Any) -> Any:
        seen.extend(q.grad.norm() for q in network.feedback)
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", noting)
        metrics = learner.descend([g.clone() for g in gradients])
    expected = [min(1.0, float(g.norm())) for g in gradients]
    assert [float(n) for n in seen] == pytest.approx(expected, rel=1e-4)
    assert float(metrics["grad_norm"]) == pytest.approx(float(torch.stack([g.norm() for g in gradients]).norm()))
    assert forward.depth == len(gradients)


# What is amiss


class Silence(Drawing):
    def of_samples(self, shape: Sequence[int]) -> Tensor:
        return torch.zeros(*shape)


class Silent(Chance):
    def drawing(self) -> Drawing:
        return Silence(self)


def test_samples_that_diverge_teach_nothing() -> None:
    case = make("tanh", "random")
    forward = case.forward.with_chance(Silent(0, 0))
    grad, rest = case.loss_grad.clone(), torch.tensor([True, True, False, True, True])
    grad[2] = 1e308
    for rule in (TwoPhaseStrongDFC(CALM, PI, "identity"), StrongDFC(NOISY, PI, "identity")):
        found = rule.teach(forward, grad)
        without = rule.teach(forward.samples(rest), grad[rest])
        assert close(flat(found), 0.8 * flat(without), 1e-12)
        for mine, theirs in zip(found.feedback or [], without.feedback or []):
            assert close(mine, 0.8 * theirs, 1e-12)
        none = rule.teach(forward, torch.full_like(grad, 1e308))
        assert all(not t.any() for t in [*none.weights, *none.biases, *(none.feedback or [])])


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: StrongDFC(link="logit"), "link='logit'.*softmax"),
        (lambda: StrongDFC(CALM), r"sigma=0\.0.*TwoPhaseStrongDFC"),
        (lambda: StrongDFC(tau_f=1e-4), r"tau_f=0\.0001.*dt=0\.001"),
        (lambda: StrongDFC(plasticity="hebb"), "plasticity='hebb'"),
        (lambda: TwoPhaseStrongDFC(NOISY), r"sigma=0\.02.*StrongDFC"),
        (lambda: TwoPhaseStrongDFC(Euler()), "settling='Euler'.*SteadyState"),
        (lambda: StrongSampled(CALM), r"sigma=0\.0.*above zero"),
        (lambda: StrongSampled(tau_f=1e-4), r"tau_f=0\.0001"),
        (lambda: StrongSimulation(steps=1), "steps=1"),
        (lambda: StrongSimulation(dt=0.02, tau_ratio=0.01), r"tau_ratio=0\.01"),
        (lambda: StrongSimulation(sigma=0.1, tau_noise=1e-4), r"tau_noise=0\.0001"),
        (lambda: StrongSimulation(sigma_output=0.1), r"sigma_output=0\.1"),
        (lambda: FeedbackLearning(StrongSampled(), every_n_batches=1), "every_n_batches=1.*passes_per_epoch"),
    ],
)
def test_settings_without_sense_are_refused(make_it: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make_it()


# What the loss wants


@pytest.mark.parametrize("general", [False, True])
def test_samples_count_by_the_weights_that_the_loss_gives_them(general: bool) -> None:
    """The sum of what each would be taught alone, by its weight, at any scale of the loss."""
    module, (x, y) = Innocent().double().net, clusters(size=8, dtype=torch.float64)[:]
    forward = ControlledNetwork(module, seed=0, general=general).observe(x)
    weight = torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    grad, each = (forward.output.softmax(1) - F.one_hot(y, 3)), weight[y]
    for rule in (TwoPhaseStrongDFC(CALM, PI), TwoPhaseStrongDFC(), StrongDFC(NOISY, PI)):
        plain = [
            replace(rule, link="softmax").teach(forward.samples(torch.tensor([k])).with_chance(Silent(0, 0)), grad[[k]])
            for k in range(8)
        ]
        weighed = replace(rule, link=LinkedLoss("softmax", None, hard=True))
        found = weighed.teach(forward.with_chance(Silent(0, 0)), grad * each.unsqueeze(1))
        expected = sum(c * flat(update) for c, update in zip(each, plain)) / 8
        assert close(flat(found), expected, 1e-9)
        halved = replace(rule, link=LinkedLoss("softmax", 0.5)).teach(forward.with_chance(Silent(0, 0)), grad / 2)
        assert close(flat(halved), 0.5 * sum(flat(update) for update in plain) / 8, 1e-9)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared": lambda r, y: F.mse_loss(r, F.one_hot(y, 3).to(r)),
    "weighted": lambda r, y: F.cross_entropy(r, y, weight=torch.tensor([1.0, 2.0, 1.0]).to(r)),
    "of each class": lambda r, y: F.binary_cross_entropy_with_logits(r, F.one_hot(y, 3).to(r)),
    "smoothed, scaled": lambda r, y: 3 * F.cross_entropy(r, y, label_smoothing=0.1),
}


class By(Innocent):
    """Trained by one of these losses."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], **settings: Any) -> None:
        super().__init__(**settings)
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.at_call(self.calls)
        self.calls += 1
        return self.loss(self(batch[0]), batch[1])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_what_the_loss_wants_is_found_before_it_is_learned(loss: str, precision: str) -> None:
    module = By(LOSSES[loss], lr=0.01)
    trainer = quiet(strategy(rule=TwoPhaseStrongDFC(), feedback=None), max_epochs=3, precision=precision)
    trainer.fit(module, loader(clusters(size=320), batch_size=16))
    x, y = clusters(size=400, seed=5)[:]
    assert (module.eval()(x).argmax(1) == y).float().mean() > 0.9


def test_finding_it_changes_nothing_else() -> None:
    """Named or found, with labels mixed by chance and dropout: weights are the same to the last bit."""

    def mixed(r: Tensor, y: Tensor) -> Tensor:
        share = torch.rand(())
        return share * F.cross_entropy(r, y) + (1 - share) * F.cross_entropy(r, y.flip(0))

    found = []
    for link in ("softmax", None):
        module = By(mixed)
        module.net.insert(2, nn.Dropout(0.3))
        torch.manual_seed(4)
        learning = replace(SHORT_PASSES, method=replace(SHORT_PASSES.method, link=link))
        quiet(strategy(rule=TwoPhaseStrongDFC(CALM, PI, link), feedback=learning)).fit(module, loader())
        found.append((weights(module), module.calls))
    (named, calls), (mine, more) = found
    assert torch.equal(named, mine) and more - calls == 5


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda r, y: F.multi_margin_loss(r, y), r"jumps.*DFC\(\)"),
        (lambda r, y: F.huber_loss(r, F.one_hot(y, 3).to(r)), r"misses by.*DFC\(\)"),
        (lambda r, y: F.binary_cross_entropy_with_logits(
            r, F.one_hot(y, 3).to(r), pos_weight=torch.tensor([1.0, 5.0, 2.0])), r"pos_weight.*DFC\(\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("passes", [0, 1])
def test_a_loss_that_tells_no_label_is_refused_before_anything_is_learned(loss: Any, message: str, passes: int) -> None:
    module, learning = By(loss), replace(SHORT_PASSES, initial_passes=passes, passes_per_epoch=0)
    before, s = weights(module), strategy(rule=TwoPhaseStrongDFC(), feedback=learning)
    with pytest.raises(ControlError, match=f"(?s){message}"):
        quiet(s).fit(module, loader())
    assert torch.equal(weights(module), before)


@pytest.mark.parametrize("passes", [False, True])
def test_another_loss_than_the_one_named_is_refused(passes: bool) -> None:
    learning = replace(SHORT_PASSES, initial_passes=int(passes), passes_per_epoch=0)
    module = By(lambda r, y: (r - 3 * F.one_hot(y, 3)).square().sum(1).mean())
    with pytest.raises(ControlError, match=r"(?s)not the cross entropy.*link=None.*link='identity'.*DFC\(\)"):
        quiet(strategy(rule=TwoPhaseStrongDFC(link="softmax"), feedback=learning)).fit(module, loader())


def test_a_pass_without_a_label_is_refused() -> None:
    network = ControlledNetwork(Innocent().net, seed=0)
    learner = FeedbackLearner(network, FeedbackLearning(StrongSampled()))
    with pytest.raises(ControlError, match=r"step\(forward, loss_grad="):
        learner.step(network.observe(clusters(size=8)[:][0]))
    with pytest.raises(ControlError, match="does not depend on the network's output"):
        judged(network, lambda: torch.ones(()) + network.module(clusters(size=8)[:][0]).detach().sum())
