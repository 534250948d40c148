"""Rows that join and leave a running batch; what `tests/generation/test_continuous.py` leaves."""

import pytest
import torch
from small_network import QUERIES, SIDE, small_config
from small_qwen3_vl import KINDS
from small_qwen3_vl import small_network as small_qwen3_vl

from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM
from qwenvl_lit.models.running_rows import RunningRows

LONG = 120  # tokens of a prompt, just less than the cache's slots
SIZES = ((4, 6), (2, 2), (4, 6))  # of images of Qwen2.5-VL and Qwen3-VL, in patches


def on_meta(kind):
    """A network and two prompts with three images, without values."""
    with torch.device("meta"):
        inputs = {"input_ids": torch.empty(2, LONG, dtype=torch.int64)}
        if kind == "qwen_vl":
            network, tokens = QwenVLForCausalLM(small_config()), 3 * QUERIES
            inputs["pixel_values"] = torch.empty(3, 3, SIDE, SIDE)
        else:
            network, tokens = small_qwen3_vl(kind).to("meta"), 6 + 1 + 6
            inputs["pixel_values"] = torch.empty(4 * tokens, 96)
            inputs["image_sizes"] = SIZES
            inputs["position_ids"] = torch.empty(3, 2, LONG, dtype=torch.int64)
        inputs["vision_positions"] = torch.empty(tokens, dtype=torch.int64)
    return network.eval(), inputs


@pytest.mark.parametrize("kind", ["qwen_vl", *KINDS])
def test_rows_neither_synchronize_nor_leave_the_device(kind, monkeypatch):
    """On the meta device, reading a value and mixing in a tensor of the host are errors."""
    # The meta device does not support autocast.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    model, inputs = on_meta(kind)
    moves, move = [], RunningRows._move
    monkeypatch.setattr(RunningRows, "_move", lambda self, by: moves.append(by) or move(self, by))
    with torch.inference_mode():
        running = model.decoder().running_rows(rows=9, slots=LONG + 5)
        running.warm_up()
        with pytest.raises(ValueError, match="1 keys for 3 images"):
            running.read(inputs, lengths=[LONG, 7], image_keys=["a"])
        for rows in ({0: 8, 1: 2}, {1: 3}):
            prompts = running.read(inputs, lengths=[LONG, 7], image_keys=["a", "b", "a"])
            while not prompts.advance(30):
                pass
            ids = prompts.logits.argmax(-1)
            running.join(prompts, rows, ids[: len(rows)])
            logits = running.step()
            running.latest[: len(logits)] = logits.argmax(-1)
        assert logits.shape == (9, 64)
        running.leave(8)
        assert len(running.step()) == 8
        for _ in range(10):
            running.step()
    assert logits.device.type == "meta"
    assert moves[0] == LONG  # to make room for the longest prompt
    assert moves[-1] < 0  # after the row of this prompt has left


def test_a_step_computes_as_many_rows_as_are_in_use():
    model = QwenVLForCausalLM(small_config()).eval()
    running = model.decoder().running_rows(rows=40, slots=8)
    assert running.sizes == [1, 8, 32, 40]
    sizes = []
    for row in (0, 1, 7, 8, 31, 32, 39):
        running.starts = {row: 0}
        sizes.append(running.size)
    assert sizes == [1, 8, 8, 32, 32, 40, 40]
