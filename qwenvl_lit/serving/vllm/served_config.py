"""The configuration of Qwen-VL in vLLM: stop ids, defaults of requests, length of prompts."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger

from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.models.quantized_files import read_gptq
from qwenvl_lit.models.qwen_vl.checkpoint import read_network_config
from qwenvl_lit.models.qwen_vl.config import QwenVLConfig
from qwenvl_lit.serving.vllm.folder import (
    default_generation,
    processor_of,
    sampling_defaults,
    small_files,
)

# Environment variables of vLLM, which its child processes read, too
ALLOW_LONG = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
USE_V2_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
# Settings of `Generation` that a server of vLLM has no default for, and their neutral values
WITHOUT_DEFAULT = {"num_beams": 1, "min_new_tokens": 0, "seed": None}

logger = init_logger(__name__)


class ServedModelConfig(ModelConfig):
    """vLLM's description of a model, with the stop ids and the defaults of Qwen-VL's folders."""

    def try_get_generation_config(self) -> dict[str, Any]:
        """Returns the settings of generation_config.json, with all ids that end an answer."""
        folder = small_files(self.model, self.revision)
        ends = list(processor_of(folder).stop_ids)
        for word in default_generation(folder).stop_words_ids:
            ends += word  # of one token, see `check_generation`
        return {**super().try_get_generation_config(), "eos_token_id": ends}

    def get_diff_sampling_param(self) -> dict[str, Any]:
        """Returns the defaults of requests: those of qwenvl_lit.json, or else greedy decoding.

        The published generation_config.json asks for sampling. It is used only if
        `--generation-config` names its folder.
        """
        if self.generation_config != "auto":
            return super().get_diff_sampling_param()
        given = dict(self.override_generation_config)
        if "max_new_tokens" in given:
            given["max_tokens"] = given.pop("max_new_tokens")
        defaults = default_generation(small_files(self.model, self.revision))
        return sampling_defaults(defaults) | given


def create_served_config(
    args: EngineArgs, create: Callable[[EngineArgs], ModelConfig]
) -> ServedModelConfig:
    """Returns the configuration of the model that `args` name, and completes `args`.

    Args:
        create: vLLM's own method.

    Raises:
        ValueError: the folder is none of Qwen-VL or damaged, or an argument is not possible.
    """
    folder = small_files(args.model, args.revision)
    config = read_network_config(folder)
    if read_gptq(folder, args.model):
        raise ValueError(
            f"{folder}: the weights are quantized with GPTQ, which is not supported with vLLM; "
            f"export the model first: python -m qwenvl_lit.export model=qwen_vl_chat "
            f"model.path={args.model} out=FOLDER"
        )
    if config.tie_word_embeddings:
        raise ValueError(f"{folder}: tie_word_embeddings=true is not supported with vLLM")
    check_generation(default_generation(folder))
    processor_of(folder)  # raises errors of its settings before weights are loaded
    if args.allowed_local_media_path:
        raise ValueError(
            "--allowed-local-media-path is not supported for Qwen-VL: clients send images as data "
            "URIs, or as addresses of --allowed-media-domains"
        )
    # No backend for structured outputs knows our tokenizer. This one says so, with status 400, and
    # the others fail in the engine.
    args.structured_outputs_config.backend = "guidance"
    is_longer = _is_longer_than_training(args, config)
    model_config = create(args)
    if is_longer and config.use_dynamic_ntk:
        model_config.hf_config.rope_parameters = {
            "rope_type": "default",
            "rope_theta": config.rotary_emb_base,
            "mrope_section": [config.kv_channels // 2, 0, 0],  # see `language.packed_positions`
        }
    # vLLM builds `ModelConfig` only. The subclass has no fields of its own.
    object.__setattr__(model_config, "__class__", ServedModelConfig)
    return model_config


def _is_longer_than_training(args: EngineArgs, config: QwenVLConfig) -> bool:
    """Returns whether prompts may be longer than those of training, and prepares for that.

    Raises:
        ValueError: they may be longer than the model supports, or prefix caching is on.
    """
    asked = args.max_model_len
    if asked is None or asked <= config.seq_length:
        return False
    if asked > config.max_position_embeddings:
        raise ValueError(
            f"--max-model-len {asked} is more than the model supports: it has "
            f"max_position_embeddings={config.max_position_embeddings}"
        )
    os.environ[ALLOW_LONG] = "1"
    if config.use_dynamic_ntk:
        if args.enable_prefix_caching:
            raise ValueError(
                f"--enable-prefix-caching is not possible with --max-model-len {asked}: above "
                f"{config.seq_length} tokens, keys depend on the length of the whole prompt"
            )
        args.enable_prefix_caching = False
        # The second version computes the positions of a preempted request from the prompt and the
        # answer so far. The alpha would be that of a longer prompt.
        os.environ.setdefault(USE_V2_RUNNER, "0")
    return True


def check_generation(generation: Generation) -> None:
    """Warns of settings of qwenvl_lit.json that have no counterpart in vLLM.

    Raises:
        ValueError: an answer ends with a word of several tokens.
    """
    if any(len(word) > 1 for word in generation.stop_words_ids):
        raise ValueError(
            "generation.stop_words_ids of qwenvl_lit.json has words of several tokens; vLLM knows "
            "only single tokens: remove them, and let requests send `stop`"
        )
    unused = []
    for name, neutral in WITHOUT_DEFAULT.items():
        if getattr(generation, name) != neutral:
            unused.append(f"{name}={getattr(generation, name)}")
    if unused:
        logger.warning("Not used from qwenvl_lit.json: generation.%s", ", ".join(unused))
