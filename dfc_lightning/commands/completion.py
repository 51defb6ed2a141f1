"""``dfc completion``: what a shell needs to complete commands, recipes and frequent options, starting nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dfc_lightning.commands import COMMANDS, FITTING
from dfc_lightning.experiments.shipped import known_recipes

_OF_FITTING = (
    "--recipe --config --ckpt_path --threads --print_config --help --data.init_args.root --trainer.max_epochs "
    "--trainer.accelerator --trainer.devices --trainer.strategy --trainer.strategy.init_args.rule "
    "--trainer.strategy.init_args.feedback --trainer.enable_progress_bar --seed_everything"
)

_SCRIPT = """\
_dfc() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}}
    local words=""
    if ((COMP_CWORD == 1)); then
        words="{commands} --help --version"
    elif [[ $before == --recipe || $command == list || $command == compare && $word != */*/* ]]; then
        words="{recipes}"
    elif [[ $word == -* ]]; then
        case $command in {fitting}) words="{options}" ;; esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o bashdefault -o default -F _dfc dfc"""

_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: the words after its name.
    """
    parser = argparse.ArgumentParser(
        prog="dfc completion",
        description='Print a script by which a shell completes dfc: eval "$(dfc completion bash)", or, for good, '
        "dfc completion bash >> ~/.bashrc. The names of recipes are those of this moment.",
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    given = parser.parse_args(args)
    script = _SCRIPT.format(
        commands=" ".join([*FITTING, *COMMANDS]),
        recipes=" ".join(sorted(known_recipes())),
        fitting="|".join([*FITTING, "resume"]),
        options=_OF_FITTING,
    )
    print((_ZSH if given.shell == "zsh" else "") + script)
