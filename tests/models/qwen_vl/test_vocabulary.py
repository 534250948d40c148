"""Vocabularies that are not beside the weights: `model.vocabulary`."""

import shutil

import pytest

from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.qwen_vl.vocabulary import find_vocabulary
from qwenvl_lit.types import DataError


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A vocabulary in the hub's cache, as the one of Qwen/Qwen-VL-Chat."""
    monkeypatch.chdir(tmp_path)
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    folder = hub / "models--Qwen--Qwen-VL-Chat"
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    return shutil.copy(TINY_VOCABULARY, folder / "snapshots/abc/qwen.tiktoken")


def test_a_vocabulary_is_a_file_a_folder_or_a_name_on_the_hub(file):
    for name in (str(file), str(file.parent), "Qwen/Qwen-VL-Chat", "tiny"):
        found = find_vocabulary(name, download=False)
        assert found.read_bytes() == TINY_VOCABULARY.read_bytes()
    assert find_vocabulary("Qwen/Other", file.parent, download=False) == file
    family = QwenVLFamily(path="a/b", weights="random", vocabulary="Qwen/Qwen-VL-Chat")
    assert family.tokenizer.path == file


def test_a_name_that_cannot_be_fetched_is_named(file):
    with pytest.raises(DataError, match=r"model\.vocabulary=Qwen/Other is no file or folder"):
        find_vocabulary("Qwen/Other", download=False)
