"""The cores of a container, and threads that do not spin on a busy machine."""

import math
import os

import pytest

from qwenvl_lit import cores


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, math.inf),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
    ],
)
def test_a_quota_limits_the_cores(files, quota, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores._quota(tmp_path) == quota
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    assert cores.available_cores() == max(1, min(64, math.ceil(min(quota, 64))))


@pytest.mark.parametrize("name", [None, *cores.WAIT_SETTINGS])
def test_threads_sleep_soon_unless_the_environment_says_otherwise(name, monkeypatch):
    for setting in cores.WAIT_SETTINGS:
        monkeypatch.delenv(setting, raising=False)
    if name:
        monkeypatch.setenv(name, "ACTIVE")
    cores.limit_spinning()
    assert os.environ.get("GOMP_SPINCOUNT") == {None: "1000", "GOMP_SPINCOUNT": "ACTIVE"}.get(name)
    os.environ.pop("GOMP_SPINCOUNT", None)
