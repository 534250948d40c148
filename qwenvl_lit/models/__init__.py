"""The native Qwen-VL. It knows torch and transformers, and nothing else of this package.

The names are imported when they are first used: the tokenizer alone needs neither torch nor transformers.
"""

from importlib import import_module

_HOMES = {"QwenVLConfig": "config", "QwenVLForCausalLM": "qwen_vl"}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return sorted((*globals(), *_HOMES))
