"""The bench of decoding, at a small size."""

import json
import sys

import bench_generate
import pytest


@pytest.mark.parametrize("model", ["qwen_vl_chat", "qwen3_vl_8b"])
def test_decoding_is_measured_through_the_entry_point(model, tmp_path, monkeypatch):
    file = tmp_path / "generate.json"
    monkeypatch.setattr(bench_generate, "NEW", 16)
    arguments = f"bench --model {model} --size small --device cpu --dtype float32 --sizes 1 2"
    monkeypatch.setattr(sys, "argv", [*arguments.split(), "--record", str(file)])
    bench_generate.main()
    record = json.loads(file.read_text())
    assert [measured["rows"] for measured in record["decoding"]] == [1, 2]
    assert all(measured["tokens_per_s_with_prefill"] > 0 for measured in record["decoding"])
    assert record["together_and_one_by_one"]["same_answer"] == 1
