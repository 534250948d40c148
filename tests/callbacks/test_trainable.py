import json
from types import SimpleNamespace

import torch

from qwenvl_lit.callbacks.trainable import (
    TrainableSummary,
    TrainedTensors,
    trainable_table,
    trained_tensors,
)
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.training.adapters.methods import Full, LoRA
from tests.small_network import small_network


def summary_of(adapter) -> tuple[list[TrainedTensors], int]:
    model = adapter.apply(small_network(), QwenVLFamily)
    return trained_tensors(model.named_parameters(), QwenVLFamily.components)


def test_each_parameter_is_counted_once_for_the_innermost_component():
    rows, total = summary_of(Full())
    assert total == sum(row.parameters for row in rows) == small_network().num_parameters()
    components = [row.component for row in rows]
    assert components == ["vision", "resampler", "language", "embeddings", "head", "other"]
    assert (rows[4].tensors, rows[4].parameters) == (1, 64 * 32)
    assert rows[5].parameters == 32, "the last norm"


def test_adapters_are_listed_by_component_with_their_share():
    attention = r"transformer\.h\.\d+\.attn\.c_attn"
    rows, total = summary_of(LoRA(rank=2, alpha=4, dropout=0.0, targets=attention))
    parameters = 2 * 2 * (32 + 96)  # blocks x rank x (in + out)
    assert total == small_network().num_parameters() + parameters
    expected = TrainedTensors(
        component="language",
        tensors=4,
        parameters=parameters,
        dtype="float32",
        share=parameters / total,
    )
    assert rows == [expected]


def test_each_dtype_has_a_row_of_its_own():
    parameters = [
        ("head.a", torch.nn.Parameter(torch.ones(3).bfloat16())),
        ("head.b", torch.nn.Parameter(torch.ones(1))),
    ]
    rows, total = trained_tensors(parameters, {"head": "head"})
    assert [(row.dtype, row.parameters) for row in rows] == [("bfloat16", 3), ("float32", 1)]
    assert total == 4


def test_quantized_weights_count_with_their_unquantized_size():
    packed = torch.nn.Parameter(torch.zeros(48, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = SimpleNamespace(shape=(8, 12))
    assert trained_tensors([("h.weight", packed)], {}) == ([], 96)


def test_the_summary_is_printed_and_written_to_the_run(tmp_path, capsys):
    adapter = LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear")
    model = adapter.apply(small_network(), QwenVLFamily)
    module = SimpleNamespace(model=model, family=QwenVLFamily)
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path / "run")
    TrainableSummary().on_fit_start(trainer, module)
    written = json.loads((tmp_path / "run/trainable.json").read_text())
    components = [row["component"] for row in written["components"]]
    assert components == ["vision", "resampler", "language"]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert written["trained"] == sum(parameter.numel() for parameter in trained)
    assert f"{written['trained']:,}" in capsys.readouterr().out


def test_the_table_ends_with_the_sum():
    row = TrainedTensors(component="head", tensors=1, parameters=1500, dtype="float32", share=0.5)
    table = trainable_table([row], 3000)
    last = [list(column.cells)[-1] for column in table.columns]
    assert last == ["all, of 3,000", "1", "1,500", "", "50.000%"]
