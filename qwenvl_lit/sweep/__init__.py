"""Sweeps: several training runs with different values, compared in one table."""
