"""`python -m qwenvl_lit`: lists the commands."""

from __future__ import annotations

import sys

from omegaconf import OmegaConf

from qwenvl_lit.runs.run import config_folder

COMMANDS = ("train", "test", "predict", "chat", "check", "export")


def main() -> None:
    """Prints each command with the first line of its help.

    Exits with status 1 if a command was given as an argument: commands are modules of their own.
    """
    for command in COMMANDS:
        config = OmegaConf.load(config_folder() / f"{command}.yaml")
        summary = config.hydra.help.header.splitlines()[0]
        print(f"python -m qwenvl_lit.{command:8} {summary}")
    print("\nEach command has --help.")
    if sys.argv[1:]:
        name = sys.argv[1]
        sys.exit(f"error: there is no command {name!r} here; a dot comes before it, as above")


if __name__ == "__main__":
    main()
