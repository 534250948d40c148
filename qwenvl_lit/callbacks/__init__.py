"""What a run writes, draws and prints besides its checkpoints: Lightning callbacks, and the pure functions behind them."""
