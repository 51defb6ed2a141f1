"""Settling methods × networks: they agree with each other and with dense solves, and hide no failure."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases.chains import NETWORKS, Case, close, flat, make
from torch import Tensor
from torch.func import jacrev

from dfc_lightning.passes import Deviation
from dfc_lightning.rules import DFC
from dfc_lightning.settling import Euler, Linearized, Settling, SteadyState
from dfc_lightning.settling.broyden import DenseInverse, Root, StoredSteps, find_root
from dfc_lightning.settling.controller import PIController
from dfc_lightning.settling.inverse import DENSE_UP_TO, OWN_UP_TO, cheap_inverse, own_inverse

networks = pytest.mark.parametrize("name", NETWORKS)
TIGHT = SteadyState(rtol=1e-11, max_iterations=50)
CONTROLLERS = [PIController(0.1, k_p, leak) for leak in ("integral", "control") for k_p in (0.0, 2.0)]
METHODS: dict[str, Settling] = {"SSA": Linearized(), "SS": SteadyState(), "Euler": Euler(steps=200)}
methods = pytest.mark.parametrize("method", METHODS)


def states(response: Deviation) -> tuple[list[Tensor], ...]:
    return response.basal, response.driven, response.rates


def missing(case: Case, u: Tensor, offset: Tensor, leakage: float) -> Tensor:
    """F(u) = δ_L − δr_L(u) − α̃ u from plain forward passes."""
    moved = case.output([u @ q.T for q in case.feedback]) - case.output()
    return offset - moved - leakage * u


def newton(case: Case, offset: Tensor, leakage: float, steps: int) -> Tensor:
    """The steady control by dense Newton steps, sample by sample; after one step it is Lemma 1's."""
    found = []
    for i, delta in enumerate(offset):
        one, u = case.only(slice(i, i + 1)), torch.zeros_like(delta)
        function = lambda u: missing(one, u.unsqueeze(0), delta, leakage).squeeze(0)  # noqa: B023, E731
        for _ in range(steps):
            u = u - torch.linalg.solve(jacrev(function)(u), function(u))
        found.append(u)
    return torch.stack(found)


@pytest.mark.slow
@networks
@pytest.mark.parametrize("controller", CONTROLLERS, ids=lambda pi: f"{pi.leak}-{pi.k_p}")
def test_the_steady_state_is_where_the_dynamics_come_to_rest(name: str, controller: PIController) -> None:
    case = make(name)
    offset = -0.3 * case.loss_grad
    solved = TIGHT.settle(case.forward, offset, controller)
    simulated = Euler(steps=2000, dt=0.03).settle(case.forward, offset, controller)
    assert solved.converged.all()
    assert simulated.converged.all()
    assert close(simulated.control, solved.control, 1e-8)
    for mine, theirs in zip(states(simulated.response), states(solved.response)):
        for a, b in zip(mine[1:], theirs[1:]):
            assert close(a, b, 1e-7)


@networks
@methods
@pytest.mark.parametrize("controller", CONTROLLERS[1::2], ids=lambda pi: pi.leak)
def test_the_reported_residual_is_that_of_a_plain_forward_pass(
    name: str, method: str, controller: PIController
) -> None:
    case = make(name, "random")
    offset = -case.loss_grad
    settled = METHODS[method].settle(case.forward, offset, controller)
    alpha = 0.1 / 1.2 if controller.leak == "integral" else 0.1  # α / (1 + α k_p), or α
    if method != "Euler":  # of a network still moving, u does not tell the state
        residual = missing(case, settled.control, offset, alpha).norm(dim=1) / offset.norm(dim=1)
        assert torch.allclose(settled.residual, residual, rtol=1e-9, atol=1e-12)
    if method == "SS":
        assert torch.equal(settled.converged, settled.residual <= 1e-5)


@networks
@pytest.mark.parametrize("feedback", ["weight_product", "random"])
@pytest.mark.parametrize("batch", [1, 5])
def test_the_linearized_control_is_one_dense_newton_step(name: str, feedback: str, batch: int) -> None:
    case = make(name, feedback, batch)
    offset = -0.3 * case.loss_grad
    settled = Linearized().settle(case.forward, offset, PIController(0.1))
    assert settled.converged.all()
    assert close(settled.control, newton(case, offset, 0.1, 1), 1e-10)


@pytest.mark.parametrize("feedback", ["weight_product", "random", "learned"])
@pytest.mark.parametrize("hidden", ["linear", "tanh", "softplus"])
@pytest.mark.parametrize("sizes", [(8, 120, 100), (8, 30, 20, 100), (8, 40, 40, 7)], ids=["wide", "narrow", "dense"])
def test_wide_outputs_settle_as_dense_solves_have_it(feedback: str, hidden: str, sizes: tuple[int, ...]) -> None:
    case = make((sizes, hidden, "squared"), "random" if feedback == "random" else "weight_product", batch=4)
    if feedback == "learned":  # Q_L no longer the identity
        generator = torch.Generator().manual_seed(0)
        stacked = case.forward.stacked_feedback
        noise = torch.randn(stacked.shape, generator=generator, dtype=torch.float64)
        case = case.with_feedback(stacked + 0.01 * noise)
    assert case.forward.widths[-1] > DENSE_UP_TO or OWN_UP_TO < case.forward.widths[-1] == 7
    assert case.forward.reducible == (sizes[-2] < sizes[-1] and feedback != "learned")
    offset = -0.3 * case.loss_grad
    linear = Linearized().settle(case.forward, offset, PIController(0.1))
    steady = TIGHT.settle(case.forward, offset, PIController(0.1))
    assert linear.converged.all()
    assert close(linear.control, newton(case, offset, 0.1, 1), 1e-9)
    assert steady.converged.all()
    assert close(steady.control, newton(case, offset, 0.1, 8), 1e-8)
    again = case.forward.respond(case.forward.apical(steady.control))
    for mine, theirs in zip(states(steady.response), states(again)):
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(mine, theirs))


@pytest.mark.parametrize("output", ["linear", "tanh"])
def test_the_cheap_inverse_is_each_samples_own_to_first_order_in_the_slopes(output: str) -> None:
    case = make(((8, 40, 40, 7), "tanh", "squared"), batch=6)
    if output == "tanh":
        case = replace(case, layers=case.layers._replace(nonlinearities=[case.layers.nonlinearities[0]] * 3))
    errors = []
    for spread in (1e-2, 1e-3):
        near = replace(case, x=case.x.mean(0) + spread * (case.x - case.x.mean(0)))
        inverse = cheap_inverse(near.forward, 0.1)
        assert isinstance(inverse, DenseInverse)
        own = own_inverse(near.forward, 0.1).matrix
        errors.append(float((inverse.matrix - own).norm() / own.norm()))
    assert errors[1] < 0.02 * errors[0] < 2e-5  # samples a tenth as different: an error of a hundredth


@pytest.mark.parametrize(
    "inverse",
    [lambda: DenseInverse(torch.eye(6, dtype=torch.float64).unsqueeze(0)), lambda: StoredSteps(lambda y: y)],
    ids=["dense", "stored steps"],
)
def test_broyden_solves_linear_systems_in_two_steps_a_dimension_each_sample_by_itself(inverse) -> None:
    g = torch.Generator().manual_seed(0)
    matrices = torch.eye(6, dtype=torch.float64) + 0.55 * torch.randn(4, 6, 6, generator=g, dtype=torch.float64)
    right = torch.randn(4, 6, generator=g, dtype=torch.float64)
    assert (torch.linalg.eigvals(torch.eye(6) - matrices).abs().amax(1) > 1).all()  # plain iteration would diverge

    def solve(rows: slice) -> Root:
        function = lambda u: (right[rows] - (matrices[rows] @ u.unsqueeze(2)).squeeze(2), None)  # noqa: E731
        # From close by: a sample whose residual grows tenfold on the way counts as astray.
        start = torch.linalg.solve(matrices[rows], right[rows]) + 0.1
        return find_root(function, start, inverse(), right[rows], 1e-6, 14)

    together = solve(slice(0, 4))
    assert together.converged.all()
    exact = torch.linalg.solve(matrices, right)
    assert torch.allclose(together.u, exact, atol=1e-5)
    for i in range(4):
        alone = solve(slice(i, i + 1))
        assert torch.allclose(alone.u, together.u[i : i + 1], atol=1e-8)


DEEP = ((8, *[12] * 6, 4), "tanh", "squared")


def saturated(hidden: str, feedback: str = "random") -> Case:
    case = make(((6, 5, 4, 3), hidden, "squared"), feedback, batch=16)
    return replace(case, x=30 * case.x)


def dead() -> Case:
    """Most relu units of the first layer silent, in some samples all of them."""
    case = make("relu", batch=16)
    first, *others = case.layers.biases
    return replace(case, layers=case.layers._replace(biases=[first - 2, *others]))


HOSTILE = {
    "random feedback, clamped target": (lambda: make("tanh", "random", 32), 1.0),
    "random feedback, clamped target, relu": (lambda: make("relu", "random", 32), 1.0),
    "clamped target, many layers": (lambda: make(DEEP, batch=32), 1.0),
    "target ten times out": (lambda: make("tanh_ce", "random", 32), 10.0),
    "target hundred times out": (lambda: make("leaky_relu", "random", 32), 100.0),
    "saturated tanh": (lambda: saturated("tanh"), 1.0),
    "saturated sigmoid": (lambda: saturated("sigmoid"), 1.0),
    "saturated softplus": (lambda: saturated("softplus", "weight_product"), 1.0),
    "dead relu": (dead, 1.0),
    "one sample": (lambda: make("tanh", "random", 1), 1.0),
    "one output": (lambda: make("one_output", "weight_product", 32), 10.0),
    "one layer": (lambda: make("one_layer", "unruly", 32), 10.0),
    "wide output, clamped": (lambda: make(((8, 40, 100), "tanh", "squared"), "random", 8), 1.0),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_the_steady_state_is_found_in_hostile_networks(hostile: str, dtype: torch.dtype) -> None:
    build, stepsize = HOSTILE[hostile]
    case = build().to(dtype)
    offset = -stepsize * case.loss_grad
    settled = SteadyState().settle(case.forward, offset, PIController(0.01))
    assert settled.converged.all(), settled.residual.max()
    exact = case.to(torch.float64)
    true = missing(exact, settled.control.double(), offset.double(), 0.01).norm(dim=1) / offset.double().norm(dim=1)
    assert (true < (1.1e-5 if dtype == torch.float64 else 2e-5)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "net", [("tanh", "unruly"), ("one_output", "random"), (DEEP, "random")], ids=["unruly", "one output", "deep"]
)
def test_the_steady_state_is_found_wherever_the_dynamics_settle(net: tuple) -> None:
    case = make(*net, batch=32)
    offset, controller = -case.loss_grad, PIController(0.01)
    simulated = Euler(steps=4000, instant_system=True).settle(case.forward, offset, controller)
    settled = SteadyState().settle(case.forward, offset, controller)
    assert settled.converged[simulated.residual < 1e-6].all()


def test_a_target_out_of_reach_is_reported_not_hidden() -> None:
    case = make("tanh")  # without Q_L the output moves by no more than Σ_j |W_j| · 2
    case = case.with_feedback(torch.cat([*case.forward.feedback[:-1], torch.zeros(3, 3, dtype=torch.float64)]))
    offset = -0.01 * case.loss_grad
    offset[1] = 100.0
    reach = 2 * case.forward.weights[-1].abs().sum(1).norm()
    settled = SteadyState().settle(case.forward, offset, PIController(0.0))
    assert not settled.converged[1]
    assert settled.residual[1] >= 1 - reach / offset[1].norm()
    others = torch.arange(5) != 1
    residual = missing(case, settled.control, offset, 0.0).norm(dim=1) / offset.norm(dim=1)
    assert torch.equal(settled.converged[others], residual[others] <= 1e-5)
    assert settled.counted(False).all()


@pytest.mark.parametrize("settling", [Linearized(), SteadyState()])
@pytest.mark.parametrize("width", [3, 100])
def test_without_feedback_and_leakage_nothing_settles_and_nothing_is_learned(settling: Settling, width: int) -> None:
    case = make(((6, 5, width), "tanh", "squared"))
    case = case.with_feedback(torch.zeros(5 + width, width, dtype=torch.float64))
    update = DFC(settling, PIController(0.0)).teach(case.forward, case.loss_grad)
    assert update.settled is not None
    assert not update.settled.converged.any()
    assert not flat(update).any()


def test_too_short_a_simulation_is_reported_not_hidden() -> None:
    case = make("tanh")
    settled = Euler(steps=10).settle(case.forward, -case.loss_grad, PIController(0.01))
    assert not settled.converged.any()


# Samples that diverge


def explosive(diverging: list[int], hidden: str = "relu") -> Case:
    """W_2 > 0 and Q_1 = −30 W_2ᵀ: where the output is to rise the relu units die, where it is to fall they explode."""
    case = make(((6, 5, 3), hidden, "squared"), batch=5)
    first, up = case.layers.weights[0], case.layers.weights[1].abs()
    feedback = [-30 * up.T, torch.eye(3, dtype=torch.float64)]
    case = replace(case, layers=case.layers._replace(weights=[first, up]), feedback=feedback)
    sign = torch.ones(5, 1, dtype=torch.float64)
    sign[diverging] = -1
    return replace(case, y=case.output() + sign * (0.1 + case.y.abs()))


EXPLOSION = Euler(steps=400, dt=0.5, instant_system=True)


@pytest.mark.slow
@pytest.mark.parametrize("diverging", [[], [0], [1, 3], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("integrate", [True, False])
@pytest.mark.parametrize("plasticity", ["rate_difference", "voltage_difference", "derivative"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_diverged_samples_give_no_update_and_leave_the_others_theirs(
    diverging: list[int], integrate: bool, plasticity: str, dtype: torch.dtype
) -> None:
    case = explosive(diverging).to(dtype)
    rule = DFC(EXPLOSION, PIController(0.1), integrate=integrate, plasticity=plasticity)
    update = rule.teach(case.forward, case.loss_grad)
    assert update.settled is not None
    assert (~update.settled.counted(False)).nonzero().flatten().tolist() == diverging
    assert not update.settled.converged[diverging].any()
    assert torch.isfinite(flat(update)).all()
    total = torch.zeros_like(flat(update))
    for i in set(range(5)) - set(diverging):
        alone = case.only(slice(i, i + 1))
        mine = flat(rule.teach(alone.forward, alone.loss_grad))
        assert mine.any()
        total += mine
    assert close(flat(update), total / 5, 1e-10 if dtype == torch.float64 else 1e-4)


SELECTIVE = {
    "SS": (SteadyState(rtol=1e-9, max_iterations=1), False),
    "Euler": (Euler(steps=110), False),
    "Euler, integrated": (Euler(steps=110), True),
}


@pytest.mark.parametrize("selective", SELECTIVE)
@pytest.mark.parametrize("unconverged", ["drop", "keep"])
def test_unconverged_samples_are_dropped_only_when_asked(selective: str, unconverged: str) -> None:
    settling, integrate = SELECTIVE[selective]
    case = make("tanh", batch=8)
    # Targets from near to far, so that the far ones have not settled when the time is over.
    factors = torch.logspace(-4, 1, 8, dtype=torch.float64).unsqueeze(1)
    case = replace(case, y=case.output() + factors * case.y)
    rule = DFC(settling, PIController(0.01), integrate=integrate, unconverged=unconverged)
    update = rule.teach(case.forward, case.loss_grad)
    assert update.settled is not None
    converged = update.settled.converged
    assert 2 <= converged.sum() <= 6
    kept = case.only(converged) if unconverged == "drop" else case
    expected = flat(replace(rule, unconverged="keep").teach(kept.forward, kept.loss_grad))
    assert close(flat(update), expected * len(kept.x) / 8, 1e-9)


@methods
def test_a_sample_whose_target_is_met_from_the_start_stays_where_it_is(method: str) -> None:
    case = make("tanh")
    grad = case.loss_grad.clone()
    grad[2] = 0
    update = DFC(METHODS[method], PIController(0.01)).teach(case.forward, grad)
    assert update.settled is not None
    assert not update.settled.control[2].any()
    assert torch.isfinite(flat(update)).all()
    assert method == "Euler" or update.settled.converged[2]
