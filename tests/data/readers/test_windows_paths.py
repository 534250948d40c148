"""Image paths that were written on Windows."""

import re

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from qwenvl_lit.cli.overrides import quote_free_text
from qwenvl_lit.data.readers.rows import ReadOptions, image_from
from qwenvl_lit.types import BadImage


@pytest.mark.parametrize(
    ("address", "argument"),
    [
        (r"C:\data\a.png", r"data.path_map={C:\data: FOLDER}"),
        ("D:/data/x/a.png", "data.path_map={D:/data/x: FOLDER}"),
        (r"\\server\share\a.png", r"data.path_map={\\server\share: FOLDER}"),
        (r"sub\inner\a.png", r"data.path_map={sub\inner\: sub/inner}"),
    ],
)
def test_a_missing_windows_path_names_the_argument_that_maps_it(address, argument, folder):
    with pytest.raises(BadImage, match=re.escape(argument)):
        image_from(address, folder)
    (folder / "sub/inner").mkdir(parents=True)
    Image.new("RGB", (3, 3)).save(folder / "sub/inner/a.png")
    quoted = quote_free_text(argument.replace("FOLDER", f"{folder}/sub/inner"))
    [override] = OverridesParser.create().parse_overrides([quoted])
    image = image_from(address, folder, ReadOptions(path_map=override.value()))
    assert image.size == (3, 3)
