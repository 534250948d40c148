"""Regular expressions of adapters, which may be a stranger's."""

import subprocess
import time

import pytest
from tiny import tiny_family

from qwenvl_lit.training.adapters import patterns
from qwenvl_lit.training.adapters.methods import LoRA
from qwenvl_lit.training.adapters.patterns import FORMS, check_speed, check_syntax

ENDLESS = "(.+)+[!]"
PATHS = [f"transformer.h.{number}.mlp.c_proj.with.a.long.name" for number in range(8)]
LISTS = ("layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern")


@pytest.mark.parametrize("name", FORMS)
def test_an_expression_that_never_ends_is_refused_in_every_setting(monkeypatch, name):
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    key = "adapter.targets" if name == "target_modules" else f"adapter.options.{name}"
    value = [ENDLESS] if name in LISTS else ENDLESS
    began = time.monotonic()
    with pytest.raises(ValueError, match=rf"^{key}=\(\.\+\)\+\[!\]: matching this expression"):
        check_speed({name: value}, PATHS)
    assert time.monotonic() - began < 20


def test_an_adapter_with_such_targets_is_refused_before_peft_matches_them(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    family = tiny_family()
    adapter = LoRA(rank=2, alpha=4, dropout=0, targets=ENDLESS)
    with pytest.raises(ValueError, match=r"^adapter\.targets=.* takes more than 1 s"):
        adapter.apply(family.meta_model(), family)


def test_usual_expressions_are_fast_and_names_are_not_tried(monkeypatch):
    usual = r"^(transformer.h)(?!.*(lm_head|output|emb|wte|shared)).*"
    check_speed({"target_modules": usual, "rank_pattern": {r".*\.0\.mlp\.w\d": 4}}, PATHS)
    monkeypatch.setattr(subprocess, "run", pytest.fail)
    check_speed({"target_modules": "all-linear", "rank_pattern": {"mlp.w1": 4}}, PATHS)
    check_speed({"target_modules": ["c_attn", "(.+)+"]}, PATHS)  # a list has endings of paths
    family = tiny_family()
    LoRA(rank=2, alpha=4, dropout=0, targets="attention").apply(family.meta_model(), family)


@pytest.mark.parametrize("pattern", ["(", "*a", "(" * 100_000])
def test_what_is_no_expression_is_named(pattern):
    with pytest.raises(ValueError, match=r"^adapter\.options\.rank_pattern=.* is not a regular"):
        check_syntax({"rank_pattern": {pattern: 4}})
