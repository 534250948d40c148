"""Prints a summary of the trained parameters before training, and writes it to the run folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning
import torch
from rich.table import Table

from qwenvl_lit.atomic import write_text
from qwenvl_lit.models.components import component_of_tensor
from qwenvl_lit.rendering.table import output_console

FILE = "trainable.json"
OTHER = "other"  # tensors outside all components, such as the last norm of the language model


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedTensors:
    """The number and size of the trained tensors of one dtype in a component of the model."""

    component: str
    tensors: int
    parameters: int
    dtype: str
    share: float  # fraction of all parameters of the model, including adapters


class TrainableSummary(lightning.Callback):
    """Prints a table of the trained tensors of each component, and writes it to `trainable.json`.

    In the file, `components` has the rows of the table, `trained` is the number of trained
    parameters, and `total` is the number of all parameters.
    """

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if not trainer.is_global_zero:
            return
        rows, total = trained_tensors(
            pl_module.model.named_parameters(), pl_module.family.components
        )
        summary = {
            "components": [asdict(row) for row in rows],
            "trained": sum(row.parameters for row in rows),
            "total": total,
        }
        path = Path(trainer.default_root_dir, FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(summary, indent=2) + "\n")
        output_console().print(trainable_table(rows, total))


def trained_tensors(
    parameters: Iterable[tuple[str, torch.Tensor]], components: Mapping[str, str]
) -> tuple[list[TrainedTensors], int]:
    """Counts the trained tensors of each component and dtype, and all parameters of the model.

    Returns:
        The trained tensors in the order of `components`, and the number of all parameters.
    """
    sizes: dict[tuple[str, str], list[int]] = {}
    total = 0
    for name, tensor in parameters:
        size = unquantized_size(tensor)
        total += size
        if tensor.requires_grad:
            component = component_of_tensor(name, components) or OTHER
            dtype = str(tensor.dtype).removeprefix("torch.")
            sizes.setdefault((component, dtype), []).append(size)
    rows = []
    order = [*components, OTHER]
    for component, dtype in sorted(sizes, key=lambda key: order.index(key[0])):
        counts = sizes[component, dtype]
        row = TrainedTensors(
            component=component,
            tensors=len(counts),
            parameters=sum(counts),
            dtype=dtype,
            share=sum(counts) / total,
        )
        rows.append(row)
    return rows, total


def unquantized_size(tensor: torch.Tensor) -> int:
    """Returns the number of parameters in a tensor, including shards on other ranks.

    bitsandbytes stores two 4-bit parameters in a byte, so `numel` of a quantized tensor is smaller.
    """
    quant_state = getattr(tensor, "quant_state", None)
    if quant_state is None:
        return tensor.numel()
    return torch.Size(quant_state.shape).numel()


def trainable_table(rows: Iterable[TrainedTensors], total: int) -> Table:
    """Returns a table of `rows` whose last line has the totals."""
    table = Table(title="Trained parameters")
    for title in ("component", "tensors", "parameters", "dtype", "share"):
        is_text = title in ("component", "dtype")
        table.add_column(title, justify="left" if is_text else "right", overflow="fold")
    tensors = trained = 0
    for row in rows:
        tensors += row.tensors
        trained += row.parameters
        table.add_row(
            row.component, str(row.tensors), f"{row.parameters:,}", row.dtype, f"{row.share:.3%}"
        )
    table.add_section()
    share = f"{trained / total:.3%}"
    table.add_row(f"all, of {total:,}", str(tensors), f"{trained:,}", "", share)
    return table
