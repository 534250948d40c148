import json
import sys
import time

import bench_train
import pytest
import training_rows
from bench_train import Bench, Record, figures, follow, judged
from hydra import compose, initialize_config_dir
from plot_train import draw, limits
from training_cases import CASES, GROUPS

from qwenvl_lit.cli.command import config_folder
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily

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
    """Of a run that logs every second step, the first of which is slow."""
    fixed = {
        "tokens_per_second": 1.0,
        "supervised_tokens_per_second": 1.0,
        "padding_share": 0.25,
        "waiting_share": 0.0,
    }
    fixed |= {"loss": 1.0, "mfu": 0.5, "tflop_per_second": 400.0}
    steps = [1, *range(2, 15, 2)]
    lines = zip(steps, [0.1, 0.2, *rates], strict=True)
    return [
        {
            "step": step,
            "elapsed_s": 9.0 + step,
            "samples_per_second": rate,
            "compilations": step > 1,
            **fixed,
        }
        for step, rate in lines
    ]


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
    record.write_text(
        json.dumps(
            {
                "results": [
                    {"case": "lora", "what": "before", "device": "other", "samples_per_second": 4.5}
                ]
            }
        )
    )
    options = [
        "--size",
        "small",
        "--device",
        "cpu",
        "--steps",
        "6",
        "--workers",
        "0",
        "--images",
        "6",
        "--work",
        str(tmp_path / "work"),
    ]
    cases = ["--cases", "mixed_8192", "cached_bf16_16", "fp8_16", "lora", "--only-missing"]
    monkeypatch.setattr(
        sys,
        "argv",
        ["bench_train.py", *options, *cases, "--record", str(record), "--plot", str(plot)],
    )
    monkeypatch.delenv("QWENVL_LIT_CACHE", raising=False)
    bench_train.main()

    written = json.loads(record.read_text())
    assert written["ceilings"]["cpu"]["matmul_tflops"] > 0
    results = {one["case"]: one for one in written["results"]}
    assert list(results) == list(CASES)
    for name in ("mixed_8192", "cached_bf16_16"):
        one = results[name]
        assert one["steps"] == len(one["samples_per_second_of_windows"]) == 6
        assert (
            min(one["samples_per_second_of_windows"])
            <= one["samples_per_second"]
            <= max(one["samples_per_second_of_windows"])
        )
        assert one["losses_finite"]
        assert one["start_s"] > one["first_step_s"] >= 0  # in tenths
        assert one["share_of_matmul"] > 0
    assert 0.9 < results["mixed_8192"]["real_share"] <= 1
    assert results["cached_bf16_16"]["supervised_tokens_per_second"] == pytest.approx(
        16 * results["cached_bf16_16"]["samples_per_second"], rel=0.01
    )
    assert results["cached_bf16_16"]["vision_pass_s"] > 0
    assert results["fp8_16"]["not_measured"] == "it needs a GPU"
    assert results["lora"]["what"] == "before"
    assert (
        results["bf16_16"]["measure_with"]
        == f"python scripts/bench_train.py --record {record} --size small --device cpu --cases bf16_16"
    )
    assert plot.stat().st_size > 10_000


def test_rates_are_medians_over_the_windows_after_the_warm_up():
    found = figures(log_of([40, 41, 42, 43, 44, 1000]), MACHINE)
    assert found["steps"] == 12
    assert found["samples_per_second"] == 42.5
    assert found["samples_per_second_of_windows"] == [40, 41, 42, 43, 44, 1000]
    assert (found["real_share"], found["share_of_matmul"]) == (0.75, 0.5)
    assert found["compilations"] == {"warm_up": 1, "later": 0}


def test_a_loss_that_is_not_finite_is_told():
    log = log_of([40] * 6)
    log[3]["loss"] = None  # as the log of a run writes it
    assert not figures(log, MACHINE)["losses_finite"]


def test_what_is_asked_stands_beside_what_was_found():
    one_card = {name: result_of(name) for name in ("bf16_16", "pair_1")}
    results = judged({**one_card, "pair_2": result_of("pair_2", samples_per_second=85.0)})
    assert results["bf16_16"]["targets"] == {
        "samples_per_second": {"at_least": 42, "found": 42.5, "met": True},
        "share_of_matmul": {"at_least": 0.67, "found": 0.5, "met": False},
    }
    assert results["pair_2"]["targets"] == {
        "times_one_card": {"at_least": 1.9, "found": 2.0, "met": True}
    }
    elsewhere = judged(
        {"pair_1": result_of("pair_1", device="NVIDIA H200"), "pair_2": result_of("pair_2")}
    )
    assert elsewhere["pair_2"]["targets"]["times_one_card"] == {
        "at_least": 1.9,
        "found": None,
        "met": False,
    }


def test_what_failed_does_not_replace_what_was_measured(tmp_path):
    file = tmp_path / "train.json"
    record = Record(file, bench(tmp_path))
    record.add(result_of("bf16_16"))
    record.add({"case": "bf16_16", "what": "", "failed": "out of memory"})
    record.add({"case": "bf16_8", "what": "", "failed": "out of memory"})
    again = {one["case"]: one for one in Record(file, bench(tmp_path)).content()["results"]}
    assert again["bf16_16"]["samples_per_second"] == 42.5
    assert again["bf16_8"]["not_measured"]


def test_a_case_for_which_there_is_no_time_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_train, "ceilings", lambda device: MACHINE)
    monkeypatch.setattr(Bench, "write_rows", lambda self, cases: {})
    file = tmp_path / "train.json"
    bench_train.sweep(
        ["bf16_16", "fp8_16"], bench(tmp_path), Record(file, bench(tmp_path)), limit_s=30
    )
    assert capsys.readouterr().out.count("not measured: 30 s were left, it takes about") == 2


def test_a_process_that_takes_too_long_is_ended_with_what_it_started():
    script = "import subprocess, sys; print('begun'); subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.perf_counter()
    ran = follow([sys.executable, "-c", script], limit_s=2)
    assert time.perf_counter() - start < 20
    assert ran.code == -9
    assert ran.when("begun") < 2
    assert ran.when("ended") is None


def test_rows_have_the_lengths_that_they_are_measured_with(tmp_path):
    processor = QwenVLFamily(
        path="Qwen/Qwen-VL-Chat", weights="random", vocabulary="tiny"
    ).processor()
    images = training_rows.write_images(tmp_path, 3)
    training_rows.write_even(tmp_path / "even.jsonl", images, 5, training_rows.FULL, processor)
    assert {processor.length(row) for row in read_rows(str(tmp_path / "even.jsonl"))} == {(320, 16)}
    total = training_rows.write_mixed(
        tmp_path / "mixed.jsonl", images, 60, training_rows.FULL, processor
    )
    rows = list(read_rows(str(tmp_path / "mixed.jsonl")))
    lengths = [processor.length(row) for row in rows]
    assert sum(tokens for tokens, _ in lengths) == total
    assert all(32 <= tokens <= 1500 and learned == 12 for tokens, learned in lengths)
    assert {len(row.images) for row in rows} == {0, 1, 2, 3, 4}


def test_every_case_is_in_one_group_and_has_windows_of_whole_steps():
    assert [name for group in GROUPS.values() for name in group] == list(CASES)
    assert all(case.steps % bench_train.WINDOWS == 0 for case in CASES.values())


def test_the_command_of_every_case_is_one_that_train_knows(tmp_path):
    with initialize_config_dir(str(config_folder()), version_base=None):
        for name, case in CASES.items():
            config = compose("train", [*bench(tmp_path).arguments(case), "data.train=rows.jsonl"])
            assert config.trainer.get("devices") == case.cards, name
            assert (
                config.trainer.max_steps * case.accumulate
                == config.callbacks.throughput.window * (bench_train.WINDOWS + 1)
            ), name
            assert config.speed.float8 == name.count("fp8"), name
            assert config.speed.vision_cache == name.startswith("cached"), name


def test_the_plot_has_the_limits_of_the_machine(tmp_path):
    found = limits({"NVIDIA H100 80GB HBM3": MACHINE, "cpu": {**MACHINE, "device": "cpu"}})
    assert {name: round(value, 1) for name, value in found.items()} == {
        "limit of NVIDIA H100 80GB HBM3: bf16, vision included": 64.0,
        "limit of NVIDIA H100 80GB HBM3: bf16, vision cached": 95.2,
    }
    draw(
        {
            "model": "any",
            "results": [result_of("bf16_16")],
            "ceilings": {"NVIDIA H100 80GB HBM3": MACHINE},
        },
        tmp_path / "train.png",
    )
    assert (tmp_path / "train.png").stat().st_size > 10_000
