"""Where Lightning leaves a model: strategies of ours beside Lightning's own."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from qwenvl_lit.types import DataError


class AsPlaced(SingleDeviceStrategy):
    """One process for a model that is spread over several cards and host memory already: nothing is moved. Not for training."""

    def __init__(self):
        super().__init__(device="cuda:0" if torch.cuda.is_available() else "cpu")

    def setup(self, trainer) -> None:
        """As Lightning's.

        Raises:
            DataError: training was asked for.
        """
        if trainer.state.fn == "fit":
            raise DataError("model.device_map spreads a model to predict and to chat; train with strategy=ddp, or leave device_map out")
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Its tensors stay where they are."""

    def teardown(self) -> None:
        """Lightning would call the model back to the host, and parts of it have no tensor to call."""
