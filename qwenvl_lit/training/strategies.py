"""Where Lightning leaves a model: strategies of ours beside Lightning's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from qwenvl_lit.models.components import network_of
from qwenvl_lit.training.memory import Sharding
from qwenvl_lit.types import DataError


class DeviceMapStrategy(SingleDeviceStrategy):
    """One process for a model that is spread over several cards and host memory already: nothing is moved. Not for training."""

    def __init__(self):
        super().__init__(device="cuda:0" if torch.cuda.is_available() else "cpu")

    def setup(self, trainer) -> None:
        """As Lightning's.

        Raises:
            DataError: training was asked for.
        """
        if trainer.state.fn == "fit":
            raise DataError(
                "model.device_map spreads a model to predict and to chat; train with strategy=ddp, or leave device_map out"
            )
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Its tensors stay where they are."""

    def teardown(self) -> None:
        """Lightning would call the model back to the host, and parts of it have no tensor to call."""


class FSDP2Strategy(ModelParallelStrategy):
    """Weights, gradients and optimizer states are divided among all ranks (FSDP2); a block's weights are gathered when they are needed.

    To validate, test and predict, every rank gathers all weights once: ranks then answer as many rows as they have, in as many steps as
    the answers are long, without waiting for each other.

    Checkpoints are as those of one process: whole tensors, gathered one by one and written by rank 0, of what is trained. They load
    with any number of ranks.

    Args:
        process_group_backend: "gloo" to run it on the CPU.
    """

    def __init__(self, process_group_backend: str | None = None, **options: Any):
        super().__init__(
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            **options,
        )

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = (
            self.num_nodes * self.num_processes,
            1,
        )
        super().setup_environment()

    def setup(self, trainer: lightning.Trainer) -> None:
        shard(self.lightning_module.model, self.device_mesh["data_parallel"])
        super().setup(trainer)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors of what is trained, on rank 0; nothing on the others."""
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        return get_model_state_dict(self.model, options=options)

    def on_validation_start(self) -> None:
        self._gather()

    def on_validation_end(self) -> None:
        self._divide()

    def on_test_start(self) -> None:
        self._gather()

    def on_test_end(self) -> None:
        self._divide()

    def on_predict_start(self) -> None:
        self._gather()

    def on_predict_end(self) -> None:
        self._divide()

    def _gather(self) -> None:
        with ordinary_tensors():
            for module in self._units():
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()

    def _divide(self) -> None:
        with ordinary_tensors():
            *blocks, root = reversed(self._units())
            for module in blocks:
                module.set_reshard_after_forward(True, recurse=False)
                module.reshard()
            root.reshard()  # whose weights stay from the forward to the backward pass, as FSDP has it

    def _units(self) -> list[FSDPModule]:
        return [
            module for module in self.lightning_module.modules() if isinstance(module, FSDPModule)
        ]


def sharding_of(trainer: lightning.Trainer) -> tuple[Sharding, int]:
    """How a trainer's strategy spreads the weights, and over how many cards."""
    cards = trainer.num_devices * trainer.num_nodes
    return "sharded" if isinstance(
        trainer.strategy, FSDP2Strategy
    ) else "replicated" if cards > 1 else "one", cards


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, which becomes the sum of those of all ranks. Lightning's `reduce` has each host wait for its device first."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the network in `model`, a PreTrainedModel or one inside adapters, among the ranks of `mesh`, block by block; once.

    Weights are gathered in their own type, gradients summed in float32. What is passed between modules keeps its type: rotary
    tables are float32.
    """
    network = network_of(model)
    if isinstance(network, FSDPModule):
        return
    blocks = set(network._no_split_modules)
    units = [module for module in network.modules() if type(module).__name__ in blocks]
    if not network.config.tie_word_embeddings:  # two thirds of what the blocks leave
        units += [network.get_input_embeddings(), network.get_output_embeddings()]
    policy = MixedPrecisionPolicy(
        param_dtype=network.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in (*units, network):
        fully_shard(module, mesh=mesh, mp_policy=policy)


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Tensors made inside can be trained, also where Lightning infers: FSDP keeps those that it gathers weights into."""
    with torch.inference_mode(False), torch.no_grad():
        yield
