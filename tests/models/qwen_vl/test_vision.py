import pytest
import torch
from small_network import small_config, small_network
from torch import nn

from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM
from qwenvl_lit.models.qwen_vl.vision import (
    CrossAttention,
    VisionAttention,
    resize_positions,
    sine_cosine_positions,
)


@torch.no_grad()
def as_multihead(q, k, v, out) -> nn.MultiheadAttention:
    """PyTorch's attention with the given (weight, bias) of each projection."""
    attention = nn.MultiheadAttention(len(out[1]), 4, batch_first=True)
    attention.in_proj_weight.copy_(torch.cat((q[0], k[0], v[0])))
    attention.in_proj_bias.copy_(torch.cat((q[1], k[1], v[1])))
    attention.out_proj.weight.copy_(out[0])
    attention.out_proj.bias.copy_(out[1])
    return attention


def weight_and_bias(layer: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.weight, layer.bias


def test_the_projection_of_the_tower_is_interleaved_per_head():
    ours = VisionAttention(width=32, heads=4)
    weight, bias = ours.in_proj.weight.view(4, 3, 8, 32), ours.in_proj.bias.view(4, 3, 8)
    qkv = [(weight[:, i].flatten(0, 1), bias[:, i].flatten()) for i in range(3)]
    theirs = as_multihead(*qkv, weight_and_bias(ours.out_proj))
    x = torch.randn(2, 9, 32)
    # float32, another order of summation
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], atol=1e-6, rtol=0)


def test_the_resampler_attends_as_pytorch_does():
    ours = CrossAttention(dim=32, heads=4)
    layers = (ours.q_proj, ours.k_proj, ours.v_proj, ours.out_proj)
    theirs = as_multihead(*map(weight_and_bias, layers))
    query, key, value = torch.randn(5, 32), torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    expected, _ = theirs(query.expand(2, -1, -1), key, value)
    torch.testing.assert_close(ours(query, key, value), expected, atol=1e-6, rtol=0)


def test_positions_of_the_same_grid_are_returned_unchanged():
    table = torch.randn(16, 8)
    assert resize_positions(table, 16) is table


@pytest.mark.parametrize("patches", [4, 64])
def test_resized_positions_keep_their_location_in_the_grid(patches):
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    resized = resize_positions(torch.stack((rows, columns), dim=-1).flatten(0, 1), patches)
    side = int(patches**0.5)
    grid = resized.view(side, side, 2)
    torch.testing.assert_close(grid[..., 0], grid[..., 1].T)
    assert (grid[..., 0].diff(dim=0) > 0).all()
    torch.testing.assert_close(grid.mean((0, 1)), torch.full((2,), 1.5))


def test_sine_cosine_positions_hold_x_before_y():
    table = sine_cosine_positions(9, 8)
    torch.testing.assert_close(table[0], torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1]))
    # Entry 5 is at x = 2, y = 1; entry 2 has the same x, entry 3 the same y.
    torch.testing.assert_close(table[5], torch.cat((table[2, :4], table[3, 4:])))


def test_an_image_may_have_any_number_of_patches():
    tower = small_network().transformer.visual
    for side in (4, 16, 64):
        assert tower(torch.randn(2, 3, side, side)).shape == (2, 4, 32)


@pytest.mark.parametrize("shape", [(1, 3, 18, 18), (1, 3, 16, 12), (3, 16, 16)])
def test_pixels_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(N, 3, S, S\) with S a multiple of 4"):
        small_network().transformer.visual(torch.zeros(shape))


def test_images_do_not_attend_to_each_other():
    tower = small_network().transformer.visual
    pixels = torch.randn(3, 3, 16, 16)
    alone = torch.cat([tower(image[None]) for image in pixels])
    # float32, other kernels for other batch sizes
    torch.testing.assert_close(tower(pixels), alone, atol=1e-5, rtol=0)


def test_blocks_may_be_run_by_the_caller():
    tower, blocks = small_network().transformer.visual, []

    def run_block(block, x_NPC):
        blocks.append(block)
        return block.compute(x_NPC)

    pixels = torch.randn(1, 3, 16, 16)
    assert torch.equal(tower.encode(pixels, run_block), tower(pixels))
    assert blocks == list(tower.transformer["resblocks"])


def test_patches_as_wide_as_the_output_need_no_projection():
    names = QwenVLForCausalLM(small_config(visual={"width": 32})).state_dict()
    assert not any("kv_proj" in name for name in names)


@torch.no_grad()
def test_with_a_spatial_start_queries_attend_to_their_own_location():
    def own_weight(spatial_start) -> float:
        """The mean attention weight of the patch at the query's location, one of 16."""
        torch.manual_seed(0)
        visual = {"n_queries": 16, "resampler_heads": 1, "spatial_start": spatial_start}
        resampler = QwenVLForCausalLM(small_config(visual=visual)).transformer.visual.attn_pool
        q = resampler.attn.q_proj(resampler.ln_q(resampler.query) + resampler.pos_embed)
        k = resampler.attn.k_proj(torch.randn(500, 16, 32) + resampler.pos_embed)
        weights = (q @ k.mT * 32**-0.5).softmax(-1)
        return weights.diagonal(dim1=-2, dim2=-1).mean().item()

    assert own_weight(2.5) > 1.5 * own_weight(None)


def test_the_original_initialization_has_unequal_projections():
    attention = QwenVLForCausalLM(small_config()).transformer.visual.attn_pool.attn
    assert not torch.equal(attention.q_proj.weight, attention.k_proj.weight)
