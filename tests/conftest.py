"""Fixtures for the tests of rows: a folder with images, and functions that read a row."""

import json
import os

import huggingface_hub.constants
import pytest
from hub_server import HubServer
from PIL import Image

# Sums of one thread have the same last bits in every process. Set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.metrics import per_sample


@pytest.fixture(autouse=True)
def _warn_again():
    """Lets each test see the warnings that a process logs once."""
    per_sample._warn_once.cache_clear()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local Hugging Face Hub, which the client uses with the token of the account Ann."""
    server = HubServer()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage is another server
    monkeypatch.setenv("HF_TOKEN", "hf_ann")
    yield server
    server.close()


@pytest.fixture
def folder(tmp_path):
    """A folder with images a.png of 640 x 480 and b.png of 333 x 517 pixels."""
    Image.new("RGB", (640, 480)).save(tmp_path / "a.png")
    Image.new("RGB", (333, 517)).save(tmp_path / "b.png")
    return tmp_path


@pytest.fixture
def read_row(folder):
    """Returns a function that writes a row to `folder` and reads it."""

    def read(row, **options):
        (folder / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
        return read_rows(str(folder / "rows.jsonl"), ReadOptions(**options))[0]

    return read


@pytest.fixture
def parts_of(read_row):
    """Returns a function that reads a question about a.png and b.png: the parts of each turn."""

    def read(query, response="yes", objects=(), images=("a.png", "b.png")):
        row = read_row(
            {"query": query, "response": response, "images": list(images), "objects": objects}
        )
        return tuple(turn.parts for turn in row.turns)

    return read
