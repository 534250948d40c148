"""`python -m qwenvl_lit`: which commands there are."""

from __future__ import annotations

import sys

from omegaconf import OmegaConf

from qwenvl_lit.runs.run import config_folder

VERBS = ("train", "test", "predict", "chat", "check", "export")


def main() -> None:
    """Each with the first line of its help. Where one was named after a blank instead of the dot, this is a mistake."""
    for verb in VERBS:
        what = OmegaConf.load(config_folder() / f"{verb}.yaml").hydra.help.header.splitlines()[0]
        print(f"python -m qwenvl_lit.{verb:8} {what}")
    print("\nEach says more with --help.")
    if sys.argv[1:]:
        sys.exit(
            f"error: there is no command {sys.argv[1]!r} here; write it behind a dot, as above"
        )


if __name__ == "__main__":
    main()
