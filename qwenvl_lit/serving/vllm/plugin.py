"""Registers Qwen-VL with vLLM.

vLLM calls `register` in each of its processes, whatever model they serve. The model, tokenizer and
renderer are registered by name: importing them here would load the layers in all processes.
"""

from __future__ import annotations

ARCHITECTURE = "QWenLMHeadModel"
PACKAGE = __name__.rpartition(".")[0]


def register() -> None:
    """Makes vLLM load folders of Qwen-VL. Several calls have the effect of one."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from qwenvl_lit.models.qwen_vl.config import QwenVLConfig
    from qwenvl_lit.serving.vllm.engine_args import TOKENIZER_MODE, prepare_engine_args

    if TOKENIZER_MODE in TokenizerRegistry.tokenizers:
        return
    AutoConfig.register(QwenVLConfig.model_type, QwenVLConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"{PACKAGE}.model:QwenVLForServing")
    TokenizerRegistry.register(TOKENIZER_MODE, f"{PACKAGE}.tokenizer", "Tokenizer")
    RENDERER_REGISTRY.register(TOKENIZER_MODE, f"{PACKAGE}.renderer", "Renderer")
    prepare_engine_args()
