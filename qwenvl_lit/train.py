"""`python -m qwenvl_lit.train`: fine-tune a model on a dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenvl_lit.cli.command import command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(config: DictConfig) -> None:
    from pathlib import Path

    from qwenvl_lit import build
    from qwenvl_lit.cli.memory_check import check_memory
    from qwenvl_lit.cli.resume import checkpoint_of, steps_of
    from qwenvl_lit.runs.run import contents

    build.start(config)
    task = build.module(config)
    data = build.data(config, task.processor)
    trainer = build.trainer(config)
    check_memory(config, task, data, trainer)
    build.save_config(config)
    checkpoint = checkpoint_of(config)
    steps_before = steps_of(checkpoint)  # the run writes another checkpoint under this name
    trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:
        run = build.shown(config.paths.run)
        if checkpoint and trainer.global_step == steps_before:
            limit = "max_steps" if trainer.global_step == trainer.max_steps else "max_epochs"
            print(
                f"\nNothing was left to train: the run has made its {steps_before} steps; trainer.{limit}=... goes further."
            )
        print(f"\nTrained, {trainer.global_step} steps. {run} has\n{contents(Path(run))}\n")
        print(f"Score it:  python -m qwenvl_lit.test ckpt={run}")


if __name__ == "__main__":
    command("train", main, starts_from_run=True)
