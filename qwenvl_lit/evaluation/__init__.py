"""Evaluation for the `test` and `export` commands.

The modules read test sets and benchmarks, and compare exported models with their runs.
"""
