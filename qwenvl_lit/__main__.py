"""`qwenvl-lit COMMAND ...`, the same as `python -m qwenvl_lit.COMMAND ...`; lists the commands."""

from __future__ import annotations

import difflib
import os
import re
import runpy
import sys
from collections.abc import Sequence

COMMANDS = ("train", "test", "predict", "chat", "serve", "check", "export")


def main() -> None:
    """Runs the command that is the first argument; without one lists the commands.

    Exits with status 2 if there is no such command.
    """
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        list_commands()
    elif name in ("--shell-completion", "-sc"):
        complete(sys.argv[1:])
    elif name in COMMANDS:
        sys.argv[1:] = arguments
        # As `python -m` does, so that Lightning finds the module when it starts other ranks.
        runpy.run_module(f"qwenvl_lit.{name}", run_name="__main__", alter_sys=True)
    else:
        from qwenvl_lit.cli.hints import explain_command

        hint = f"there are {', '.join(COMMANDS)}"
        if meant := explain_command(name, arguments, program="qwenvl-lit "):
            hint = meant
        elif nearest := difflib.get_close_matches(name, COMMANDS, n=1):
            hint = f"did you mean {nearest[0]}?"
        print(f"error: there is no command {name!r}; {hint}", file=sys.stderr)
        sys.exit(2)


def list_commands() -> None:
    """Prints each command with the first line of its help."""
    from omegaconf import OmegaConf

    from qwenvl_lit.runs.run import config_folder

    for command in COMMANDS:
        config = OmegaConf.load(config_folder() / f"{command}.yaml")
        summary = config.hydra.help.header.splitlines()[0]
        print(f"python -m qwenvl_lit.{command:8} {summary}")
    print(
        "\nEach command has --help. qwenvl-lit COMMAND is the same as python -m qwenvl_lit.COMMAND."
    )
    print('Tab completion in bash:  eval "$(qwenvl-lit -sc install=bash)"')


def complete(arguments: Sequence[str]) -> None:
    """Completes a command line: the command here, all else by Hydra, as for a program of its own.

    The shell function that Hydra installs calls this with the line in COMP_LINE.
    """
    name = "train"  # any command installs the completion
    if "COMP_LINE" in os.environ:
        typed = re.match(r"(\s*\S+\s+)(\S+)\s+", os.environ["COMP_LINE"])
        if typed is None:
            print(" ".join(COMMANDS))
            return
        program, name = typed.groups()
        if name not in COMMANDS:
            return
        os.environ["COMP_LINE"] = program + os.environ["COMP_LINE"][typed.end() :]
    sys.argv[1:] = arguments
    # Hydra installs the completion for sys.argv[0], which `alter_sys=True` would replace.
    runpy.run_module(f"qwenvl_lit.{name}", run_name="__main__")


if __name__ == "__main__":
    main()
