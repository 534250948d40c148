"""What a run trains: printed before the first step, and kept with the run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning
import torch
from rich.console import Console
from rich.table import Table

from qwenvl_lit.models.components import component_of_tensor

FILE = "trainable.json"
OTHER = "other"  # tensors of no part, as the last norm of the language model


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """The trained tensors of one type in a part of the model."""

    part: str
    tensors: int
    parameters: int
    dtype: str
    share: float  # of all parameters of the model, adapters included


class Trainable(lightning.Callback):
    """Prints a table of the trained tensors of each part, and writes it to `trainable.json`: `components`, `trained` and `total` parameters."""

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if not trainer.is_global_zero:
            return
        rows, total = what_is_trained(
            pl_module.model.named_parameters(), pl_module.family.components
        )
        trained = sum(row.parameters for row in rows)
        path = Path(trainer.default_root_dir, FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(
                {"components": [asdict(row) for row in rows], "trained": trained, "total": total},
                indent=2,
            )
            + "\n"
        )
        Console().print(trainable_table(rows, total))


def what_is_trained(
    parameters: Iterable[tuple[str, torch.Tensor]], components: Mapping[str, str]
) -> tuple[list[Trained], int]:
    """A row for each part and type, in the order of `components`, and the number of all parameters."""
    found: dict[tuple[str, str], list[int]] = {}
    total = 0
    for name, tensor in parameters:
        total += (size := elements(tensor))
        if tensor.requires_grad:
            found.setdefault(
                (
                    component_of_tensor(name, components) or OTHER,
                    str(tensor.dtype).removeprefix("torch."),
                ),
                [],
            ).append(size)
    order = [*components, OTHER]
    rows = [
        Trained(
            part=part,
            tensors=len(sizes),
            parameters=sum(sizes),
            dtype=dtype,
            share=sum(sizes) / total,
        )
        for (part, dtype), sizes in sorted(found.items(), key=lambda item: order.index(item[0][0]))
    ]
    return rows, total


def elements(tensor: torch.Tensor) -> int:
    """How many numbers a tensor holds, of all ranks together; those of 4 bits stand two in a byte."""
    packed = getattr(tensor, "quant_state", None)
    return tensor.numel() if packed is None else torch.Size(packed.shape).numel()


def trainable_table(rows: Iterable[Trained], total: int) -> Table:
    table = Table(title="What is trained")
    for title in ("part", "tensors", "parameters", "dtype", "share"):
        table.add_column(title, justify="left" if title in ("part", "dtype") else "right")
    rows = list(rows)
    for row in rows:
        table.add_row(
            row.part, str(row.tensors), f"{row.parameters:,}", row.dtype, f"{row.share:.3%}"
        )
    trained = sum(row.parameters for row in rows)
    table.add_section()
    table.add_row(
        f"all, of {total:,}",
        str(sum(row.tensors for row in rows)),
        f"{trained:,}",
        "",
        f"{trained / total:.3%}",
    )
    return table
