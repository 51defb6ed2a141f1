"""The metrics equal the golden theory arrays, and their class forms add up.

Left out of the golden arrays, and why: ``J_linear``, ``bp_*`` and ``gnt_*_ss0_*`` are in ``test_golden.py``;
``J_nonlinear`` (by the rates instead of the voltages) is used by nothing here; ``gnt_*_ss1_*`` pairs the minimum-norm
update with another update's rates. ``A0_A_PI`` has k_p = 0 and so tells nothing of k_p > 0: that is tested against
differentiated dynamics.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cases.chains import close, degrees, make
from cases.golden import CASES, Golden, golden, relative_error
from torch import Tensor

from dfc_lightning import Backprop, MinimumNorm, PIController
from dfc_lightning.metrics import (
    ConditionOne,
    ConditionTwo,
    ControlEffort,
    ControlRatio,
    FeedbackAngle,
    StabilityEigenvalue,
    UpdateAngle,
    condition_one,
    condition_two,
    control_effort,
    control_matrix,
    control_ratio,
    feedback_angle,
    gauss_newton_update,
    instantaneous_matrix,
    stability_eigenvalue,
    update_angle,
)
from dfc_lightning.rules import Update

TOLERANCE = 1e-8
DAMPINGS = ("0", "0.1")
each_case = pytest.mark.parametrize("name", CASES.values())
each_damping = pytest.mark.parametrize("damping", DAMPINGS)


def jacobian(case: Any) -> Tensor:
    return torch.cat(case.forward.jacobians(), dim=2)


def ssa(case: Golden) -> Update:
    return case.rule("ssa").teach(case.forward, case.loss_grad)


def minimum_norm(case: Golden, damping: float, plasticity: str) -> Update:
    """The reference's: voltages up the gradient, by a step of 1 on the mean loss."""
    rule = MinimumNorm(damping, 1 / case.batch_size, plasticity, controlled_input=False)
    update = rule.teach(case.forward, -case.loss_grad)
    return Update([[-t for t in taught] for taught in update.gradients])


# The golden arrays


@each_case
@each_damping
def test_gauss_newton_equals_the_reference(name: str, damping: str) -> None:
    case = golden(name)
    update = gauss_newton_update(case.forward, case.loss_grad, float(damping))
    for ours, parameter in ((update.weights, "gW"), (update.biases, "gb")):
        for mine, theirs in zip(ours, case.layers(f"gn_damp{damping}_{parameter}", "th")):
            assert relative_error(mine, theirs * case.batch_size) < TOLERANCE


REFERENCES = {
    "angle_ssa_vs_bp": "bp",
    **{f"angle_damp{d}_ssa_vs_{kind}": angle for d in DAMPINGS for kind, angle in [("gnt", "gnt"), ("gntnl", "gnt")]},
    **{f"angle_damp{d}_ssa_vs_gn": "gn" for d in DAMPINGS},
}


@each_case
@pytest.mark.parametrize(("key", "angle"), REFERENCES.items())
def test_update_angles_equal_the_reference(name: str, key: str, angle: str) -> None:
    case, update = golden(name), ssa(golden(name))
    damping = float(key.split("_")[1].removeprefix("damp")) if "damp" in key else 0.0
    if key.endswith("gnt"):
        reference = minimum_norm(case, damping, "voltage_difference")
    elif key.endswith("gntnl"):
        reference = minimum_norm(case, damping, "rate_difference")
    elif key.endswith("gn"):
        reference = gauss_newton_update(case.forward, case.loss_grad, damping)
    else:
        reference = Backprop().teach(case.forward, case.loss_grad)
    for parameter, ours, theirs in (
        ("weight", update.weights, reference.weights),
        ("bias", update.biases, reference.biases),
    ):
        angles = update_angle(ours, theirs)
        for layer in range(1, case.depth + 1):
            expected = case[f"th__{key}/layer {layer}/{parameter}_{angle}_angle"]
            assert relative_error(angles[f"layer_{layer}"], expected) < TOLERANCE
    total = f"th__{key}/total_alignment/{angle}_angle"
    if total in case.arrays:
        angles = update_angle(pairs(update), pairs(reference))
        assert relative_error(angles["total"], case[total]) < TOLERANCE


def pairs(update: Update) -> list[tuple[Tensor, Tensor]]:
    return list(zip(update.weights, update.biases))


@each_case
def test_condition_two_equals_the_reference(name: str) -> None:
    case = golden(name)
    ours = condition_two(case.forward.stacked_feedback, jacobian(case))
    assert relative_error(ours, case["th__condition_two"]) < 1e-8


@each_case
def test_feedback_angles_equal_the_reference(name: str) -> None:
    case = golden(name)
    feedback, j = case.forward.stacked_feedback, jacobian(case)
    theirs = case["th__angle_Q_vs_JT/feedback_training/jacobian_transpose_angle"]
    assert relative_error(feedback_angle(feedback, j, "transpose"), theirs) < TOLERANCE
    for damping in DAMPINGS:
        theirs = case[f"th__angle_damp{damping}_Q_vs_Jpinv/feedback_training/jacobian_pinv_angle"]
        assert relative_error(feedback_angle(feedback, j, damping=float(damping)), theirs) < TOLERANCE


@each_case
def test_stability_matrices_and_eigenvalues_equal_the_reference(name: str) -> None:
    case = golden(name)
    settings = case.modes["ssa"]
    controller = PIController(settings["alpha_di"], settings["k_p"], leak="control")
    tau = settings["time_constant_ratio"]
    driven = control_matrix(case.forward, controller, tau, "driven")
    for key, ours in {
        "A_tildeI": control_matrix(case.forward, controller, tau),
        "A_I": driven,
        "A_PI": driven,
        "A_instI": instantaneous_matrix(case.forward.stacked_feedback, jacobian(case), controller.alpha),
    }.items():
        assert relative_error(ours[0], case[f"th__A0_{key}"]) < TOLERANCE
        assert relative_error(stability_eigenvalue(ours, "none"), case[f"th__maxeig_{key}"]) < TOLERANCE


# What the golden arrays do not reach


@pytest.mark.parametrize("leak", ["control", "integral"])
@pytest.mark.parametrize("k_p", [0.0, 1.5])
def test_the_control_matrix_is_the_derivative_of_the_dynamics(leak: str, k_p: float) -> None:
    case, tau = make("tanh", "random", batch=2), 0.3
    controller = PIController(0.2, k_p, leak=leak)
    forward, q = case.forward, case.forward.stacked_feedback
    offset = torch.zeros(3, dtype=torch.float64)

    def velocity(z: Tensor, sample: int) -> Tensor:
        """dz/dt of z = (Δv, u_int), written down from Eq. (1) and (4)."""
        deviations, integral = z.split([12, 3])
        dv = deviations.split(forward.widths)
        rates = [d[sample] * v for d, v in zip(case.forward.slopes, dv)]
        error = offset - rates[-1]
        u = integral + k_p * error
        basal = [r @ w.T for r, w in zip(rates[:-1], forward.weights[1:])]
        drive = torch.cat([torch.zeros_like(rates[0]), *basal])
        return torch.cat([(drive - deviations + q @ u) / tau, error - 0.2 * (u if leak == "control" else integral)])

    rest, identity = torch.zeros(15, dtype=torch.float64), torch.eye(15, dtype=torch.float64)
    ours = control_matrix(forward, controller, tau)
    for sample in range(2):
        a = torch.autograd.functional.jacobian(partial(velocity, sample=sample), rest)
        change = identity.clone()  # u = u_int + k_p e, e = −D_L Δv_L
        change[12:, 9:12] = -k_p * torch.diag(case.forward.slopes[-1][sample])
        assert close(ours[sample] @ change, change @ a, 1e-12)
    other = control_matrix(forward, controller, tau, "driven")
    assert (stability_eigenvalue(ours, "none") - stability_eigenvalue(other, "none")).abs().amax() < 1e-9


def test_angles_of_known_tensors() -> None:
    a = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    b = torch.zeros_like(a)
    b[0, :2] = torch.stack([-a[0, 1], a[0, 0]])
    angles = update_angle([a, a, a], [a, b, -a])
    assert angles["layer_1"] == 0 and angles["layer_3"] == 180
    assert abs(angles["layer_2"] - 90) < 1e-5
    assert update_angle([a], [torch.zeros_like(a)])["total"].isnan()
    with pytest.raises(ValueError, match="one entry a layer"):
        update_angle([a], [a, a])


def test_conditions_hold_where_they_are_made_to_hold() -> None:
    case = make("tanh", "mixed", batch=1)
    j = jacobian(case)
    assert abs(condition_two(case.forward.stacked_feedback, j) - 1) < 1e-9
    assert feedback_angle(j[0].T, j, "transpose") < 1e-5
    assert feedback_angle(torch.linalg.pinv(j[0]), j) < 1e-5
    equal = [r / r.norm(dim=1, keepdim=True) for r in case.forward.presynaptic]
    assert condition_one(equal) < 1e-12 < condition_one(case.forward.presynaptic)


def idle(weight: Tensor, jacobian: Tensor, r: Tensor) -> Tensor:
    """The share of a weight change that moves the output of a sample by nothing, J_i ΔW_i r = 0."""
    moving = torch.linalg.pinv(jacobian) @ jacobian @ weight @ torch.outer(r, r) / r.square().sum()
    return (weight - moving).norm() / weight.norm()


def test_a_gauss_newton_step_moves_the_output_by_the_target_and_has_no_idle_part() -> None:
    case = make("tanh", batch=1)
    update = gauss_newton_update(case.forward, case.loss_grad)
    step = 1e-6
    moved = [
        [p - step * g for p, g in zip(parameters, gradients)]
        for parameters, gradients in ((case.forward.weights, update.weights), (case.forward.biases, update.biases))
    ]
    change = (case.output(parameters=moved) - case.output()) / step
    assert degrees(change, -case.loss_grad) < 1e-3 and abs(change.norm() / case.loss_grad.norm() - 1) < 1e-4
    jacobians = case.forward.jacobians()
    for weight, j, r in zip(update.weights, jacobians, case.forward.presynaptic):
        assert idle(weight, j[0], r[0]) < 1e-10
        assert idle(torch.randn_like(weight), j[0], r[0]) > 0.1


def test_what_has_blown_up_is_not_a_number() -> None:
    matrix = torch.eye(2).repeat(2, 1, 1)
    matrix[1, 0, 1] = torch.inf
    assert stability_eigenvalue(matrix, "none").isnan().tolist() == [False, True]


# Class forms


def batches() -> list[Any]:
    """Batches of unequal size from one network."""
    whole = make("tanh", "random", batch=7)
    return [whole.only(slice(0, 2)), whole.only(slice(2, 7)), whole]


CONTROLLER = PIController(0.1, 1.0)
CLASSES = {
    "condition_one": (ConditionOne, condition_one, lambda c: (c.forward.presynaptic,)),
    "condition_two": (ConditionTwo, condition_two, lambda c: (c.forward.stacked_feedback, jacobian(c))),
    "transpose": (
        lambda: FeedbackAngle("transpose"),
        lambda q, j: feedback_angle(q, j, "transpose"),
        lambda c: (c.forward.stacked_feedback, jacobian(c)),
    ),
    "pseudoinverse": (
        lambda: FeedbackAngle(damping=0.1),
        lambda q, j: feedback_angle(q, j, damping=0.1),
        lambda c: (c.forward.stacked_feedback, jacobian(c)),
    ),
    "stability": (
        StabilityEigenvalue,
        stability_eigenvalue,
        lambda c: (control_matrix(c.forward, CONTROLLER, 0.2),),
    ),
    "control_effort": (lambda: ControlEffort(3), control_effort, lambda c: (c.forward.apical(c.loss_grad),)),
    "control_ratio": (
        lambda: ControlRatio(3),
        control_ratio,
        lambda c: (c.forward.apical(c.loss_grad), c.forward.v),
    ),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_updates_add_up_to_the_function_of_all_samples(kind: str) -> None:
    metric, function, arguments = CLASSES[kind]
    metric, (first, second, whole) = metric(), batches()
    for part in (first, second):
        same(metric(*arguments(part)), function(*arguments(part)))  # forward returns the batch's own value
    same(metric.compute(), function(*arguments(whole)))
    metric.reset()
    metric.update(*arguments(first))
    same(metric.compute(), function(*arguments(first)))


def same(ours: Any, theirs: Any) -> None:
    ours, theirs = (v if isinstance(v, dict) else {"": v} for v in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == torch.float64 and abs(ours[key] - theirs[key]) <= 1e-10 * abs(theirs[key])


def test_update_angle_adds_up_to_that_of_one_long_update() -> None:
    metric, parts = UpdateAngle(layers=2), [torch.randn(2, 2, 3, 4).unbind() for _ in range(3)]
    for a, b in parts:
        metric.update(list(a), list(b))
    long = [torch.cat([part[k] for part in parts], dim=1) for k in range(2)]
    same(metric.compute(), update_angle(list(long[0]), list(long[1])))


@pytest.mark.parametrize("kind", [*CLASSES, "angle"])
def test_states_are_sums_over_ranks_and_plot_draws(kind: str) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    metric, arguments = (UpdateAngle(3), None) if kind == "angle" else (CLASSES[kind][0](), CLASSES[kind][2])
    assert metric._reductions and all(r.__name__ == "dim_zero_sum" for r in metric._reductions.values())
    for case in batches():
        weights = case.forward.weights
        metric.update(*(arguments(case) if arguments else (weights, [w + 1 for w in weights])))
    for value in (None, [metric.compute(), metric.compute()]):
        figure, axes = metric.plot(value)
        assert figure is not None and axes.get_lines()
        pyplot.close(figure)
