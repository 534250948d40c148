"""Fine-tune, run and score Qwen-VL on today's stack: a native network, a Lightning task, Hydra configs."""

__version__ = "0.1.0"
