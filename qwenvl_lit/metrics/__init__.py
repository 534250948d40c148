"""Scores of predictions: `update(predictions)` takes a batch of `types.Prediction`, `compute()` gives one number."""
