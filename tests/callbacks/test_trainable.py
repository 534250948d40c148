import json
from types import SimpleNamespace

import torch

from qwenvl_lit.callbacks.trainable import Trainable, Trained, trainable_table, what_is_trained
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.training.adapters.methods import Full, LoRA
from tests.small_network import small_network


def listed(adapter) -> tuple[list[Trained], int]:
    return what_is_trained(
        adapter.apply(small_network(), QwenVLFamily).named_parameters(),
        QwenVLFamily.components,
    )


def test_all_parameters_are_counted_once_by_the_innermost_part():
    rows, total = listed(Full())
    assert total == sum(row.parameters for row in rows) == small_network().num_parameters()
    assert [row.part for row in rows] == [
        "vision",
        "resampler",
        "language",
        "embeddings",
        "head",
        "other",
    ]
    assert (rows[4].tensors, rows[4].parameters) == (1, 64 * 32)
    assert rows[5].parameters == 32  # the last norm


def test_adapters_are_listed_by_part_with_their_share():
    rows, total = listed(
        LoRA(rank=2, alpha=4, dropout=0.0, targets=r"transformer\.h\.\d+\.attn\.c_attn")
    )
    parameters = 2 * 2 * (32 + 96)  # blocks x rank x (in + out)
    assert total == small_network().num_parameters() + parameters
    assert rows == [
        Trained(
            part="language",
            tensors=4,
            parameters=parameters,
            dtype="float32",
            share=parameters / total,
        )
    ]


def test_types_have_rows_of_their_own():
    parts = {"head": "head"}
    rows, total = what_is_trained(
        [
            ("head.a", torch.nn.Parameter(torch.ones(3).bfloat16())),
            ("head.b", torch.nn.Parameter(torch.ones(1))),
        ],
        parts,
    )
    assert ([(row.dtype, row.parameters) for row in rows], total) == (
        [("bfloat16", 3), ("float32", 1)],
        4,
    )


def test_weights_of_four_bits_count_as_what_they_stand_for():
    packed = torch.nn.Parameter(torch.zeros(48, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = SimpleNamespace(shape=(8, 12))
    assert what_is_trained([("h.weight", packed)], {}) == ([], 96)


def test_the_table_is_printed_and_kept_with_the_run(tmp_path, capsys):
    model = LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear").apply(
        small_network(), QwenVLFamily
    )
    task = SimpleNamespace(model=model, family=QwenVLFamily)
    Trainable().on_fit_start(
        SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path / "run"), task
    )
    kept = json.loads((tmp_path / "run/trainable.json").read_text())
    assert [row["part"] for row in kept["components"]] == ["vision", "resampler", "language"]
    assert kept["trained"] == sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    assert f"{kept['trained']:,}" in capsys.readouterr().out


def test_the_table_ends_with_the_sum():
    table = trainable_table(
        [Trained(part="head", tensors=1, parameters=1500, dtype="float32", share=0.5)], 3000
    )
    assert [list(column.cells)[-1] for column in table.columns] == [
        "all, of 3,000",
        "1",
        "1,500",
        "",
        "50.000%",
    ]
