"""Comparisons with values that the original programs produced, by area; `check_golden.py` runs them over a folder."""
