import json
import re

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
