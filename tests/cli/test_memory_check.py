"""A run that cannot fit is refused before anything is loaded; the message says what would fit."""

import re

import pytest
from hydra import compose, initialize_config_dir
from lightning.pytorch.accelerators import CPUAccelerator
from toy_task import trainer

from qwenvl_lit import build
from qwenvl_lit.cli import memory_check
from qwenvl_lit.runs.run import config_folder
from qwenvl_lit.training import memory
from qwenvl_lit.training.strategies import FSDP2Strategy
from qwenvl_lit.types import DataError

GIB = 2**30
# As wide as the published network or wider, and two layers deep: 1.5 B parameters, 3 GiB, with 16
# tokens per image.
WIDE = [
    "model.dtype=bfloat16",
    "model.config.hidden_size=8192",
    "model.config.kv_channels=128",
    "model.config.num_attention_heads=64",
    "model.config.intermediate_size=22016",
    "model.config.visual.output_dim=8192",
    "data.batch_size=1",
]


def check(folder, *arguments: str, **options) -> None:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", [*arguments, f"paths.run={folder}", f"paths.cache={folder}"])
        module = build.module(config)
        data = build.data(config, module.processor)
        memory_check.check_memory(config, module, data, trainer(folder, **options))


@pytest.fixture
def gpus_of(monkeypatch):
    """Sets the memory of the GPUs; the CPU stands in for them."""

    def set_memory(gib: float) -> None:
        monkeypatch.setattr(memory_check, "CUDAAccelerator", CPUAccelerator)
        monkeypatch.setattr(memory, "available_gpu_memory", lambda: gib * GIB)

    return set_memory


def test_the_estimate_is_printed_as_a_table(tmp_path, gpus_of, capsys):
    gpus_of(24)
    check(tmp_path, *WIDE)
    table = capsys.readouterr().err
    assert "Estimated memory per GPU" in table
    assert "batches of 1 x 512 tokens" in table
    assert "total, of 24.0" in table


def test_less_than_a_gib_is_not_reported(tmp_path, gpus_of, capsys):
    gpus_of(24)
    check(tmp_path)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("gib", "arguments", "advice"),
    [
        (
            16,
            ["adapter=lora", "data.batch_size=64", "speed.checkpointing=none"],
            r"This fits: speed\.checkpointing=auto \(",
        ),
        (
            5,
            ["adapter=lora", "data.batch_size=64"],
            r"This fits: speed\.checkpointing=auto data\.batch_size=1, with ",
        ),
        (12, [], r"This fits: strategy=fsdp trainer\.devices=2 .* or adapter=lora "),
        (10, [], r"This fits: strategy=fsdp trainer\.devices=4 .* or adapter=lora "),
        (3, [], r"This fits: adapter=qlora "),
        (1, [], r"Neither strategy=fsdp on 8 GPUs nor adapter=qlora fits: use larger GPUs"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_with_one_that_does(
    tmp_path, gpus_of, gib, arguments, advice
):
    gpus_of(gib)
    with pytest.raises(DataError, match=advice):
        check(tmp_path, *WIDE, *arguments)


def test_with_the_check_off_there_is_a_warning(tmp_path, gpus_of, capsys):
    gpus_of(12)
    check(tmp_path, *WIDE, "memory.check=false")
    output = capsys.readouterr().err.replace("\n", " ")
    assert re.search(r"warning: this run needs about [\d.]+ GiB per GPU, but 12\.0 GiB", output)


def test_too_little_host_memory_gives_a_warning(tmp_path, monkeypatch, capsys):
    sizes = {"SC_PAGE_SIZE": 2**30, "SC_PHYS_PAGES": 2}
    monkeypatch.setattr(memory.os, "sysconf", sizes.get)
    check(tmp_path, *WIDE)
    output = capsys.readouterr().err.replace("\n", " ")
    assert re.search(r"warning: this run needs about 11\.\d GiB per process, but 2\.0 GiB", output)


def test_the_number_of_fsdp_gpus_counts(tmp_path, gpus_of):
    gpus_of(48)
    check(
        tmp_path,
        *WIDE,
        "adapter=full",
        strategy=FSDP2Strategy(process_group_backend="gloo"),
        devices=2,
    )
