"""The language model of Qwen-VL, built of vLLM's parallel layers and its attention."""

# T tokens of all requests of a step, D width, H heads of this rank, K head width

from __future__ import annotations

from itertools import islice

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import make_empty_intermediate_tensors_factory, make_layers
from vllm.sequence import IntermediateTensors

from qwenvl_lit.models.qwen_vl.config import QwenVLConfig
from qwenvl_lit.models.qwen_vl.language import rotary_tables_at, rotate

PLACE_BITS = 20  # of a position; the bits above are alpha, see `place_and_alpha`


def packed_positions(length: int, alpha: int) -> tuple[torch.Tensor, int]:
    """Returns the positions (T,) of a prompt, and what to add to the index of later tokens.

    Dynamic NTK gives each prompt an alpha of its own, by its length. vLLM passes nothing else per
    token than positions, so that they carry alpha, too.

    >>> packed_positions(2, alpha=3)[0].tolist() == [3 << 20, (3 << 20) + 1]
    True
    """
    offset = alpha << PLACE_BITS
    return torch.arange(length) + offset, offset


def place_and_alpha(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the indices of tokens (T,) and their alpha, from plain or packed positions.

    Plain positions have alpha 1.
    """
    return positions & ((1 << PLACE_BITS) - 1), (positions >> PLACE_BITS).clamp(min=1)


class ServedAttention(nn.Module):
    """Causal self-attention with vLLM's paged cache, (T, D) -> (T, D)."""

    def __init__(
        self,
        config: QwenVLConfig,
        cache: CacheConfig | None,
        quantization: QuantizationConfig | None,
        prefix: str,
    ):
        super().__init__()
        self.heads = config.num_attention_heads // get_tensor_model_parallel_world_size()
        self.c_attn = QKVParallelLinear(
            config.hidden_size,
            config.kv_channels,
            config.num_attention_heads,
            bias=True,
            quant_config=quantization,
            prefix=f"{prefix}.c_attn",
        )
        self.c_proj = RowParallelLinear(
            config.hidden_size,
            config.hidden_size,
            bias=False,
            quant_config=quantization,
            prefix=f"{prefix}.c_proj",
        )
        self.attn = Attention(
            self.heads,
            config.kv_channels,
            config.kv_channels**-0.5,
            cache_config=cache,
            quant_config=quantization,
            prefix=f"{prefix}.attn",
        )

    def forward(
        self, x_TD: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        qkv_T3HK = self.c_attn(x_TD)[0].unflatten(-1, (3, self.heads, -1))
        q_THK, k_THK = rotate(qkv_T3HK[None, :, :2], *rotary)[0].unbind(1)
        attended = self.attn(q_THK.flatten(1), k_THK.flatten(1), qkv_T3HK[:, 2].flatten(1))
        return self.c_proj(attended)[0]


class ServedMLP(nn.Module):
    """Gated MLP, (T, D) -> (T, D). `w2` computes the gate, and is the first half of both."""

    def __init__(self, config: QwenVLConfig, quantization: QuantizationConfig | None, prefix: str):
        super().__init__()
        branch = config.intermediate_size // 2
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [branch, branch],
            bias=False,
            quant_config=quantization,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.c_proj = RowParallelLinear(
            branch,
            config.hidden_size,
            bias=False,
            quant_config=quantization,
            prefix=f"{prefix}.c_proj",
        )
        self.activation = SiluAndMul()

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.activation(self.gate_up_proj(x_TD)[0]))[0]


class ServedBlock(nn.Module):
    """Pre-norm decoder block, (T, D) -> (T, D)."""

    def __init__(
        self,
        config: QwenVLConfig,
        cache: CacheConfig | None,
        quantization: QuantizationConfig | None,
        prefix: str,
    ):
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = ServedAttention(config, cache, quantization, f"{prefix}.attn")
        self.ln_2 = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = ServedMLP(config, quantization, f"{prefix}.mlp")

    def forward(
        self, x_TD: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        x_TD = x_TD + self.attn(self.ln_1(x_TD), rotary)
        return x_TD + self.mlp(self.ln_2(x_TD))


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": 0,
        "positions": -1,
        "intermediate_tensors": 0,
        "inputs_embeds": 0,
    }
)
class ServedLanguage(nn.Module):
    """The decoder blocks of this pipeline stage."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: QwenVLConfig = vllm_config.model_config.hf_config
        self.config = config
        self.wte = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.wte"
        )

        def block(prefix: str) -> ServedBlock:
            return ServedBlock(config, vllm_config.cache_config, vllm_config.quant_config, prefix)

        self.first, self.end, self.h = make_layers(
            config.num_hidden_layers, block, prefix=f"{prefix}.h"
        )
        self.ln_f = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["x"], config.hidden_size
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Computes the blocks.

        Args:
            positions: (T,), or (3, T) with equal rows if prompts may be longer than in training.
            intermediate_tensors: the result of the previous pipeline stage.
        """
        if not get_pp_group().is_first_rank:
            x_TD = intermediate_tensors["x"]
        elif inputs_embeds is None:
            x_TD = self.wte(input_ids)
        else:
            x_TD = inputs_embeds
        rotary = self._rotary(positions[0] if positions.ndim == 2 else positions)
        for block in islice(self.h, self.first, self.end):
            x_TD = block(x_TD, rotary)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"x": x_TD})
        return self.ln_f(x_TD)

    def _rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the rotary tables of all layers, by the alpha of each token."""
        config = self.config
        places, alpha = place_and_alpha(positions)
        half = config.kv_channels // 2
        exponent = config.kv_channels / (config.kv_channels - 2)
        base_T = config.rotary_emb_base * alpha.float() ** exponent
        steps = torch.arange(half, device=positions.device, dtype=torch.float32) / half
        frequencies = (1 / base_T[:, None] ** steps)[None, :, None, None]
        logn_above = config.seq_length if config.use_logn_attn else None
        return rotary_tables_at(places[None], frequencies, logn_above=logn_above)
