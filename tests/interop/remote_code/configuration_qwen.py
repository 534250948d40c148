"""Stands in for the published file of this name: keeps every setting of `config.json`."""

from transformers import PretrainedConfig


class QWenConfig(PretrainedConfig):
    model_type = "qwen"
