import json
import sys
import time

import bench_train
import pytest
import training_rows
from bench_train import Bench, Record, follow, written_versions
from hydra import compose, initialize_config_dir
from plot_train import draw, limits
from training_cases import CASES, GROUPS
from training_results import WINDOWS, figures, judge, summary

from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.runs.run import config_folder
from qwenvl_lit.runs.versions import save_versions, versions

MACHINE = {
    "device": "NVIDIA H100 80GB HBM3",
    "torch": "2.11.0",
    "matmul_tflops": 800.0,
    "fp8_matmul_tflops": None,
}


def bench(folder, **options) -> Bench:
    fixed = {
        "size": "full",
        "device": "cuda",
        "checkpoint": None,
        "workers": 8,
        "images": 10,
        "steps": None,
        "extra": (),
    }
    return Bench(**{**fixed, "work": folder, **options})


def log_of(rates):
    """The log of a run that logs every second step, and whose first step is slow."""
    fixed = {
        "tokens_per_second": 1.0,
        "supervised_tokens_per_second": 1.0,
        "padding_share": 0.25,
        "waiting_share": 0.0,
        "loss": 1.0,
        "mfu": 0.5,
        "tflop_per_second": 400.0,
    }
    log = []
    for step, rate in zip([1, *range(2, 15, 2)], [0.1, 0.2, *rates], strict=True):
        line = {"step": step, "elapsed_s": 9.0 + step, "samples_per_second": rate}
        log.append({**line, "compilations": step > 1, **fixed})
    return log


def result_of(name, **changes):
    return {
        "case": name,
        "what": name,
        "device": MACHINE["device"],
        **figures(log_of([40, 41, 42, 43, 44, 45]), MACHINE),
        **changes,
    }


def test_two_cases_are_measured_through_the_entry_point(tmp_path, monkeypatch):
    record, plot = tmp_path / "train.json", tmp_path / "train.png"
    before = {"case": "lora", "what": "before", "device": "other", "samples_per_second": 4.5}
    record.write_text(json.dumps({"results": [before]}))
    command = (
        "bench_train.py --size small --device cpu --steps 6 --workers 0 --images 6 "
        f"--work {tmp_path / 'work'} --record {record} --plot {plot} --only-missing "
        "--cases mixed_8192 cached_bf16_16 fp8_16 lora"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.delenv("QWENVL_LIT_CACHE", raising=False)
    bench_train.main()

    written = json.loads(record.read_text())
    assert written["ceilings"]["cpu"]["matmul_tflops"] > 0
    results = {result["case"]: result for result in written["results"]}
    assert list(results) == list(CASES)
    for name in ("mixed_8192", "cached_bf16_16"):
        result = results[name]
        rates = result["samples_per_second_of_windows"]
        assert result["steps"] == len(rates) == 6
        assert min(rates) <= result["samples_per_second"] <= max(rates)
        assert result["losses_finite"]
        assert result["start_s"] > result["first_step_s"] >= 0  # in tenths
        assert result["share_of_matmul"] > 0
    assert 0.9 < results["mixed_8192"]["real_share"] <= 1
    cached = results["cached_bf16_16"]
    supervised = pytest.approx(16 * cached["samples_per_second"], rel=0.01)
    assert cached["supervised_tokens_per_second"] == supervised
    assert 0 <= cached["vision_pass_s"] <= cached["start_s"]  # in tenths
    assert results["fp8_16"]["not_measured"] == "it needs a GPU"
    assert results["lora"]["what"] == "before"
    again = "python scripts/bench_train.py --record benchmarks/train.json --size small --device cpu"
    assert results["bf16_16"]["measure_with"] == f"{again} --cases bf16_16"
    assert plot.stat().st_size > 10_000


def test_rates_are_medians_over_the_windows_after_the_warm_up():
    result = figures(log_of([40, 41, 42, 43, 44, 1000]), MACHINE)
    assert result["steps"] == 12
    assert result["samples_per_second"] == 42.5
    assert result["samples_per_second_of_windows"] == [40, 41, 42, 43, 44, 1000]
    assert (result["real_share"], result["share_of_matmul"]) == (0.75, 0.5)
    assert result["compilations"] == {"warm_up": 1, "later": 0}


def test_a_non_finite_loss_is_recorded():
    log = log_of([40] * 6)
    log[3]["loss"] = None  # as the log of a run writes it
    assert not figures(log, MACHINE)["losses_finite"]


def test_results_are_compared_with_their_targets_and_twins():
    one_gpu = {name: result_of(name) for name in ("bf16_16", "pair_1")}
    results = judge({**one_gpu, "pair_2": result_of("pair_2", samples_per_second=85.0)})
    assert results["bf16_16"]["targets"] == {
        "samples_per_second": {"at_least": 42, "found": 42.5, "met": True},
        "share_of_matmul": {"at_least": 0.67, "found": 0.5, "met": False},
    }
    assert results["pair_2"]["targets"] == {
        "times_one_card": {"at_least": 1.9, "found": 2.0, "met": True}
    }
    assert summary(results["bf16_16"]).endswith("samples_per_second met  share_of_matmul MISSED")
    on_another_gpu = result_of("pair_1", device="NVIDIA H200")
    results = judge({"pair_1": on_another_gpu, "pair_2": result_of("pair_2")})
    target = results["pair_2"]["targets"]["times_one_card"]
    assert target == {"at_least": 1.9, "found": None, "met": False}


def test_a_failure_does_not_replace_figures(tmp_path):
    file = tmp_path / "train.json"
    record = Record(file, bench(tmp_path))
    record.add(result_of("bf16_16"))
    record.add({"case": "bf16_16", "what": "", "failed": "out of memory"})
    record.add({"case": "bf16_8", "what": "", "failed": "out of memory"})
    stored = {}
    for result in Record(file, bench(tmp_path)).content()["results"]:
        stored[result["case"]] = result
    assert stored["bf16_16"]["samples_per_second"] == 42.5
    assert stored["bf16_8"]["not_measured"]


def test_a_case_that_would_take_too_long_is_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_train, "ceilings", lambda device: MACHINE)
    monkeypatch.setattr(Bench, "write_rows", lambda self, cases: {})
    file = tmp_path / "train.json"
    record = Record(file, bench(tmp_path))
    bench_train.sweep(["bf16_16", "fp8_16"], bench(tmp_path), record, limit_s=30)
    assert capsys.readouterr().out.count("not measured: 30 s were left, it takes about") == 2


def test_a_process_that_takes_too_long_is_killed_with_its_children():
    child = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    script = f"import subprocess, sys; print('begun'); subprocess.run({child})"
    start = time.perf_counter()
    process = follow([sys.executable, "-c", script], limit_s=2)
    assert time.perf_counter() - start < 20
    assert process.code == -9
    assert process.time_of("begun") < 2
    assert process.time_of("ended") is None


def test_rows_have_exact_lengths(tmp_path):
    family = QwenVLFamily(path="Qwen/Qwen-VL-Chat", weights="random", vocabulary="tiny")
    processor = family.processor()
    images = training_rows.write_images(tmp_path, 3)
    even, mixed, full = tmp_path / "even.jsonl", tmp_path / "mixed.jsonl", training_rows.FULL
    training_rows.write_even(even, images, 5, full, processor)
    assert {processor.length(row) for row in read_rows(str(even))} == {(320, 16, 256)}
    total = training_rows.write_mixed(mixed, images, 60, full, processor)
    rows = list(read_rows(str(mixed)))
    lengths = [processor.length(row) for row in rows]
    assert sum(length.tokens for length in lengths) == total
    assert all(32 <= length.tokens <= 1500 and length.supervised == 12 for length in lengths)
    assert {len(row.images) for row in rows} == {0, 1, 2, 3, 4}


def test_every_case_is_in_one_group_and_has_windows_of_whole_steps():
    assert [name for group in GROUPS.values() for name in group] == list(CASES)
    assert all(case.steps % WINDOWS == 0 for case in CASES.values())


def test_train_accepts_the_arguments_of_every_case(tmp_path):
    with initialize_config_dir(str(config_folder()), version_base=None):
        for name, case in CASES.items():
            config = compose("train", [*bench(tmp_path).arguments(case), "data.train=rows.jsonl"])
            assert config.trainer.get("devices") == case.gpus, name
            batches = config.trainer.max_steps * case.accumulate
            assert batches == config.callbacks.throughput.window * (WINDOWS + 1), name
            assert config.speed.float8 == name.count("fp8"), name
            assert config.speed.vision_cache == name.startswith("cached"), name


def test_the_plot_has_the_limits_of_the_machine(tmp_path):
    speeds = limits({"NVIDIA H100 80GB HBM3": MACHINE, "cpu": {**MACHINE, "device": "cpu"}})
    assert {name: round(value, 1) for name, value in speeds.items()} == {
        "limit of NVIDIA H100 80GB HBM3: bf16, vision included": 64.0,
        "limit of NVIDIA H100 80GB HBM3: bf16, vision cached": 95.2,
    }
    ceilings = {"NVIDIA H100 80GB HBM3": MACHINE}
    record = {"model": "any", "results": [result_of("bf16_16")], "ceilings": ceilings}
    draw(record, tmp_path / "train.png")
    assert (tmp_path / "train.png").stat().st_size > 10_000


def test_a_case_has_the_versions_that_its_run_wrote(tmp_path):
    assert written_versions(tmp_path) == {}, "the run failed before"
    save_versions(tmp_path)
    assert written_versions(tmp_path) == versions()
