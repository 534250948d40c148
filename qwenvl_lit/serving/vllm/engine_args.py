"""Completes the arguments of vLLM's engine for a folder of Qwen-VL.

vLLM chooses tokenizers by architecture from a list of its own, and has no hook for plugins there.
So `EngineArgs.create_model_config` is wrapped. Models of other types pass through unchanged, and
nothing is imported for them.
"""

from __future__ import annotations

from functools import wraps

from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from qwenvl_lit.models.qwen_vl.config import QwenVLConfig

TOKENIZER_MODE = "qwen_vl"  # the value of `--tokenizer-mode`


def prepare_engine_args() -> None:
    """Wraps `EngineArgs.create_model_config`."""
    create = EngineArgs.create_model_config

    @wraps(create)
    def create_model_config(args: EngineArgs) -> ModelConfig:
        if not _is_qwen(args):
            return create(args)
        from qwenvl_lit.serving.vllm.served_config import create_served_config

        args.tokenizer_mode = TOKENIZER_MODE
        return create_served_config(args, create)

    EngineArgs.create_model_config = create_model_config


def _is_qwen(args: EngineArgs) -> bool:
    """Returns whether the model is of Qwen or Qwen-VL, which have the same model type."""
    if args.tokenizer_mode not in ("auto", TOKENIZER_MODE):
        return False
    stored = get_hf_file_to_dict("config.json", args.model, args.revision) or {}
    return stored.get("model_type") == QwenVLConfig.model_type
