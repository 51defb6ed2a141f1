"""The figures show what the data say, and ``dfc plot`` draws them of any run."""

from __future__ import annotations

import csv
import sys

import pytest
import torch
from cases.chains import close, make

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex

from dfc_lightning import ControlError, PIController
from dfc_lightning.commands import plot
from dfc_lightning.metrics import condition_two, instantaneous_matrix, stability_eigenvalue
from dfc_lightning.plots import (
    Run,
    Series,
    dashboard,
    feedback_plane,
    figure_1d,
    figure_2,
    figure_3,
    read_run,
    record,
)
from dfc_lightning.plots.canvas import BLUE, GREEN, RED
from dfc_lightning.plots.examples import controlled_student, small_jacobian
from dfc_lightning.plots.figure_2 import random_feedback
from dfc_lightning.plots.figure_3 import PANELS
from dfc_lightning.settling import Euler
from dfc_lightning.settling.time_step import TimeStep

ROWS = [
    {"step": 4, "epoch": 0, "lr": 0.1},
    {"step": 9, "epoch": 0, "val/loss": 8.0},
    {"step": 9, "epoch": 0, "train/loss": 9.0, "train/error": 50.0},
    {"step": 3, "feedback/step": 3, "feedback/norm": 1.5},
    {"step": 10, "alignment/condition_2": 0.9, "alignment/minimum_norm/total": 12.0},
    {"step": 10, "settling/residual": 1e-5, "settling/converged": 1.0},
    {"step": 19, "epoch": 1, "val/loss": 4.0},
    {"step": 19, "epoch": 1, "train/loss": 5.0, "train/error": 25.0},
    {"step": 20, "alignment/condition_2": 0.8, "alignment/minimum_norm/total": 14.0},
    {"step": 20, "epoch": 2, "test/loss": 4.5},
]


def write(folder, rows=ROWS):
    """A metrics.csv as CSVLogger writes it."""
    folder.mkdir(parents=True)
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def drawn(axis):
    """The values of each line by its label."""
    return {line.get_label(): list(line.get_ydata()) for line in axis.lines}


def titles(figure):
    return [axis.get_title(loc="left") for axis in figure.axes]


# Runs


def test_a_run_is_read_with_its_epochs(tmp_path):
    run = read_run(write(tmp_path / "toy" / "dfc_ss" / "version_0"))
    assert (run.name, run.steps_per_epoch) == ("dfc_ss", 10)
    assert run.by_epoch("val/loss") == Series([1.0, 2.0], [8.0, 4.0])
    assert run.by_epoch("alignment/condition_2") == Series([1.0, 2.0], [0.9, 0.8])
    assert run.series["feedback/norm"] == Series([3.0], [1.5])
    assert "step" not in run.series and "epoch" not in run.series and "feedback/step" not in run.series


def test_of_several_versions_the_newest_is_read(tmp_path):
    for number in (2, 10, 9):
        write(tmp_path / "dfc" / f"version_{number}", [{"step": 0, "val/loss": float(number)}])
    (tmp_path / "dfc" / "version_11").mkdir()  # begun, nothing logged
    assert read_run(tmp_path / "dfc").series["val/loss"].values == [10.0]
    assert read_run(tmp_path / "dfc" / "version_2").series["val/loss"].values == [2.0]


def test_what_lightning_writes_is_read(tmp_path):
    from cases.fits import BATCHES, Innocent, loader, quiet, strategy
    from lightning.pytorch.loggers import CSVLogger

    from dfc_lightning.callbacks import AlignmentMonitor

    callbacks = [AlignmentMonitor(BATCHES, tau_ratio=0.2)]
    trainer = quiet(strategy(), logger=CSVLogger(tmp_path, "here"), callbacks=callbacks, log_every_n_steps=1)
    trainer.fit(Innocent(), loader(), loader())
    run = read_run(tmp_path / "here")
    epochs = [float(epoch) for epoch in range(1, trainer.max_epochs + 1)]
    assert run.by_epoch("alignment/stability").steps == epochs
    assert len(run.series["settling/residual"].steps) == len(epochs) * BATCHES
    assert run.series["feedback/norm"].steps == [
        float(step) for step in range(1, len(run.series["feedback/norm"][0]) + 1)
    ]


# Figure 1D


def recorded(name="tanh", steps=400, sample=1):
    case = make(name, feedback="pseudoinverse").only(slice(sample, sample + 1))
    controller, step = PIController(alpha=0.01, k_p=1.0), TimeStep(dt=0.05, tau_ratio=0.2)
    offset = -0.1 * case.loss_grad
    return case, offset, controller, record(case.forward, offset, controller, step, steps)


def test_the_recording_begins_feedforward_and_ends_where_the_simulation_does():
    case, offset, controller, recording = recorded()
    settled = Euler(steps=400, dt=0.05, tau_ratio=0.2).settle(case.forward, offset, controller)
    assert torch.equal(recording.output[0], case.forward.output[0]) and not recording.control[0].any()
    assert close(recording.control[-1], settled.control[0], 1e-12)
    assert close(recording.output[-1], (case.forward.output + settled.response.rates[-1])[0], 1e-12)
    assert close(recording.target, (case.forward.output + offset)[0], 1e-12)
    assert recording.time.shape == (401,) and float(recording.time[-1]) == pytest.approx(20.0)


def test_the_recording_keeps_every_state_of_every_compartment():
    case, _, _, recording = recorded()
    assert len({float(value) for value in recording.control[:, 0]}) == 401  # no state overwritten by a later one
    for layer, (v, basal, apical) in enumerate(zip(recording.somatic, recording.basal, recording.apical)):
        assert v.shape == basal.shape == apical.shape == (401, case.widths[layer])
        moved = v[:-1] + 0.05 / 0.2 * (apical[1:] + basal[1:] - v[:-1])  # Eq. (1)
        assert close(v[1:], moved, 1e-12)
        assert close(apical, recording.control @ case.feedback[layer].T, 1e-12)
    assert not recording.basal[0].any() and recording.basal[1].abs().max() > 1e-4


def test_figure_1d_draws_the_recording():
    _, _, _, recording = recorded()
    figure = figure_1d(recording, layer=2)
    output, control, *compartments = figure.axes
    assert titles(figure) == [
        "output $r_L$, target dashed",
        "control $u$",
        "apical $v_2^{fb}$",
        "basal $v_2^{ff}$, change",
        "somatic $v_2$, change",
    ]
    assert [axis.get_xlabel() for axis in figure.axes] == [r"time, $\tau_u$"] * 5
    curves = [line.get_ydata() for line in output.lines]
    assert all(torch.equal(torch.as_tensor(c), r) for c, r in zip(curves[:3], recording.output.T))
    assert [float(c[0]) for c in curves[3:]] == pytest.approx(recording.target.tolist())
    for axis, values in zip(
        [control, *compartments],
        [recording.control, *(x[1] for x in (recording.apical, recording.basal, recording.somatic))],
    ):
        assert len(axis.lines) == values.shape[1]
        assert all(torch.equal(torch.as_tensor(line.get_ydata()), value) for line, value in zip(axis.lines, values.T))
    largest = max(float(x[1].max()) for x in (recording.apical, recording.basal, recording.somatic))
    assert all(axis.get_ylim()[1] >= largest for axis in compartments)


def test_the_example_of_figure_1d_reaches_its_target():
    recording = controlled_student()
    missed = (recording.target - recording.output).abs()
    assert missed[-1] < 0.02 * missed[0]
    assert torch.allclose(controlled_student().output, recording.output)


def test_figure_1d_refuses_what_it_cannot_draw():
    _, _, _, recording = recorded(steps=2)
    with pytest.raises(ValueError, match="layer=4.*1 to 3"):
        figure_1d(recording, layer=4)
    case = make("tanh")
    with pytest.raises(ValueError, match="forward=5"):
        record(case.forward, -case.loss_grad, PIController(), TimeStep(dt=0.05, tau_ratio=0.2), 2)


# Figure 2


def test_random_feedback_satisfies_conditions_two_and_three():
    jacobian = make("tanh").jacobian[0]
    found = random_feedback(jacobian, 50, alpha=0.1, generator=torch.Generator().manual_seed(0))
    assert found.shape == (50, *jacobian.T.shape) and len({float(q.sum()) for q in found}) == 50
    for q in found:
        assert float(condition_two(q, jacobian[None])) == pytest.approx(1.0, abs=1e-9)
    eigenvalues = torch.stack([stability_eigenvalue(instantaneous_matrix(q, jacobian[None], 0.1)) for q in found])
    assert eigenvalues.max() < 0
    assert stability_eigenvalue(instantaneous_matrix(-found[0], jacobian[None], 0.0)) > 0  # the test can tell


def test_the_plane_is_of_the_largest_variance_and_ridge_leads_from_pseudoinverse_to_transpose():
    plane = feedback_plane(small_jacobian(), count=300)
    assert plane.random.shape == (300, 2) and plane.ridge.shape == (100, 2)
    every = torch.cat([plane.random, plane.ridge, plane.pseudoinverse[None], plane.transpose[None]])
    assert close(every.mean(0) + 1, torch.ones(2, dtype=every.dtype), 1e-9)
    spread = every.var(0)
    assert spread[0] > spread[1] > 0
    assert plane.explained[0] / plane.explained[1] == pytest.approx(float(spread[0] / spread[1]))
    between = (plane.pseudoinverse - plane.transpose).norm()
    assert (plane.ridge[0] - plane.pseudoinverse).norm() < 0.01 * between
    assert (plane.ridge[-1] - plane.transpose).norm() < 0.01 * between
    assert plane.damping[0] < plane.damping[-1]


def test_figure_2_draws_the_plane():
    plane = feedback_plane(small_jacobian(), count=40)
    figure = figure_2(plane)
    random, ridge, pseudoinverse, transpose = figure.axes[0].collections
    for points, expected in ((random, plane.random), (ridge, plane.ridge)):
        assert close(torch.as_tensor(points.get_offsets().data), expected, 1e-12)
    assert pseudoinverse.get_offsets()[0].tolist() == plane.pseudoinverse.tolist()
    assert transpose.get_offsets()[0].tolist() == plane.transpose.tolist()
    assert close(torch.as_tensor(ridge.get_array().data), plane.damping.log10(), 1e-12)
    assert f"({plane.explained[1]:.0%} of variance)" in figure.axes[0].get_ylabel()
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["$Q$: Conditions 2 and 3 hold", r"$J^T(JJ^T + \gamma I)^{-1}$", r"$J^\dagger$", "$J^T$"]


def test_condition_three_out_of_reach_is_an_error():
    with pytest.raises(ControlError, match="jacobian=.*Condition 3"):
        random_feedback(torch.eye(3).double(), 1, alpha=-100.0, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="jacobian=.*one sample"):
        feedback_plane(torch.eye(3)[None])


# Figure 3


def run(name, **series):
    names = {"gn": "alignment/gauss_newton/total", "c2": "alignment/condition_2", "loss": "val/loss"}
    return Run(name, {names[key]: Series([10.0, 20.0], values) for key, values in series.items()}, 10.0)


def test_figure_3_draws_each_run_by_epochs():
    runs = [
        run("dfc_ss", gn=[10.0, 30.0], c2=[0.9, 0.95], loss=[3.0, 2.0]),
        run("dfc_ss_fixed", gn=[40.0, 50.0], c2=[0.8, 0.7], loss=[3.5, 2.5]),
        run("dfa", gn=[60.0, 62.0], loss=[4.0, 3.0]),
    ]
    figure = figure_3(runs, window=2)
    assert titles(figure) == list(PANELS.values()) and len(figure.axes) == 6
    assert [axis.get_xlabel() for axis in figure.axes] == [""] * 3 + ["epoch"] * 3
    gauss_newton, _, condition_2, ssa, stability, loss = figure.axes
    bold = {label: values for label, values in drawn(gauss_newton).items() if not label.startswith("_")}
    assert bold == {"DFC-SS": [20.0, 20.0], "DFC-SS (fixed)": [45.0, 45.0], "DFA": [61.0, 61.0]}
    faint = [list(line.get_ydata()) for line in gauss_newton.lines if line.get_label().startswith("_")]
    assert faint == [[10.0, 30.0], [40.0, 50.0], [60.0, 62.0]]
    assert all(list(line.get_xdata()) == [1.0, 2.0] for line in loss.lines) and len(loss.lines) == 6
    assert len(condition_2.lines) == 4 and not ssa.lines and not stability.lines
    looks = {line.get_label(): (to_hex(line.get_color()), line.get_linestyle()) for line in gauss_newton.lines}
    assert looks["DFC-SS"] == (GREEN, "-") and looks["DFC-SS (fixed)"] == (GREEN, "--") and looks["DFA"][0] == RED
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(bold)


def test_figure_3_needs_alignment():
    with pytest.raises(ControlError, match="RUN=plain: .*AlignmentMonitor"):
        figure_3([run("dfc", gn=[1.0, 1.0]), run("plain", loss=[1.0, 1.0])])


# Dashboard


def test_the_dashboard_draws_what_is_there_and_no_more(tmp_path):
    figure = dashboard([read_run(write(tmp_path / "dfc" / "version_0"))])
    assert titles(figure) == [
        "loss",
        "error, %",
        "settled samples, share",
        "residual of the steady state",
        "norm of the feedback weights",
        "angle of the update to that of …, °",
        "Conditions 1 (0 is ideal) and 2 (1 is)",
    ]
    loss, error, _, residual, norm, angle, conditions = figure.axes
    assert drawn(loss) == {"val/loss": [8.0, 4.0], "train/loss": [9.0, 5.0], "test/loss": [4.5]}
    assert drawn(error) == {"train/error": [50.0, 25.0]}
    assert drawn(angle) == {"minimum norm": [12.0, 14.0]}
    assert list(drawn(conditions).values()) == [[0.9, 0.8]]
    assert loss.get_yscale() == residual.get_yscale() == "log" and error.get_yscale() == "linear"
    assert (loss.get_xlabel(), norm.get_xlabel()) == ("epoch", "feedback learning step")
    assert list(loss.lines[0].get_xdata()) == [1.0, 2.0] and list(norm.lines[0].get_xdata()) == [3.0]
    assert loss.lines[2].get_marker() == "o"  # a line of one point would not be seen
    assert loss.get_legend() is not None and error.get_legend() is None


def test_a_dashboard_of_several_runs_has_a_colour_for_each():
    figure = dashboard([run("dfc", loss=[3.0, 2.0]), run("dfa", loss=[4.0, 3.0])])
    (loss,) = figure.axes
    assert drawn(loss) == {"dfc: val/loss": [3.0, 2.0], "dfa: val/loss": [4.0, 3.0]}
    assert [to_hex(line.get_color()) for line in loss.lines] == [BLUE, RED]


def test_a_dashboard_takes_folders_and_tells_versions_apart(tmp_path):
    for version in (0, 1):
        write(tmp_path / "dfc" / f"version_{version}")
    figure = dashboard([tmp_path / "dfc" / "version_0", str(tmp_path / "dfc" / "version_1")])
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert {label.split(":")[0] for label in labels} == {"dfc version_0", "dfc version_1"}
    assert len(dashboard(tmp_path / "dfc").axes) == len(figure.axes)


def test_the_newest_run_that_has_trained_is_drawn(tmp_path):
    write(tmp_path / "dfc" / "version_0")
    (tmp_path / "dfc" / "version_1").mkdir()
    (tmp_path / "dfc" / "version_1" / "metrics.csv").write_text("epoch,step,test/error,test/loss\n0,0,3.0,0.1\n")
    assert "val/loss" in read_run(tmp_path / "dfc").series


def test_axes_count_in_whole_epochs_and_write_numbers_out():
    figure = dashboard([run("dfc", loss=[60.0, 20.0])])
    (axes,) = figure.axes
    figure.canvas.draw()
    assert all(float(text.get_text()).is_integer() for text in axes.get_xticklabels() if text.get_text())
    numbers = [t.get_text() for t in (*axes.get_yticklabels(), *axes.get_yticklabels(minor=True)) if t.get_text()]
    assert numbers and all("10" not in n or n.isdigit() for n in numbers)


def test_a_run_that_logged_nothing_has_no_dashboard():
    with pytest.raises(ControlError, match="RUN=empty: nothing was logged"):
        dashboard([Run("empty", {"lr": Series([0.0], [1.0])}, None)])


# The command


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "runs" / "dfc" / "version_0")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("figure", ["dashboard", "figure_3", "figure_1d", "figure_2"])
def test_the_command_writes_the_figure(here, capsys, figure):
    plot.main([*(["runs/dfc"] if figure in plot.OF_RUNS else []), "--figure", figure])
    assert capsys.readouterr().out == f"{figure}.png\n"
    assert (here / f"{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_makes_the_folder_and_knows_the_format(here, capsys):
    plot.main(["runs/dfc", "--output", "figures/run.svg"])
    assert "<svg" in (here / "figures" / "run.svg").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "RUN is missing: dashboard needs the folder of a run"),
        (["runs/nowhere"], "RUN=runs/nowhere: neither it nor a version_* folder in it holds a metrics.csv or Tens"),
        (["runs/dfc", "--figure", "figure_2"], "RUN=runs/dfc: figure_2 is not drawn of a run; leave it out"),
        (["runs/dfc", "--figure", "figure_4"], "argument --figure: invalid choice: 'figure_4' (choose from"),
        (["runs/dfc", "--output", "run.txt"], "--output=run.txt: no known format; end it with one of"),
        (["runs/dfc", "runs/bare", "--figure", "figure_3"], "RUN=bare: it has logged no alignment/* for Figure 3"),
    ],
)
def test_the_command_says_what_is_wrong_and_what_to_do(here, capsys, words, says):
    write(here / "runs" / "bare" / "version_0", [{"step": 0, "val/loss": 1.0}])
    with pytest.raises(SystemExit) as stopped:
        plot.main(words)
    assert stopped.value.code == 2 and says in capsys.readouterr().err
    assert not list(here.glob("*.png"))


def test_help_tells_the_figures_and_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        plot.main(["--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(figure in said for figure in (*plot.OF_RUNS, *plot.OF_EXAMPLES)) and "dfc plot runs/toy/*" in said


def test_without_matplotlib_the_remedy_is_told(here, monkeypatch):
    pytest.importorskip("jsonargparse")
    from dfc_lightning.cli import main

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stopped:
        main(["plot", "runs/dfc"])
    assert stopped.value.code.startswith("error: ") and 'pip install "dfc_lightning[recipes]"' in stopped.value.code
