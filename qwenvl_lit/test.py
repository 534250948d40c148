"""`python -m qwenvl_lit.test ckpt=RUN`: answer test sets and score the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenvl_lit.command import command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(config: DictConfig) -> None:
    from rich.console import Console

    from qwenvl_lit import build
    from qwenvl_lit.callbacks.run_log import save_scores
    from qwenvl_lit.callbacks.table import score_table
    from qwenvl_lit.runs import find_run

    build.start(config)
    task = build.task(config, adapted=config.ckpt is not None)
    data = build.data(config, task.processor)
    baseline = None
    if config.baseline:
        before = build.trainer(config, callbacks={})
        before.test(task, data, verbose=False)
        baseline = {name: float(value) for name, value in before.callback_metrics.items()}
    task.trained = find_run(config.ckpt).checkpoint if config.ckpt else None
    source = task.trained or config.model.path
    trainer = build.trainer(config)
    trainer.test(task, data, verbose=False)
    if trainer.is_global_zero:
        if baseline:
            save_scores(config.paths.run, "baseline", baseline)
        print(f"\nScores of {source} on the sets {', '.join(data.test_names)}")
        Console().print(score_table(trainer.callback_metrics, baseline))
        print(f"Predictions, pictures and metrics.json: {build.shown(config.paths.run)}")


if __name__ == "__main__":
    command("test", main, needs_run=True)
