"""`python -m qwenvl_lit.train`: fine-tunes a model on a dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenvl_lit.cli.command import command
from qwenvl_lit.cli.early_checks import check_files
from qwenvl_lit.libraries import import_libraries

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(config: DictConfig) -> None:
    check_files(config, ("train", "validation"))
    import_libraries()
    from pathlib import Path

    from qwenvl_lit import build
    from qwenvl_lit.callbacks.early_stopping import why_stopped
    from qwenvl_lit.cli.memory_check import check_memory
    from qwenvl_lit.cli.resume import checkpoint_of, nothing_left, steps_of
    from qwenvl_lit.runs.run import USED_GROUPS, contents
    from qwenvl_lit.runs.stored_config import trust_argument
    from qwenvl_lit.terminal import counted
    from qwenvl_lit.training.precision import check_precision

    build.start(config)
    features = build.cached_features(config)
    module = build.module(config, features=features)
    data = build.data(config, module.processor)
    trainer = build.trainer(config, features=features)
    trains_base = module.adapter.trains_base_weights
    check_precision(trainer, module.family.dtype, trains_base_weights=trains_base)
    check_memory(config, module, data, trainer)
    build.save_config(config)
    checkpoint = checkpoint_of(config)
    steps_before = steps_of(checkpoint)  # read now: the run replaces this file
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    if not trainer.is_global_zero:
        return
    run = build.shown(config.paths.run)
    if checkpoint and trainer.global_step == steps_before:
        print(f"\n{nothing_left(steps_before, trainer.max_steps, trainer.max_epochs)}")
    elif reason := why_stopped(trainer):
        print(f"\nStopped early after step {trainer.global_step}: {reason}")
    print(f"\nTrained {counted(trainer.global_step, 'step')}. {run} has\n{contents(Path(run))}\n")
    arguments = f"ckpt={run}{trust_argument(module.config or {}, USED_GROUPS)}"
    print(f"Score it:  python -m qwenvl_lit.test {arguments}")
    print(f"Serve it:  python -m qwenvl_lit.serve {arguments}")


if __name__ == "__main__":
    command("train", main, run="start")
