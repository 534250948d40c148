"""A run that cannot fit is refused before anything is loaded, with what would fit."""

import re

import pytest
from hydra import compose, initialize_config_dir
from lightning.pytorch.accelerators import CPUAccelerator
from toy_task import trainer

from qwenvl_lit import build
from qwenvl_lit.cli import memory_check as capacity
from qwenvl_lit.cli.command import config_folder
from qwenvl_lit.training.strategies import FSDP2Strategy
from qwenvl_lit.types import DataError

GIB = 2**30
# As wide as the published network or wider, and two layers deep: 1.5 B parameters, of 3 GiB, with 16 tokens an image.
WIDE = [
    "model.dtype=bfloat16",
    "model.config.hidden_size=8192",
    "model.config.kv_channels=128",
    "model.config.num_attention_heads=64",
]
WIDE += [
    "model.config.intermediate_size=22016",
    "model.config.visual.output_dim=8192",
    "data.batch_size=1",
]


def check(folder, *arguments: str, **options) -> None:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", [*arguments, f"paths.run={folder}", f"paths.cache={folder}"])
        task = build.module(config)
        capacity.check_memory(
            config, task, build.data(config, task.processor), trainer(folder, **options)
        )


@pytest.fixture
def cards(monkeypatch):
    """Sets the memory of GPUs, for which the CPU stands in."""

    def of(gib: float) -> None:
        monkeypatch.setattr(capacity, "CUDAAccelerator", CPUAccelerator)
        monkeypatch.setattr(capacity, "gpu_room", lambda: gib * GIB)

    return of


def test_what_fits_is_told_in_a_table(tmp_path, cards, capsys):
    cards(24)
    check(tmp_path, *WIDE)
    table = capsys.readouterr().err
    assert "batches of 1 x 512 tokens" in table
    assert "all, of 24.0" in table


def test_the_demo_needs_too_little_to_tell(tmp_path, cards, capsys):
    cards(24)
    check(tmp_path)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("gib", "arguments", "advice"),
    [
        (
            16,
            ["adapter=lora", "data.batch_size=64", "speed.checkpointing=none"],
            r"What fits: speed\.checkpointing=auto \(",
        ),
        (
            5,
            ["adapter=lora", "data.batch_size=64"],
            r"What fits: speed\.checkpointing=auto data\.batch_size=1, with ",
        ),
        (12, [], r"What fits: strategy=fsdp trainer\.devices=2 .* or adapter=lora "),
        (10, [], r"What fits: strategy=fsdp trainer\.devices=4 .* or adapter=lora "),
        (3, [], r"What fits: adapter=qlora "),
        (1, [], "Nothing here fits"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(tmp_path, cards, gib, arguments, advice):
    cards(gib)
    with pytest.raises(DataError, match=advice):
        check(tmp_path, *WIDE, *arguments)


def test_it_may_start_all_the_same(tmp_path, cards, capsys):
    cards(12)
    check(tmp_path, *WIDE, "memory.check=false")
    assert "which has 12.0 GiB" in capsys.readouterr().err


def test_of_the_memory_of_the_host_there_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(capacity.os, "sysconf", lambda name: 2**30 if name == "SC_PAGE_SIZE" else 2)
    check(tmp_path, *WIDE)
    assert re.search(
        r"warning: this run needs about 11\.\d GiB on each process, which has 2\.0",
        capsys.readouterr().err.replace("\n", " "),
    )


def test_cards_that_share_the_weights_are_counted(tmp_path, cards):
    cards(48)
    check(
        tmp_path,
        *WIDE,
        "adapter=full",
        strategy=FSDP2Strategy(process_group_backend="gloo"),
        devices=2,
    )
