import json
import re

import pytest
import torch

from qwenvl_lit.runs.versions import save_versions

RECORDED = ("qwenvl_lit", "git", "python", "lightning", "transformers", "peft", "device", "command")


def test_versions_are_recorded_and_changed_ones_are_warned_about(tmp_path, caplog):
    save_versions(tmp_path)
    written = json.loads((tmp_path / "versions.json").read_text())
    assert written["torch"] == torch.__version__
    assert set(RECORDED) <= written.keys()
    assert re.fullmatch(r"[0-9a-f]{40}\+?", written["git"] or "0" * 40)
    assert not caplog.records
    earlier = {**written, "torch": "1.0", "command": "another"}
    (tmp_path / "versions.json").write_text(json.dumps(earlier))
    save_versions(tmp_path)
    [warning] = caplog.records
    assert f"torch 1.0 -> {torch.__version__}" in warning.getMessage()
    assert "command" not in warning.getMessage()


def test_a_resumed_run_keeps_the_command_that_started_it(tmp_path, monkeypatch, caplog):
    file = tmp_path / "versions.json"
    commands = ["train seed=1", "train resume=latest", "train resume=latest trainer.max_epochs=9"]
    for number, command in enumerate(commands):
        monkeypatch.setattr("sys.argv", command.split())
        save_versions(tmp_path)
        if number == 0:
            first = json.loads(file.read_text())
            file.write_text(json.dumps({**first, "torch": "1.0"}))
    stored = json.loads(file.read_text())
    assert stored["command"] == commands[0]
    assert stored["torch"] == "1.0"
    assert stored["resumed"] == [
        {"command": commands[1], "torch": torch.__version__},
        {"command": commands[2]},
    ]
    assert len(caplog.records) == 1, "the versions of the second and the third start are equal"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"resumed": 3}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_damaged_file_is_set_aside_with_a_warning(tmp_path, caplog, content):
    file = tmp_path / "versions.json"
    file.write_bytes(content)
    save_versions(tmp_path)
    assert json.loads(file.read_text())["torch"] == torch.__version__
    assert (tmp_path / "versions.json.broken").read_bytes() == content
    [warning] = caplog.records
    assert "versions.json cannot be read" in warning.getMessage()
    assert "It is now versions.json.broken" in warning.getMessage()


def test_a_folder_in_place_of_the_file_is_set_aside(tmp_path, caplog):
    (tmp_path / "versions.json").mkdir()
    (tmp_path / "versions.json.broken").touch()
    save_versions(tmp_path)
    assert (tmp_path / "versions.json").is_file()
    assert (tmp_path / "versions.json.broken_2").is_dir()
    assert "versions.json cannot be read: it is a folder" in caplog.text
