"""The notebook of examples/ runs from top to bottom, as Jupyter would run it."""

import json
import shlex
from pathlib import Path

from commands import output_of

from qwenvl_lit.grounding import iou
from qwenvl_lit.types import Box

NOTEBOOK = Path(__file__).parent.parent / "examples/boxes.ipynb"
COMMAND = "!python -m qwenvl_lit."


def test_the_notebook_finds_the_box_that_it_has_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [], "the notebook is stored without outputs"
        if source.startswith(COMMAND):
            line = source.removeprefix(COMMAND).replace("\\\n", " ")
            command, *arguments = shlex.split(line)
            output_of(tmp_path, command, *arguments)
        else:
            exec(compile(source, NOTEBOOK.name, "exec"), names)
    [sign] = names["found"]
    expected = Box(x0=16, y0=32, x1=32, y1=56, frame="pixel")
    assert iou(sign.boxes[0], expected) > 0.5
    assert Path("signs/found.png").exists()
    assert "| acc_at_50 | 1 | 1 |" in capsys.readouterr().out, "the model card"
