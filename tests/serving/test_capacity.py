import re

import pytest
import torch
from tiny import CONFIG, tiny_family

from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.serving import capacity
from qwenvl_lit.serving.capacity import check_room, with_capacity
from qwenvl_lit.serving.settings import ServeSettings


@pytest.fixture(scope="module")
def model():
    return tiny_family().load()


def chosen(model, family, **settings):
    settings = with_capacity(ServeSettings(**settings), model=model, family=family)
    return settings.rows, settings.context


def test_numbers_stay_and_auto_follows_from_the_model(model, monkeypatch):
    short = QwenVLFamily(config={**CONFIG, "max_position_embeddings": 512}, vocabulary="tiny")
    assert chosen(model, tiny_family(), rows=3, context=100) == (3, 100)
    assert chosen(model, tiny_family()) == (32, 2048)
    assert chosen(model, short)[1] == 512
    monkeypatch.setattr(capacity, "SMALL_MODEL", 10)
    assert chosen(model, tiny_family())[0] == 4


def test_a_context_beyond_what_the_model_reads_is_refused(model):
    most = tiny_family().max_tokens
    with pytest.raises(ValueError, match=f"serve.context={most + 1} is more than the {most} tok"):
        chosen(model, tiny_family(), context=most + 1)


def test_a_context_without_room_for_an_answer_is_refused():
    processor = tiny_family().processor()
    with pytest.raises(ValueError, match=r"^serve.context=5 .* the shortest prompt has (\d+)") as e:
        check_room(ServeSettings(context=5), processor)
    tokens = int(re.search(r"has (\d+) tokens", str(e.value))[1])
    check_room(ServeSettings(context=tokens + 1), processor)
    with pytest.raises(ValueError, match="no room"):
        check_room(ServeSettings(context=tokens), processor)


def test_on_a_gpu_there_are_as_many_rows_as_fit(monkeypatch):
    class Family:
        max_tokens = 8192

        def answering_memory(self, *, rows, tokens, image_tokens, new_tokens, at_once):
            assert (tokens + new_tokens, at_once) == (2048, False)
            return rows * tokens

    class Model(torch.nn.Module):
        def parameters(self, recurse=True):
            class Weight:
                device = torch.device("cuda")

            return iter([Weight()])

    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    for available, rows in ((40_000, 16), (10**9, 32), (1, 1)):
        monkeypatch.setattr(capacity, "free_memory", lambda device, free=available: free)
        assert chosen(Model(), Family())[0] == rows
