"""Metrics: `update` takes a batch of `types.Prediction`, `compute` returns one score."""
