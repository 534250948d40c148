"""Lightning strategies for FSDP2 and for models that `device_map` distributes over devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """A single process with a model that `device_map` distributes over GPUs and host memory.

    Lightning does not move any tensor of the model. The strategy does not support training.
    """

    def __init__(self):
        super().__init__(device="cuda:0" if torch.cuda.is_available() else "cpu")

    def setup(self, trainer: lightning.Trainer) -> None:
        """Sets up the strategy.

        Raises:
            DataError: the trainer is going to train.
        """
        if trainer.state.fn == "fit":
            raise DataError(
                "model.device_map is for testing, predicting and chatting; to train on several "
                "GPUs use strategy=ddp and leave model.device_map out"
            )
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Does nothing, because the tensors are already on their devices."""

    def teardown(self) -> None:
        """Does nothing.

        Lightning would move the model to the host. This fails for offloaded layers, which are on
        the meta device.
        """


class FSDP2Strategy(ModelParallelStrategy):
    """Shards weights, gradients and optimizer states across all ranks (FSDP2).

    In training, the weights of a block are gathered when the block runs. For validation, testing
    and prediction, every rank gathers all weights once. Ranks can then generate different numbers
    of rows and tokens without blocking each other.

    Checkpoints have the same format as those of a single process. Trained tensors are gathered one
    by one to rank 0, which writes them unsharded. Any number of ranks can load a checkpoint.

    Args:
        process_group_backend: the backend of torch.distributed. "gloo" is required on CPUs.
    """

    def __init__(self, process_group_backend: str | None = None, **options: Any):
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            **options,
        )

    def setup_environment(self) -> None:
        # The default, "auto", is the number of nodes. The constructor argument `data_parallel_size`
        # cannot be used, because the trainer sets the numbers of nodes and processes later.
        # `test_strategies.py` checks that this private attribute determines the device mesh.
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: lightning.Trainer) -> None:
        module = self.lightning_module
        shard(module.model, self.device_mesh["data_parallel"], module.family.fsdp_units)
        super().setup(trainer)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the unsharded trained tensors on rank 0, and {} on other ranks."""
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        return get_model_state_dict(self.model, options=options)

    def on_validation_start(self) -> None:
        self._gather_weights()

    def on_validation_end(self) -> None:
        self._reshard_weights()

    def on_test_start(self) -> None:
        self._gather_weights()

    def on_test_end(self) -> None:
        self._reshard_weights()

    def on_predict_start(self) -> None:
        self._gather_weights()

    def on_predict_end(self) -> None:
        self._reshard_weights()

    def _gather_weights(self) -> None:
        with outside_inference_mode():
            for unit in self._units():
                unit.set_reshard_after_forward(False, recurse=False)
                unit.unshard()

    def _reshard_weights(self) -> None:
        with outside_inference_mode():
            *blocks, root = reversed(self._units())
            for unit in blocks:
                unit.set_reshard_after_forward(True, recurse=False)
                unit.reshard()
            # By default, FSDP does not reshard the root module after the forward pass.
            root.reshard()
            # The backward pass prefetches weights in the recorded order of all forward passes.
            # That order differs between ranks if they had different numbers of rows.
            # `tests/data/test_ranks.py` checks this private attribute.
            context = root._get_fsdp_state()._comm_ctx
            if hasattr(context, "post_forward_order"):  # after the first forward pass
                context.post_forward_order.clear()

    def _units(self) -> list[FSDPModule]:
        modules = self.lightning_module.modules()
        return [module for module in modules if isinstance(module, FSDPModule)]


def sharding_of(trainer: lightning.Trainer) -> tuple[Sharding, int]:
    """Returns how the strategy of a trainer distributes the weights, and the number of devices."""
    devices = trainer.num_devices * trainer.num_nodes
    if isinstance(trainer.strategy, FSDP2Strategy):
        return "fsdp", devices
    if devices > 1:
        return "ddp", devices
    return "none", devices


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sums `tensor` over all ranks, in place.

    Lightning's `reduce` synchronizes. This function does not.
    """
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def shard(model: nn.Module, mesh: DeviceMesh, units: Sequence[str]) -> None:
    """Shards the network in `model` across the ranks of `mesh`, unless it is sharded already.

    Weights are gathered in their own dtype, and gradients are summed in float32. Inputs of modules
    are not cast, because rotary tables must stay in float32.

    Args:
        model: a transformers model, with or without adapters around it.
        units: class names of the modules that are gathered as units, see `Family.fsdp_units`.
    """
    network = network_of(model)
    if isinstance(network, FSDPModule):
        return
    modules = [module for module in network.modules() if type(module).__name__ in units]
    if not network.config.tie_word_embeddings:
        # Embeddings and head have two thirds of the parameters outside the blocks.
        modules += [network.get_input_embeddings(), network.get_output_embeddings()]
    policy = MixedPrecisionPolicy(
        param_dtype=network.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in (*modules, network):
        fully_shard(module, mesh=mesh, mp_policy=policy)


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Disables inference mode and gradients within a `with` block.

    FSDP uses the buffers of gathered weights in training too, and autograd does not support tensors
    that were created in inference mode.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield
