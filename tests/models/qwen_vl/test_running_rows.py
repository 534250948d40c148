"""Rows that join and leave a running batch; what `tests/generation/test_continuous.py` leaves."""

import torch
from small_network import QUERIES, SIDE, small_config

from qwenvl_lit.generation.decoders import decoder_of
from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM
from qwenvl_lit.models.qwen_vl.running_rows import RunningRows


def test_rows_neither_synchronize_nor_leave_the_device(monkeypatch):
    """On the meta device, reading a value and mixing in a tensor of the host are errors."""
    # The meta device does not support autocast.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    with torch.device("meta"):
        model = QwenVLForCausalLM(small_config()).eval()
        inputs = {
            "input_ids": torch.empty(2, 80, dtype=torch.int64),
            "pixel_values": torch.empty(3, 3, SIDE, SIDE),
            "vision_positions": torch.empty(3 * QUERIES, dtype=torch.int64),
        }
    moves, move = [], RunningRows._move
    monkeypatch.setattr(RunningRows, "_move", lambda self, by: moves.append(by) or move(self, by))
    with torch.inference_mode():
        running = decoder_of(model).running_rows(rows=9, slots=100)
        running.warm_up()
        for rows in ({0: 8, 1: 2}, {1: 3}):
            prompts = running.read(inputs, lengths=[80, 7], image_keys=["a", "b", "a"])
            while not prompts.advance(30):
                pass
            ids = prompts.logits.argmax(-1)
            running.join(prompts, rows, ids[: len(rows)])
            logits = running.step()
            running.latest[: len(logits)] = logits.argmax(-1)
        assert logits.shape == (9, 64)
        running.leave(8)
        assert len(running.step()) == 8
        for _ in range(60):
            running.step()
    assert logits.device.type == "meta"
    assert moves[0] == 80  # to make room for the longest prompt
    assert moves[-1] < 0  # after the row of this prompt has left


def test_a_step_computes_as_many_rows_as_are_in_use():
    model = QwenVLForCausalLM(small_config()).eval()
    running = decoder_of(model).running_rows(rows=40, slots=8)
    assert running.sizes == [1, 8, 32, 40]
    sizes = []
    for row in (0, 1, 7, 8, 31, 32, 39):
        running.starts = {row: 0}
        sizes.append(running.size)
    assert sizes == [1, 8, 8, 32, 32, 40, 40]
