"""Evaluation by the `test` command: test sets, benchmarks with published scores, comparisons."""
