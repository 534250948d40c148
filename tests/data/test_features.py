"""Features on disk: a written file is complete and found by every process; reading is mapped."""

import os
import pickle
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from qwenvl_lit.data.features import CachedFeatures, FeatureStore
from qwenvl_lit.types import BadImage, DataError, ImageSource

SHAPE = (4, 8)


def new_store(folder: Path, shape=SHAPE, dtype=torch.float32, **settings) -> FeatureStore:
    return FeatureStore(folder, settings=settings, shape=shape, dtype=dtype)


def image(shade: int) -> ImageSource:
    return ImageSource(Image.new("RGB", (9, 9), (shade, 0, 0)))


def filled(folder: Path, shades=range(5)) -> FeatureStore:
    store = new_store(folder)
    store.add({image(shade).key: torch.full(SHAPE, float(shade)) for shade in shades})
    return store


def shades_of(features: list[torch.Tensor]) -> list[float]:
    return [float(values[0, 0]) for values in features]


def test_features_come_back_in_the_order_of_the_images(tmp_path):
    store = filled(tmp_path)
    features = store.read([image(3), image(0), image(3)])
    assert [values.shape for values in features] == [SHAPE] * 3
    assert shades_of(features) == [3, 0, 3]
    assert store.read([]) == []


def test_images_may_have_features_of_different_lengths(tmp_path):
    store = new_store(tmp_path, shape=(None, 2))
    store.add({image(shade).key: torch.full((shade, 2), float(shade)) for shade in (4, 1, 2)})
    features = new_store(tmp_path, shape=(None, 2)).read([image(2), image(4)])
    assert [values.tolist() for values in features] == [[[2.0] * 2] * 2, [[4.0] * 2] * 4]
    assert store.token_bytes == 8
    for other in (torch.ones(3, 5), torch.ones(3, 2).half()):
        with pytest.raises(AssertionError):
            store.add({"other": other})


def test_features_of_one_length_are_found_where_they_have_always_been(tmp_path):
    assert new_store(tmp_path).folder.name == "d165c604dce60dcd"


def test_missing_keys_are_listed_once_and_in_order(tmp_path):
    store = filled(tmp_path, [1])
    assert store.missing_keys(["b", image(1).key, "a", "b"]) == ["b", "a"]


def test_another_process_finds_written_images_and_a_copy_reads_them(tmp_path):
    store = filled(tmp_path)
    other = new_store(tmp_path)
    assert len(other) == 5
    other.add({image(9).key: torch.full(SHAPE, 9.0)})
    assert store.missing_keys([image(9).key])
    store.refresh()
    copy = pickle.loads(pickle.dumps(store))
    assert shades_of(copy.read([image(9), image(2)])) == [9, 2]


def test_other_settings_dtypes_and_shapes_have_stores_of_their_own(tmp_path):
    filled(tmp_path)
    for other in (
        new_store(tmp_path, side=448),
        new_store(tmp_path, dtype=torch.bfloat16),
        new_store(tmp_path, shape=(2, 8)),
    ):
        assert len(other) == 0
    assert len(new_store(tmp_path)) == 5
    assert len(list(tmp_path.iterdir())) == 4


def test_an_image_that_is_not_stored_is_named(tmp_path):
    store = filled(tmp_path)
    file = tmp_path / "new.png"
    image(77).open().save(file)
    changed = r"image .*new\.png is not in the vision cache .*start the run again"
    with pytest.raises(DataError, match=changed):
        store.read([ImageSource(file)])
    with pytest.raises(BadImage, match="cannot be read as an image"):
        store.read([ImageSource(b"no image")])


def test_an_unfinished_file_does_not_remain(tmp_path):
    store = filled(tmp_path)
    store.folder.rename(tmp_path / "gone")
    with pytest.raises(DataError, match=r"cannot be written: .*free disk space"):
        store.add({"key": torch.zeros(SHAPE)})
    assert store.missing_keys(["key"])


def test_unfinished_files_of_killed_processes_are_removed_and_others_are_not(tmp_path):
    store = filled(tmp_path)
    old, new = store.folder / "old.safetensors.part", store.folder / "new.safetensors.part"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    store.add({image(9).key: torch.zeros(SHAPE)})
    assert (old.exists(), new.exists()) == (False, True)
    assert len(new_store(tmp_path)) == 6


def test_all_files_have_the_same_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        store = filled(tmp_path)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in store.folder.iterdir()} == {0o640}


def test_a_broken_file_is_named(tmp_path):
    store = filled(tmp_path)
    (store.folder / "broken.safetensors").write_bytes(b"half")
    with pytest.raises(DataError, match=r"broken\.safetensors cannot be read: .*delete it"):
        new_store(tmp_path)


class StoredImages(torch.utils.data.Dataset):
    def __init__(self, store: FeatureStore, images: list[ImageSource]):
        self.store, self.images = store, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.store.read([self.images[index]])[0]


def test_data_workers_read_files_that_are_open_already(tmp_path):
    store = filled(tmp_path)
    store.read([image(0)])
    dataset = StoredImages(store, [image(shade) for shade in range(5)])
    loader = DataLoader(dataset, num_workers=2, collate_fn=list)
    assert [float(features[0, 0]) for (features,) in loader] == [0, 1, 2, 3, 4]


def test_reading_is_mapped_and_faster_than_any_model_trains(tmp_path):
    """48 images of full size, 2 MB each.

    Opening them takes no memory, and one process reads several times what a GPU can use.
    """
    store = new_store(tmp_path, shape=(256, 4096), dtype=torch.bfloat16)
    images = [image(shade) for shade in range(48)]
    first = torch.randn(256, 4096).bfloat16()
    store.add({source.key: first + shade for shade, source in enumerate(images)})
    store = new_store(tmp_path, shape=(256, 4096), dtype=torch.bfloat16)
    keys, before = [source.key for source in images], _own_memory()
    mapped = [store._open(store._files[key]).get_tensor(key) for key in keys]
    assert _own_memory() - before < 20e6 < sum(tensor.nbytes for tensor in mapped)
    start = time.perf_counter()
    for shade, source in enumerate(images):
        assert torch.equal(store.read([source])[0][0, :8], (first + shade)[0, :8])
    assert len(images) / (time.perf_counter() - start) > 100


def test_a_feature_source_has_features_only_while_it_is_open(tmp_path):
    features = CachedFeatures()
    assert not features.is_open
    assert features([image(3)]) is None
    features.open(filled(tmp_path))
    assert features.is_open
    assert shades_of(features([image(3)])) == [3]
    assert shades_of(pickle.loads(pickle.dumps(features))([image(2)])) == [2]
    features.close()
    assert features([image(3)]) is None


def _own_memory() -> int:
    """Returns the bytes of this process that are not backed by a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")
