"""Images of different sizes are encoded for the vision cache; a toy tower has a token per pixel."""

import pytest
import torch
from PIL import Image

from qwenvl_lit.data import feature_pass
from qwenvl_lit.data.feature_pass import encode_images, example_features, find_images
from qwenvl_lit.data.features import FeatureStore
from qwenvl_lit.types import Conversation, DataError, ImageSource, Length, Turn

WIDTHS = (3, 1, 2, 5, 4, 3)


class Widths:
    """An image has a token for each pixel of its width."""

    def length(self, conversation, *, prompt=False):
        tokens = sum(image.size[0] for image in conversation.images)
        return Length(tokens + 1, 0, tokens)

    def image_vision(self, image):
        tokens = torch.full((image.size[0], 1), float(image.open().getpixel((0, 0))[0]))
        return {"tokens": tokens, "lengths": torch.tensor([len(tokens)])}

    def collate_vision(self, samples):
        joined = {
            name: torch.cat([sample.vision[name] for sample in samples])
            for name in ("tokens", "lengths")
        }
        return {**joined, "images": len(samples)}


def encode(vision) -> list[torch.Tensor]:
    """The features (Q, 2) of each image."""
    assert len(vision["lengths"]) == vision["images"]
    return list(vision["tokens"].repeat(1, 2).split(vision["lengths"].tolist()))


@pytest.fixture
def rows(tmp_path) -> list[Conversation]:
    rows = []
    for index, width in enumerate(WIDTHS):
        file = tmp_path / f"{index}.png"
        Image.new("RGB", (width, 2), (10 * index, 0, 0)).save(file)
        turn = Turn(role="user", parts=(ImageSource(file), "?"))
        rows.append(Conversation(id=str(index), turns=(turn,), where=f"rows:{index}"))
    return rows


def found(rows, **options):
    defaults = {"rank": 0, "world_size": 1, "workers": 0, "drop_bad": False}
    repeats = torch.ones(len(rows)).long().numpy()
    return find_images(rows, repeats, Widths(), **{**defaults, **options}, progress=lambda *_: None)


@pytest.mark.parametrize("padded", [False, True])
def test_images_of_any_size_are_found_encoded_and_read(tmp_path, rows, monkeypatch, padded):
    monkeypatch.setattr(feature_pass, "BATCH_SIZE", 4)
    locations, uses = found(rows)
    assert uses == len(WIDTHS)
    assert [location.tokens for location in locations.values()] == list(WIDTHS)
    example = example_features(encode, Widths(), padded=padded)
    assert example.shape == (448, 2)
    store = FeatureStore(tmp_path, settings={}, shape=(None, 2), dtype=example.dtype)
    options = {"num_workers": 0, "drop_bad": False, "progress": lambda *_: None}
    encode_images(store, encode, rows, locations, Widths(), padded=padded, **options)
    for index, features in enumerate(store.read([row.images[0] for row in rows])):
        assert features.tolist() == [[10.0 * index] * 2] * WIDTHS[index]


def test_a_batch_is_filled_up_with_its_last_image_if_all_images_are_equally_large(
    tmp_path, rows, monkeypatch
):
    monkeypatch.setattr(feature_pass, "BATCH_SIZE", 4)
    sizes = {}
    for padded in (True, False):
        counts = sizes[padded] = []

        def counted(vision, counts=counts):
            counts.append(vision["images"])
            return encode(vision)

        store = FeatureStore(
            tmp_path / str(padded), settings={}, shape=(None, 2), dtype=torch.float
        )
        options = {"num_workers": 0, "drop_bad": False, "progress": lambda *_: None}
        encode_images(store, counted, rows, found(rows)[0], Widths(), padded=padded, **options)
    assert sizes == {True: [4, 4], False: [4, 2]}


def test_an_image_whose_size_cannot_be_read_is_named(rows):
    rows[2].images[0].source.write_text("no image")
    with pytest.raises(DataError, match=r"rows:2: row '2': image .*2\.png cannot be read"):
        found(rows)
    assert len(found(rows, drop_bad=True)[0]) == 5
