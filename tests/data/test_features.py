"""Features of images on disk: what is written is there, whole, for every process; reading is mapped."""

import os
import pickle
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from qwenvl_lit.data.features import FeatureStore
from qwenvl_lit.types import BadImage, DataError, ImageSource

SHAPE = (4, 8)


def store(folder: Path, shape=SHAPE, dtype=torch.float32, **settings) -> FeatureStore:
    return FeatureStore(folder, settings=settings, shape=shape, dtype=dtype)


def image(shade: int) -> ImageSource:
    return ImageSource(Image.new("RGB", (9, 9), (shade, 0, 0)))


def filled(folder: Path, shades=range(5)) -> FeatureStore:
    made = store(folder)
    made.add({image(shade).key: torch.full(SHAPE, float(shade)) for shade in shades})
    return made


def test_features_come_back_in_the_order_of_the_images(tmp_path):
    made = filled(tmp_path)
    found = made.of([image(3), image(0), image(3)])
    assert found.shape == (3, *SHAPE)
    assert found[:, 0, 0].tolist() == [3, 0, 3]
    none = made.of([])
    assert none.shape == (0, *SHAPE)
    assert none.dtype == torch.float32


def test_what_is_missing_is_told_once_and_in_order(tmp_path):
    made = filled(tmp_path, [1])
    assert made.missing(["b", image(1).key, "a", "b"]) == ["b", "a"]


def test_another_process_finds_what_was_written_and_a_copy_reads_it(tmp_path):
    made = filled(tmp_path)
    other = store(tmp_path)
    assert len(other) == 5
    other.add({image(9).key: torch.full(SHAPE, 9.0)})
    assert made.missing([image(9).key])
    made.refresh()
    copy = pickle.loads(pickle.dumps(made))
    assert copy.of([image(9), image(2)])[:, 0, 0].tolist() == [9, 2]


def test_other_settings_types_and_shapes_are_other_stores(tmp_path):
    filled(tmp_path)
    for other in (
        store(tmp_path, side=448),
        store(tmp_path, dtype=torch.bfloat16),
        store(tmp_path, shape=(2, 8)),
    ):
        assert len(other) == 0
    assert len(store(tmp_path)) == 5
    assert len(list(tmp_path.iterdir())) == 4


def test_a_image_that_is_not_there_is_named(tmp_path):
    made = filled(tmp_path)
    file = tmp_path / "new.png"
    image(77).open().save(file)
    with pytest.raises(
        DataError, match=r"image .*new\.png is not in the vision cache .*start the run again"
    ):
        made.of([ImageSource(file)])
    with pytest.raises(BadImage, match="cannot be read as an image"):
        made.of([ImageSource(b"no image")])


def test_a_file_that_could_not_be_finished_leaves_nothing(tmp_path):
    made = filled(tmp_path)
    made.folder.rename(tmp_path / "gone")
    with pytest.raises(DataError, match=r"cannot be written: .*make room"):
        made.add({"key": torch.zeros(SHAPE)})
    assert made.missing(["key"])


def test_what_a_killed_process_left_is_removed_and_what_is_being_written_is_not(tmp_path):
    made = filled(tmp_path)
    old, new = (made.folder / f"{name}.unfinished" for name in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    made.add({image(9).key: torch.zeros(SHAPE)})
    assert (old.exists(), new.exists()) == (False, True)
    assert len(store(tmp_path)) == 6


def test_all_files_may_be_read_by_the_same_people(tmp_path):
    before = os.umask(0o027)
    try:
        made = filled(tmp_path)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in made.folder.iterdir()} == {0o640}


def test_a_broken_file_is_named(tmp_path):
    made = filled(tmp_path)
    (made.folder / "broken.safetensors").write_bytes(b"half")
    with pytest.raises(DataError, match=r"broken\.safetensors cannot be read: .*delete it"):
        store(tmp_path)


class Looking(torch.utils.data.Dataset):
    def __init__(self, made: FeatureStore, images: list[ImageSource]):
        self.made, self.images = made, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> torch.Tensor:
        return self.made.of([self.images[place]])


def test_workers_read_files_that_are_open_already(tmp_path):
    made = filled(tmp_path)
    made.of([image(0)])
    seen = DataLoader(
        Looking(made, [image(shade) for shade in range(5)]), num_workers=2, collate_fn=list
    )
    assert [float(features[0, 0, 0]) for (features,) in seen] == [0, 1, 2, 3, 4]


def test_reading_is_mapped_and_faster_than_any_model_trains(tmp_path):
    """48 images of full size, 2 MB each: opening takes no memory, and one process reads several times what a GPU can use."""
    made = store(tmp_path, shape=(256, 4096), dtype=torch.bfloat16)
    images = [image(shade) for shade in range(48)]
    one = torch.randn(256, 4096).bfloat16()
    made.add({each.key: one + shade for shade, each in enumerate(images)})
    made = store(tmp_path, shape=(256, 4096), dtype=torch.bfloat16)
    keys, before = [each.key for each in images], _own_memory()
    mapped = [made._open(made._files[key]).get_tensor(key) for key in keys]
    assert _own_memory() - before < 20e6 < sum(tensor.nbytes for tensor in mapped)
    start = time.perf_counter()
    for shade, each in enumerate(images):
        assert torch.equal(made.of([each])[0, 0, :8], (one + shade)[0, :8])
    assert len(images) / (time.perf_counter() - start) > 100


def _own_memory() -> int:
    """Bytes of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
