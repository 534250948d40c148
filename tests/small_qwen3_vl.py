"""Small networks of Qwen2.5-VL and Qwen3-VL with random weights, and prompts for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from qwenvl_lit.models.qwen3_vl.network import NETWORKS
from qwenvl_lit.models.qwen3_vl.positions import axis_positions
from qwenvl_lit.models.qwen3_vl.tower import tower_inputs

KINDS = ("qwen2_5_vl", "qwen3_vl")
IMAGE_PAD, VISION_START, VISION_END, PAD = 62, 60, 61, 0
MERGE = 2
CLOSE = {"atol": 1e-4, "rtol": 0}

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # large enough that every layer matters to the logits
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "temporal_patch_size": 2,
    "spatial_merge_size": MERGE,
    "initializer_range": 0.2,
}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def small_config(kind: str, **text_changes) -> PreTrainedConfig:
    text, vision = TEXT | text_changes, dict(VISION)
    if kind == "qwen2_5_vl":
        text["rope_parameters"] = dict(SECTIONS)
        # Windows of 2 x 2 tokens
        vision |= {"depth": 3, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
    else:
        text |= {"head_dim": 8, "rope_parameters": SECTIONS | {"mrope_interleaved": True}}
        vision |= {"depth": 3, "patch_size": 4, "num_position_embeddings": 16}
        vision["deepstack_visual_indexes"] = [0, 2]
    return AutoConfig.for_model(
        kind,
        image_token_id=IMAGE_PAD,
        video_token_id=63,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        text_config=text,
        vision_config=vision,
    )


def small_network(kind: str, seed: int = 0, **text_changes) -> nn.Module:
    """Random weights, biases included, in evaluation mode."""
    torch.manual_seed(seed)
    return randomized(NETWORKS[kind](small_config(kind, **text_changes)))


def original_network(network: nn.Module) -> nn.Module:
    """transformers' own network with the same weights."""
    config = type(network.config)(**network.config.to_dict())
    config._attn_implementation = "sdpa"
    original = type(network).__mro__[2](config).eval()
    original.load_state_dict(network.state_dict())
    return original


def randomized(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


@dataclass
class Prompt:
    """A text with images; the parts are numbers of text tokens, and sizes of images in tokens."""

    ids: list[int]
    sizes: list[tuple[int, int]]  # in patches
    spans: list[tuple[int, int, int]]  # for `axis_positions`
    pixels: torch.Tensor

    @property
    def image_positions(self) -> list[int]:
        return [index for index, token_id in enumerate(self.ids) if token_id == IMAGE_PAD]

    @property
    def positions(self) -> torch.Tensor:
        return axis_positions(len(self.ids), self.spans)

    @property
    def labels(self) -> list[int]:
        """The last three tokens are supervised."""
        return [-100] * (len(self.ids) - 3) + self.ids[-3:]


def prompt(*parts: int | tuple[int, int], seed: int = 0) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    sizes, spans, pixels = [], [], [torch.empty(0, 3 * 2 * 4 * 4)]
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(1, 60, (part,), generator=generator).tolist()
            continue
        height, width = part
        spans.append((len(ids) + 1, height, width))
        ids += [VISION_START, *[IMAGE_PAD] * (height * width), VISION_END]
        sizes.append((height * MERGE, width * MERGE))
        patches = height * width * MERGE**2
        pixels.append(torch.randn(patches, 3 * 2 * 4 * 4, generator=generator))
    return Prompt(ids, sizes, spans, torch.cat(pixels))


PROMPTS = (
    prompt(5, (2, 3), 6, seed=1),
    prompt(7, seed=2),
    prompt(2, (1, 1), 3, (4, 2), 5, seed=3),
    prompt((3, 5), 4, seed=4),
)


def vision_of(prompts: Sequence[Prompt], config: PreTrainedConfig) -> dict[str, Any]:
    sizes = [size for prompt in prompts for size in prompt.sizes]
    if not sizes:
        return {}
    pixels = torch.cat([prompt.pixels for prompt in prompts])
    return {"pixel_values": pixels, **tower_inputs(sizes, config.vision_config)}


def padded(
    prompts: Sequence[Prompt], config: PreTrainedConfig, *, side: str = "right"
) -> dict[str, Any]:
    """Arguments of `forward` for padded rows, with labels."""
    width = max(len(prompt.ids) for prompt in prompts)
    shape = len(prompts), width
    inputs = {
        "input_ids": torch.full(shape, PAD),
        "labels": torch.full(shape, -100),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "position_ids": torch.zeros(3, *shape, dtype=torch.int64),
    }
    image_positions = []
    for row, one in enumerate(prompts):
        start = width - len(one.ids) if side == "left" else 0
        columns = slice(start, start + len(one.ids))
        inputs["input_ids"][row, columns] = torch.tensor(one.ids)
        inputs["labels"][row, columns] = torch.tensor(one.labels)
        inputs["attention_mask"][row, columns] = 1
        inputs["position_ids"][:, row, columns] = one.positions
        image_positions += [row * width + start + index for index in one.image_positions]
    inputs |= vision_of(prompts, config)
    if image_positions:
        inputs["vision_positions"] = torch.tensor(image_positions)
    return inputs


def packed(prompts: Sequence[Prompt], config: PreTrainedConfig, padding: int = 3) -> dict[str, Any]:
    """Arguments of `forward` for one packed row with padding at its end, with labels."""
    lengths = [*(len(prompt.ids) for prompt in prompts), padding, 0]
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    ids, labels, image_positions = [], [], []
    for one in prompts:
        image_positions += [len(ids) + index for index in one.image_positions]
        ids += one.ids
        labels += one.labels
    positions = [one.positions for one in prompts] + [torch.zeros(3, padding, dtype=torch.int64)]
    inputs = {
        "input_ids": torch.tensor([ids + [PAD] * padding]),
        "labels": torch.tensor([labels + [-100] * padding]),
        "position_ids": torch.cat(positions, dim=1)[:, None],
        "cu_seq_lens_q": bounds,
        "max_length_q": max(lengths),
        **vision_of(prompts, config),
    }
    if image_positions:
        inputs["vision_positions"] = torch.tensor(image_positions)
    return inputs


def for_transformers(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of padded rows for transformers' own `forward`, which finds the positions."""
    names = ("input_ids", "labels", "attention_mask", "pixel_values")
    others = {name: inputs[name] for name in names if name in inputs}
    others["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_PAD).int()
    if "image_sizes" in inputs:
        others["image_grid_thw"] = torch.tensor([(1, *size) for size in inputs["image_sizes"]])
    return others


def with_targets(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the positions whose successors are supervised."""
    predicts = torch.zeros_like(inputs["labels"], dtype=torch.bool)
    predicts[:, :-1] = inputs["labels"][:, 1:] != -100
    return inputs | {"target_positions": predicts.flatten().nonzero().squeeze(1)}
