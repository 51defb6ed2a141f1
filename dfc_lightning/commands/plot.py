"""``dfc plot``: figures of runs, and of the paper."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dfc_lightning.errors import ControlError
from dfc_lightning.experiments.errors import sentence
from dfc_lightning.plots import Run, dashboard, feedback_plane, figure_1d, figure_2, figure_3, read_run
from dfc_lightning.plots.examples import controlled_student, small_jacobian
from dfc_lightning.plots.sources import RunError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OF_RUNS: dict[str, Callable[[list[Run]], Figure]] = {"dashboard": dashboard, "figure_3": figure_3}
OF_EXAMPLES = {
    "figure_1d": lambda: figure_1d(controlled_student()),
    "figure_2": lambda: figure_2(feedback_plane(small_jacobian())),
}

_DESCRIPTION = """\
Draw figures of finished or running runs, and of Meulemans et al. (2021).

  dashboard   of any run: losses, errors, settling, feedback, alignment, whatever was logged
  figure_1d   a network while the controller drives its output to the target: output, control, compartments
  figure_2    feedback weights that satisfy Conditions 2 and 3, beside J's transpose and pseudoinverses
  figure_3    angles and conditions over training, of the runs of the recipes in recipes/toy

Figures 1D and 2 are drawn of small networks of their own and take no run."""

_EXAMPLES = """\
examples:
  dfc plot runs/mnist/dfc_ss
  dfc plot runs/mnist/dfc runs/mnist/dfc_fixed --output both.png
  dfc plot lightning_logs/version_3 wandb:me/dfc/1a2b3c4d
  dfc plot runs/toy/* --figure figure_3
  dfc plot --figure figure_2 --output figure_2.pdf"""


def main(args: Sequence[str]) -> None:
    """Run ``dfc plot``.

    Args:
        args: the words after the command's name.
    """
    parser = _parser()
    given = parser.parse_args(args)
    output: Path = given.output or Path(f"{given.figure}.png")
    try:
        if given.figure in OF_EXAMPLES:
            if given.runs:
                parser.error(f"RUN={given.runs[0]}: {given.figure} is not drawn of a run; leave it out")
            figure = OF_EXAMPLES[given.figure]()
        else:
            if not given.runs:
                parser.error(f"RUN is missing: {given.figure} needs the folder of a run, e.g. runs/digits/dfc")
            figure = OF_RUNS[given.figure]([read_run(run) for run in given.runs])
    except (ControlError, FileNotFoundError, RunError) as error:
        parser.error(sentence(error) or str(error))
    formats = figure.canvas.get_supported_filetypes()
    if output.suffix.removeprefix(".") not in formats:
        parser.error(f"--output={output}: no known format; end it with one of .{', .'.join(sorted(formats))}")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    print(output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dfc plot",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="folder of a run that holds metrics.csv or TensorBoard's events, or one with version_* folders, of which "
        "the newest that has trained is taken; or wandb:ENTITY/PROJECT/ID, a run on a Weights & Biases server",
    )
    parser.add_argument("--figure", choices=[*OF_RUNS, *OF_EXAMPLES], default="dashboard", help="default: %(default)s")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where to, in the format of its ending; default: FIGURE.png"
    )
    return parser
