"""Experiment trackers: they get the settings of a run, and a resumed run continues as the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import lightning
from lightning.pytorch.loggers import Logger

from qwenvl_lit.atomic import write_text
from qwenvl_lit.stored_files import read_json_object

FILE = "trackers.json"
# Classes of loggers -> the argument that names an earlier run
RUN_ID = {
    "lightning.pytorch.loggers.CometLogger": "experiment_key",
    "lightning.pytorch.loggers.MLFlowLogger": "run_id",
    "lightning.pytorch.loggers.WandbLogger": "id",
}


class TrackedRuns(lightning.Callback):
    """Logs the config of a run to its trackers, and writes the run's ids there to `trackers.json`.

    Args:
        trackers: loggers of the classes in `RUN_ID`, by the name that the config gives them.
    """

    def __init__(self, trackers: Mapping[str, Logger]):
        self.trackers = trackers

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        known = run_ids(folder)
        for name, tracker in self.trackers.items():
            if name not in known:  # a tracker may refuse other settings for a run that it has
                tracker.log_hyperparams(pl_module.config)
        ids = {name: tracker.version for name, tracker in self.trackers.items()}
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / FILE, json.dumps({**known, **ids}, indent=2) + "\n")


def run_ids(folder: Path) -> dict[str, str]:
    """Returns the ids of a run by the name of the tracker; none if it has not been tracked."""
    file = folder / FILE
    return read_json_object(file) if file.exists() else {}
