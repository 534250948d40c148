"""Compares this package with results of the original programs.

`scripts/check_golden.py` prints the comparison.
"""
