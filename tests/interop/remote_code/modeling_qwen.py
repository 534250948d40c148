"""Stands in for the published file of this name: the same modules and the same values.

Only for texts up to `seq_length`, one row, and without a cache.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, silu
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_qwen import QWenConfig
from .visual import VisionTransformer


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (x.float() * scale).type_as(x) * self.weight


def rotated(x, angles):
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()


class QWenAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.kv_channels
        self.base = config.rotary_emb_base
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x):
        heads = (part.unflatten(-1, (-1, self.head_dim)) for part in self.c_attn(x).chunk(3, -1))
        query, key, value = (part.transpose(1, 2) for part in heads)
        powers = torch.arange(0, self.head_dim, 2).float() / self.head_dim
        angles = torch.outer(torch.arange(x.shape[1]).float(), 1 / self.base**powers)
        angles = torch.cat((angles, angles), dim=-1)
        scores = rotated(query, angles) @ rotated(key, angles).mT / self.head_dim**0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
        return self.c_proj((weights @ value).transpose(1, 2).flatten(2))


class QWenMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, hidden, bias=False)
        self.w2 = nn.Linear(config.hidden_size, hidden, bias=False)
        self.c_proj = nn.Linear(hidden, config.hidden_size, bias=False)

    def forward(self, x):
        return self.c_proj(self.w1(x) * silu(self.w2(x)))


class QWenBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class QWenModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.start = config.visual["image_start_id"]
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList([QWenBlock(config) for _ in range(config.num_hidden_layers)])
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.visual = VisionTransformer(**config.visual)

    def get_input_embeddings(self):
        return self.wte

    def forward(self, ids):
        x = self.wte(ids)
        spans = []
        for first in (ids[0] == self.start).nonzero().flatten().tolist():
            last = first + ids[0, first:].tolist().index(self.start + 1)
            path = [byte for byte in ids[0, first + 1 : last].tolist() if byte != self.start + 2]
            spans.append((first + 1, last, bytes(path).decode()))
        if spans:
            images = self.visual.encode([path for _, _, path in spans])
            x = x.clone()
            for (first, last, _), image in zip(spans, images):  # noqa: B905
                x[0, first:last] = image
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class QWenLMHeadModel(PreTrainedModel):
    config_class = QWenConfig
    base_model_prefix = "transformer"

    def __init__(self, config):
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.transformer(input_ids))
        loss = None
        if labels is not None:
            loss = cross_entropy(logits[0, :-1], labels[0, 1:])
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids, **kwargs}
