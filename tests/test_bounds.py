"""Odd values on the command line are a line that names the key, before the first step."""

import json
import math
import re
from copy import deepcopy

import pytest
from commands import compose_config
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from qwenvl_lit import build
from qwenvl_lit.bounds import check_number
from qwenvl_lit.cli.command import _is_a_mistake as is_a_mistake
from qwenvl_lit.cli.early_checks import check_values
from qwenvl_lit.cli.memory_check import check_memory
from qwenvl_lit.runs.config_folder import config_folder
from qwenvl_lit.settings import CHECKS
from qwenvl_lit.types import DataError

ODD_VALUES = {
    "seed": ["-1", "1.5", "null", "a", "4294967296", "true"],
    "optim.lr": ["nan", "inf", "-1", "a", "null", "true"],
    "optim.warmup": ["-1", "nan", "null", "a"],
    "optim.weight_decay": ["-1", "nan"],
    "optim.eps": ["-1", "nan", "a"],
    "optim.betas": ["0.9", "[0.9]", "[1,1]", "[0.9,nan]", "[a,b]"],
    "optim.schedule": ["sine", "5"],
    "optim.component_lr.vision": ["nan", "-1", "a"],
    "trainer.max_steps": ["0", "-2", "1.5", "null", "a"],
    "trainer.max_epochs": ["0", "-2", "1.5", "a"],
    "trainer.accumulate_grad_batches": ["0", "1.5", "a"],
    "trainer.rows_per_step": ["0", "1.5", "a"],
    "trainer.gradient_clip_val": ["-1", "nan", "a"],
    "trainer.log_every_n_steps": ["0", "-1", "a"],
    "trainer.val_check_interval": ["0", "-1", "2.5", "nan", "a"],
    "trainer.validate_every": ["0", "-1", "0.0", "nan", "a", "true"],
    "trainer.limit_val_batches": ["-1", "1.5", "nan", "a"],
    "trainer.limit_train_batches": ["0", "-1", "nan"],
    "trainer.overfit_batches": ["-1", "1.5", "a"],
    "trainer.num_sanity_val_steps": ["-2", "a"],
    "trainer.precision": ["foo", "8"],
    "trainer.devices": ["0", "-5", "a", "true", "9000000000000000000"],
    "trainer.accelerator": ["foo"],
    "trainer.strategy": ["foo"],
    "trainer.fast_dev_run": ["-1"],
    "data.num_workers": ["-1", "1.5", "a", "100000"],
    "data.batch_size": ["0", "-1", "1.5", "a", "true", "9000000000000000000"],
    "data.eval_batch_size": ["0", "-1"],
    "data.max_tokens": ["0", "1.5", "true", "9000000000000000000"],
    "data.validation": ["''", "2.5", "-1", "nan", "true", "1.0", "-0.5"],
    "data.max_bad_fraction": ["2", "-1", "nan", "a"],
    "data.generated_validation_rows": ["-1", "1.5"],
    "data.rows": ["0", "nan", "a", "true"],
    "memory.tokens": ["-1", "0", "1.5", "a", "9000000000000000000"],
    "memory.images": ["-1", "1.5"],
    "memory.targets": ["-1", "0", "1.5"],
    "memory.check": ["5"],
    "adapter.rank": ["1.5", "0", "a", "true", "10000000"],
    "adapter.alpha": ["nan", "-1", "a"],
    "adapter.dropout": ["2", "1", "-1", "nan", "a"],
    "generation.temperature": ["nan", "-1", "a"],
    "generation.top_p": ["2", "0", "nan"],
    "generation.top_k": ["-1", "1.5"],
    "generation.num_beams": ["0", "1.5", "1000000"],
    "generation.repetition_penalty": ["0", "nan"],
    "generation.length_penalty": ["nan", "a", "1e9"],
    "generation.max_new_tokens": ["0", "1.5", "a"],
    "generation.min_new_tokens": ["-1", "100000"],
    "generation.seed": ["-1", "1.5"],
    "generation.do_sample": ["5"],
    "model.max_length": ["0", "-1", "1.5", "a"],
    "model.max_window_size": ["-1", "a"],
    "model.seed": ["-1", "1.5", "null"],
    "model.config.initializer_range": ["-1", "true", "null"],
    "model.config.visual.mlp_ratio": ["-1", "null"],
    "model.config.visual.patch_size": ["null", "true"],
    "callbacks.checkpoint.every": ["0", "1.5", "a"],
    "callbacks.checkpoint.keep": ["-1", "1.5"],
    "callbacks.checkpoint.mode": ["best"],
    "callbacks.checkpoint.monitor": ["5"],
    "callbacks.run_log.print_every": ["0", "-1", "1.5"],
    "callbacks.early_stopping.patience": ["-1", "1.5", "a"],
    "callbacks.early_stopping.min_delta": ["nan", "a"],
    "callbacks.early_stopping.mode": ["best"],
    "callbacks.early_stopping.stopping_threshold": ["nan", "a"],
    "sweep.parallel": ["0", "1.5"],
    "sweep.mode": ["best"],
    "speed.vision_cache_gb": ["-1", "nan", "a"],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The config of a short run with early stopping."""
    folder = tmp_path_factory.mktemp("odd")
    rows = [{"query": f"q{index}", "response": "r"} for index in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = compose_config(
        "train",
        *("data=jsonl", f"data.train={folder / 'rows.jsonl'}", "data.validation=2"),
        *("trainer=smoke", "logger=none", "adapter=lora", f"data.cache={folder / 'cache'}"),
        *("callbacks=[train,early_stopping]", "data.split_file=null", f"paths.run={folder}"),
    )
    OmegaConf.set_struct(config, False)
    return config


def start(config, *overrides):
    """Does what `train` does before the first step."""
    config = deepcopy(config)
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        OmegaConf.update(config, override.key_or_group, override.value())
    check_values(config)
    build.start(config)
    module = build.module(config)
    data = build.data(config, module.processor)
    trainer = build.trainer(config)
    check_memory(config, module, data, trainer)
    data.setup("fit")


def test_good_values_are_accepted(config):
    start(config, "trainer.validate_every=4", "trainer.max_steps=-1", "optim.warmup=0")
    start(config, "generation.top_p=0.5", "trainer.max_epochs=null", "adapter.dropout=0")


@pytest.mark.parametrize("key", ODD_VALUES)
def test_an_odd_value_is_a_line_that_names_the_key(key, config):
    for value in ODD_VALUES[key]:
        with pytest.raises(Exception, match=key.rpartition(".")[2]) as raised:
            start(config, f"{key}={value}")
        assert isinstance(raised.value, DataError) or is_a_mistake(raised.value), value
        assert "\n" not in str(raised.value)
        assert key in str(raised.value) or key == "data.rows" or "model.config" in key


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "1", True, [1], 10**400])
def test_what_is_not_a_finite_number_in_bounds_is_refused(value):
    with pytest.raises(
        ValueError, match=r"^a\.b must be a number, 0 or more, at most 1, got "
    ) as error:
        check_number("a.b", value, least=0, most=1)
    assert len(str(error.value)) < 200


def test_bounds_are_stated_as_they_are_checked():
    check_number("a", 0, least=0, whole=True)
    check_number("a", None, above=0, optional=True)
    check_number("a", 0.5, above=0, below=1)
    for value in (0, 1, 2, -1):
        with pytest.raises(ValueError, match=f"a must be a number, above 0, below 1, got {value}"):
            check_number("a", value, above=0, below=1)
    with pytest.raises(ValueError, match=r"a must be a whole number, or null, got 1\.0"):
        check_number("a", 1.0, whole=True, optional=True)


def early_keys() -> list[str]:
    """Keys of `ODD_VALUES` that need no torch to be checked."""
    keys = []
    for key in ODD_VALUES:
        for group, checks in CHECKS.items():
            name = key.removeprefix(f"{group}.").partition(".")[0]
            if key.startswith(f"{group}.") and name in checks:
                keys.append(key)
    return keys


@pytest.mark.parametrize("key", ["seed", *early_keys()])
def test_an_odd_value_is_refused_before_torch_is_imported(key, config):
    changed = deepcopy(config)
    [override] = OverridesParser.create().parse_overrides([f"{key}={ODD_VALUES[key][0]}"])
    OmegaConf.update(changed, key, override.value())
    with pytest.raises(ValueError, match=f"^{re.escape(key)}"):
        check_values(changed)


def test_early_stopping_is_checked_under_any_name(config):
    changed = deepcopy(config)
    changed.callbacks.mine = {**changed.callbacks.early_stopping, "patience": -1}
    with pytest.raises(ValueError, match=r"^callbacks\.mine\.patience must be a whole number"):
        check_values(changed)


def with_fp8(config, adapter):
    """A copy of `config` with speed=fp8 and this adapter."""
    changed = deepcopy(config)
    changed.speed.float8 = True
    changed.adapter = compose_config("train", f"adapter={adapter}").adapter
    return changed


@pytest.mark.parametrize("adapter", ["full", "qlora"])
def test_fp8_is_refused_before_rows_are_read_if_no_layer_can_use_it(adapter, config):
    with pytest.raises(ValueError, match=r"^speed\.float8=true.* use adapter=lora$"):
        check_values(with_fp8(config, adapter))


@pytest.mark.parametrize("adapter", ["lora", "freeze_vision"])
def test_fp8_is_for_adapters_with_frozen_layers(adapter, config):
    check_values(with_fp8(config, adapter))


def test_settings_of_classes_of_the_user_are_their_own(config):
    changed = deepcopy(config)
    changed.optim = {"_target_": "mine.Lion", "lr": "auto"}
    check_values(changed)


def test_every_check_is_for_a_key_of_the_package():
    choices = ("data=jsonl", "adapter=lora", "optim=adamw", "callbacks=[train,early_stopping]")
    config = compose_config("train", *choices)
    served = OmegaConf.load(config_folder() / "serve.yaml")
    absent = []
    for group, checks in CHECKS.items():
        node = OmegaConf.select(served if group in served else config, group)
        absent += [f"{group}.{name}" for name in checks if name not in node]
    # Of other datasets, and an argument that conf/ leaves at its default
    assert absent == ["data.order", "optim.seed"]


def test_a_key_that_a_class_does_not_take_is_named():
    config = compose_config("train", "+generation.beams=3")
    with pytest.raises(ValueError, match=r"unexpected keyword argument 'beams'; leave out this"):
        build.generation(config)
