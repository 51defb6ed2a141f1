"""What Meulemans et al. (NeurIPS 2021) prove of deep feedback control, against dense linear algebra."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases.chains import NETWORKS, PHI, Case, close, degrees, flat, make
from torch import Tensor
from torch.func import jacrev

from dfc_lightning.feedback_learning.sampled import Sampled
from dfc_lightning.rules import DFA, DFC, Backprop, LearningRule, MinimumNorm, Update
from dfc_lightning.settling import Euler, Linearized, Settling, SteadyState
from dfc_lightning.settling.controller import PIController

networks = pytest.mark.parametrize("name", NETWORKS)
NO_LEAK = PIController(0.0)
EXACT = SteadyState(rtol=1e-12, max_iterations=50)
SMALL = 1e-6


def teach(rule: LearningRule, case: Case) -> Update:
    return rule.teach(case.forward, case.loss_grad)


def ss(stepsize: float = SMALL, controller: PIController = NO_LEAK) -> DFC:
    """DFC-SS with the voltage differences of Eq. (9), for which the theorems are stated."""
    return DFC(EXACT, controller, stepsize, plasticity="voltage_difference")


def parameter_jacobian(case: Case) -> list[Tensor]:
    """∂r_L/∂[W_i b_i] of a case of one sample by torch.func, one (n_L, n_i, n_{i−1} + 1) a layer."""
    function = lambda *parameters: case.output(parameters=parameters)[0]  # noqa: E731
    weights, biases = jacrev(function, argnums=(0, 1))(case.forward.weights, case.forward.biases)
    return [torch.cat([w, b.unsqueeze(2)], dim=2) for w, b in zip(weights, biases)]


def layers(update: Update) -> list[Tensor]:
    """[W_i b_i] of each layer."""
    return [torch.cat([w, b.unsqueeze(1)], dim=1) for w, b in zip(update.weights, update.biases)]


def input_norms(case: Case) -> list[Tensor]:
    """‖[r_{i−1}; 1]‖ of a case of one sample: the bias is the weight of an input of one."""
    return [(r[0].square().sum() + 1).sqrt() for r in [case.x, *case.rates()[:-1]]]


@networks
@pytest.mark.parametrize("plasticity", ["rate_difference", "voltage_difference", "derivative"])
@pytest.mark.parametrize("settling", [Linearized(), SteadyState()], ids=["SSA", "SS"])
def test_equation_5_the_update_is_made_of_the_settled_rates(name: str, plasticity: str, settling: Settling) -> None:
    case = make(name)
    update = teach(DFC(settling, PIController(0.1), 0.7, plasticity=plasticity), case)
    assert update.settled is not None
    forward = case.forward
    pushes = [update.settled.control @ q.T for q in forward.feedback]
    rates, before = [case.x, *case.rates(pushes)], [case.x, *case.rates()]
    for i, (w, b) in enumerate(zip(forward.weights, forward.biases)):
        phi = PHI[case.hidden][1] if i < forward.depth - 1 else PHI["linear"][1]
        basal = rates[i] @ w.T + b
        v = (before[i] @ w.T + b).requires_grad_()
        slope = torch.autograd.grad(phi(v).sum(), v)[0]
        factor = {
            "rate_difference": rates[i + 1] - phi(basal),
            "voltage_difference": pushes[i],
            "derivative": slope * pushes[i],
        }[plasticity]
        assert close(update.weights[i], -factor.T @ rates[i] / (0.7 * 5), 1e-10)
        assert close(update.biases[i], -factor.sum(0) / (0.7 * 5), 1e-10)


@networks
@pytest.mark.parametrize("plasticity", ["rate_difference", "voltage_difference", "derivative"])
def test_the_integrated_update_is_the_mean_of_those_of_all_states(name: str, plasticity: str) -> None:
    case, steps = make(name), 6
    rule = DFC(Euler(steps=steps), PIController(0.1, 2.0), 0.7, plasticity=plasticity)
    states = [flat(teach(replace(rule, settling=Euler(steps=n)), case)) for n in range(1, steps + 1)]
    integrated = flat(teach(replace(rule, integrate=True), case))
    assert close(integrated, sum(states) / (steps + 1), 1e-12)  # the feedforward state, the first, gives none


@networks
@pytest.mark.parametrize("controller", [PIController(0.1, 2.0, leak) for leak in ("integral", "control")])
def test_lemma_1_the_steady_control_is_linear_in_the_target_up_to_second_order(
    name: str, controller: PIController
) -> None:
    case = make(name, "random")
    leak = 0.1 / 1.2 if controller.leak == "integral" else 0.1  # α̃ = α / (1 + α k_p)
    errors = []
    for stepsize in (1e-3, 1e-4, 1e-5):
        offset = -stepsize * case.loss_grad
        lemma = torch.linalg.solve(case.gain + leak * torch.eye(offset.shape[1], dtype=offset.dtype), offset)
        settled = EXACT.settle(case.forward, offset, controller)
        linear = Linearized().settle(case.forward, offset, controller)
        assert (settled.residual < 1e-9).all()
        assert close(linear.control, lemma, 1e-11)
        errors.append(float((lemma - settled.control).norm() / settled.control.norm()))
    if NETWORKS[name][1] in ("tanh", "sigmoid", "softplus") and len(case.forward.weights) > 1:
        assert errors[0] / errors[1] == pytest.approx(10, rel=0.15)  # relative error O(λ)
        assert errors[1] / errors[2] == pytest.approx(10, rel=0.15)
    else:  # piecewise linear
        assert max(errors[1:]) < 1e-10


def condition_1(case: Case, norm: float = 1.0) -> Case:
    """One sample, with input and each layer scaled so that ‖r_0‖ = … = ‖r_{L−1}‖ = ``norm``."""
    case = replace(case, x=case.x * norm / case.x.norm())
    weights, biases = list(case.layers.weights), list(case.layers.biases)
    for i in range(len(weights) - 1):
        low, high = 0.0, 1e3
        for _ in range(80):
            scale = (low + high) / 2
            scaled = ([*weights[:i], scale * weights[i]], [*biases[:i], scale * biases[i]])
            rates = PHI[case.hidden][1](
                (case.rates(parameters=scaled)[-2] if i else case.x) @ scaled[0][i].T + scaled[1][i]
            )
            low, high = (scale, high) if rates.norm() < norm else (low, scale)
        weights[i], biases[i] = scaled[0][i], scaled[1][i]
    return replace(case, layers=case.layers._replace(weights=weights, biases=biases))


def condition_2(case: Case, seed: int = 3) -> Case:
    """Q = Jᵀ M with a random invertible M."""
    g = torch.Generator().manual_seed(seed)
    outputs = case.loss_grad.shape[1]
    return case.with_feedback(case.jacobian[0].T @ torch.randn(outputs, outputs, generator=g, dtype=case.x.dtype))


def gauss_newton(case: Case) -> list[Tensor]:
    """J_θ⁺ e of a case of one sample with the loss ½‖r_L − y‖², in gradient units."""
    jacobian = parameter_jacobian(case)
    step = torch.linalg.pinv(torch.cat([j.flatten(1) for j in jacobian], dim=1)) @ case.loss_grad[0]
    return [part.view(j.shape[1:]) for part, j in zip(step.split([j[0].numel() for j in jacobian]), jacobian)]


def angle(a: list[Tensor], b: list[Tensor]) -> float:
    return degrees(torch.cat([t.flatten() for t in a]), torch.cat([t.flatten() for t in b]))


@pytest.mark.parametrize("hidden", ["linear", "tanh", "leaky_relu"])
@pytest.mark.parametrize("seed", range(3))
def test_theorem_2_under_conditions_1_and_2_the_update_is_that_of_gauss_newton(hidden: str, seed: int) -> None:
    plain = make(((6, 5, 4, 3), hidden, "squared"), "random", batch=1, seed=seed)
    equal = condition_1(plain)
    both = condition_2(equal)
    norms = input_norms(both)
    assert all(n == pytest.approx(2**0.5, rel=1e-12) for n in norms)
    update = layers(teach(ss(), both))
    assert angle(update, gauss_newton(both)) < 1e-3
    for mine, theirs in zip(update, gauss_newton(both)):
        assert close(mine, 2 * theirs, 1e-4)  # the scale, ‖[r; 1]‖², is the same for every layer
    assert angle(layers(teach(ss(), equal)), gauss_newton(equal)) > 10  # without Condition 2
    only_2 = condition_2(replace(equal, x=4 * equal.x))
    assert angle(layers(teach(ss(), only_2)), gauss_newton(only_2)) > 1  # without Condition 1


@networks
@pytest.mark.parametrize("seed", range(3))
def test_theorem_3_under_condition_2_updates_are_weighted_minimum_norm(name: str, seed: int) -> None:
    case = condition_2(make(name, batch=1, seed=seed))
    # arg min Σ ‖r_{i−1}‖² ‖ΔW_i‖² with J_θ Δθ = e: the pseudoinverse in the variables ‖r_{i−1}‖ ΔW_i.
    norms = input_norms(case)
    scaled = [j / n for j, n in zip(parameter_jacobian(case), norms)]
    inverse = torch.linalg.pinv(torch.cat([j.flatten(1) for j in scaled], dim=1), rtol=1e-10)
    target = case.loss_grad[0]
    parts = (inverse @ target).split([j[0].numel() for j in scaled])
    for mine, part, n, j in zip(layers(teach(ss(), case)), parts, norms, scaled):
        assert close(mine / n**2, part.view(j.shape[1:]) / n, 1e-4)


@networks
@pytest.mark.parametrize("settling", [Linearized(), EXACT], ids=["SSA", "SS"])
@pytest.mark.parametrize("plasticity", ["rate_difference", "voltage_difference", "derivative"])
def test_theorem_3_the_minimum_norm_rule_is_dfc_with_ideal_feedback(
    name: str, settling: Settling, plasticity: str
) -> None:
    case = condition_2(make(name, batch=1))
    update = teach(DFC(settling, NO_LEAK, SMALL, plasticity=plasticity), case)
    ideal = teach(MinimumNorm(0.0, SMALL, plasticity), case)
    for mine, theirs in zip([*update.weights, *update.biases], [*ideal.weights, *ideal.biases]):
        assert close(mine, theirs, 1e-8 if isinstance(settling, Linearized) else 1e-4)
    if len(case.forward.weights) > 1:
        off = make(name, "random", batch=1)
        assert degrees(flat(teach(DFC(settling, NO_LEAK, SMALL, plasticity=plasticity), off)), flat(ideal)) > 5


def test_theorem_3_the_driven_output_reaches_its_target_after_the_weight_update() -> None:
    case = make("tanh", "random", batch=1)  # whatever the feedback, to first order in λ
    errors = []
    for stepsize in (1e-2, 1e-3):
        update = layers(teach(ss(stepsize), case))
        steps = [-stepsize * d / n**2 for d, n in zip(update, input_norms(case))]
        weights = [w + d[:, :-1] for w, d in zip(case.forward.weights, steps)]
        biases = [b + d[:, -1] for b, d in zip(case.forward.biases, steps)]
        target = case.output() - stepsize * case.loss_grad
        errors.append(float((case.output(parameters=(weights, biases)) - target).norm() / stepsize))
    assert errors[1] < 0.02 * case.loss_grad.norm()
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.3)


@networks
@pytest.mark.parametrize("feedback", ["random", "unruly"])
def test_proposition_4_any_feedback_gives_a_descent_direction(name: str, feedback: str) -> None:
    # With the layer-wise rate 1/‖r_{i−1}‖²: in gradient units its product with the gradient is ‖∂ℓ/∂r_L‖² > 0.
    astray = 0
    for seed in range(10):
        case = make(name, feedback, batch=1, seed=seed)
        jacobian = parameter_jacobian(case)
        gradient = [torch.einsum("oij,o->ij", j, case.loss_grad[0]) for j in jacobian]
        update = [
            d / n**2 for d, n in zip(layers(teach(replace(ss(1e-10), settling=Linearized()), case)), input_norms(case))
        ]
        product = sum(float((g * d).sum()) for g, d in zip(gradient, update))
        assert product == pytest.approx(float(case.loss_grad.square().sum()), rel=1e-4)
        assert angle(update, gradient) < 90
        astray += angle(layers(teach(DFA(), case)), gradient) > 90
    if name == "linear" and feedback == "random":
        assert astray  # direct feedback alignment has no such guarantee


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "tanh"])
def test_proposition_5_condition_3_tells_which_networks_settle(name: str) -> None:
    dt, margin, alpha = 0.04, 0.3, 0.2
    outcomes = []
    for seed in range(80):
        case = make(name, "unruly", batch=1, seed=seed)
        spectrum = torch.linalg.eigvals(case.gain[0]) + alpha
        slowest = float(spectrum.real.min())
        if abs(slowest) < margin or (spectrum.abs().square() * dt > 1.5 * spectrum.real.clamp_min(margin)).any():
            continue  # too near the border, or Euler's own stability would decide
        stable = slowest > 0
        if outcomes.count(stable) == 8:
            continue
        settled = Euler(steps=1500, dt=dt, instant_system=True).settle(
            case.forward, -1e-5 * case.loss_grad, PIController(alpha)
        )
        assert bool(settled.residual < 1e-4) == stable, (seed, spectrum, settled.residual)
        outcomes.append(stable)
    assert min(sum(outcomes), len(outcomes) - sum(outcomes)) >= 5


def condition_2_ratio(feedback: Tensor, jacobian: Tensor) -> float:
    """‖P Q‖ / ‖Q‖ with P the projection onto the rows of J."""
    basis = torch.linalg.qr(jacobian.T).Q
    return float((basis.T @ feedback).norm() / feedback.norm())


@pytest.mark.slow
def test_theorem_6_feedback_learning_turns_random_feedback_into_a_damped_pseudoinverse() -> None:
    case = make("linear", "unruly", batch=200)
    jacobian = case.jacobian[0]  # the same for every sample
    gammas = torch.logspace(-2, 1.5, 60)
    eye = torch.eye(3, dtype=torch.float64)
    ideals = [jacobian.T @ torch.linalg.inv(jacobian @ jacobian.T + float(g) * eye) for g in gammas]

    def best(feedback: Tensor) -> float:
        return min(degrees(feedback, ideal) for ideal in ideals)

    method = Sampled(steps=60, dt=0.02, tau_ratio=0.02, apical_tau=0.1, alpha=2.0, k_p=0.0, instant_system=True)
    generator = torch.Generator().manual_seed(0)
    feedback = torch.cat(list(case.feedback))
    assert best(feedback) > 60
    assert condition_2_ratio(feedback, jacobian) < 0.8
    assert torch.linalg.eigvals(jacobian @ feedback).real.min() < 0
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    for _ in range(400):
        learner = case.with_feedback(feedback)
        gradient = torch.cat(method.gradient(learner.forward, draw))
        feedback = feedback - 0.02 * (gradient + 0.05 * feedback)
    assert best(feedback) < 10
    assert condition_2_ratio(feedback, jacobian) > 0.99
    assert torch.linalg.eigvals(jacobian @ feedback).real.min() > 0  # Condition 3, even with α = 0


@pytest.mark.parametrize("feedback", ["random", "pseudoinverse", "mixed"])
@pytest.mark.parametrize("settling", [Linearized(), EXACT], ids=["SSA", "SS"])
def test_dfc_in_a_deep_network_is_not_backprop(feedback: str, settling: Settling) -> None:
    case = make("tanh", feedback, batch=1)
    update = teach(DFC(settling, PIController(1e-3), 1e-2), case)
    assert degrees(flat(update), flat(teach(Backprop(), case))) > 15


@pytest.mark.parametrize("hidden", PHI)
def test_direct_feedback_alignment_through_transposed_weights_is_backprop_in_two_layers(hidden: str) -> None:
    case = make(((6, 5, 3), hidden, "squared"), "weight_product")
    assert close(flat(teach(DFA(), case)), flat(teach(Backprop(), case)), 1e-12)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
@pytest.mark.parametrize("settling", [Linearized(), SteadyState(), Euler(steps=2000)], ids=["SSA", "SS", "Euler"])
def test_dfc_in_one_linear_layer_without_leakage_is_backprop(loss: str, settling: Settling) -> None:
    case = make(((6, 3), "linear", loss))
    update = teach(DFC(settling, NO_LEAK, 0.1), case)
    assert close(flat(update), flat(teach(Backprop(), case)), 1e-12)


RULES: dict[str, LearningRule] = {
    "SSA": DFC(Linearized()),
    "SS": DFC(SteadyState()),
    "SS, dropped": DFC(SteadyState(max_iterations=1), unconverged="drop"),
    "Euler": DFC(Euler(steps=100)),
    "Euler, integrated": DFC(Euler(steps=100), integrate=True),
    "minimum norm": MinimumNorm(0.1),
    "DFA": DFA(),
    "backprop": Backprop(),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("times", [2, 3])
def test_repeating_a_batch_changes_nothing(rule: str, times: int) -> None:
    case = make("tanh_ce", "random")
    again = replace(case, x=case.x.repeat(times, 1), y=case.y.repeat(times))
    assert close(flat(teach(RULES[rule], again)), flat(teach(RULES[rule], case)), 1e-12)


@networks
def test_the_target_stepsize_drops_out_of_the_update_as_it_vanishes(name: str) -> None:
    case = make(name)
    updates = [flat(teach(DFC(EXACT, PIController(0.1), stepsize), case)) for stepsize in (1e-4, 1e-5, 1e-6)]
    assert close(updates[0], updates[2], 1e-2)
    assert close(updates[1], updates[2], 1e-3)
