"""The memory of a large parquet file, as scripts/bench_data.py measures it."""

import bench_data
import pytest


@pytest.mark.slow  # a process of its own, which imports torch
def test_memory_does_not_grow_with_the_rows_of_a_parquet_file(tmp_path):
    few = bench_data.measure_memory(tmp_path, 50_000)["rss_growth_mb"]
    many = bench_data.measure_memory(tmp_path, 200_000)["rss_growth_mb"]
    assert many < 60
    assert many - few < 10  # 36 MB of text
