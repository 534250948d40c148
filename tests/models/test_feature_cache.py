import pytest
import torch

from qwenvl_lit.models import feature_cache
from qwenvl_lit.models.feature_cache import FeatureCache


class Encoder:
    """Encodes image i as i + 1 tokens of its index, and keeps what it encoded."""

    def __init__(self):
        self.encoded = []

    def __call__(self, indices):
        assert indices
        for index in indices:
            self.encoded.append(index)
            yield torch.full((index + 1, 2), float(index))


def test_images_of_equal_keys_are_encoded_once():
    cache, encode = FeatureCache(), Encoder()
    features = cache(3, ["a", "b", "a"], encode)
    assert [len(one) for one in features] == [1, 2, 1]
    assert encode.encoded == [0, 1]
    assert len(cache(1, ["b"], encode)[0]) == 2
    assert encode.encoded == [0, 1]


def test_without_keys_nothing_is_kept():
    cache, encode = FeatureCache(), Encoder()
    assert len(cache(2, None, encode)) == 2
    assert not cache.features
    with pytest.raises(ValueError, match="1 keys for 2 images"):
        cache(2, ["a"], encode)


def test_the_least_recently_used_features_leave_first(monkeypatch):
    monkeypatch.setattr(feature_cache, "MAX_BYTES", 3 * 2 * 4)  # three tokens
    cache, encode = FeatureCache(), Encoder()
    cache(2, ["one token", "two tokens"], encode)
    cache(1, ["one token"], encode)
    assert len(cache(2, ["new", "two new"], encode)) == 2  # all of a batch are returned
    assert list(cache.features) == ["new", "two new"]


def test_stored_features_are_copies_of_what_was_encoded():
    cache, all_images = FeatureCache(), torch.ones(2, 3, 4)
    [first, _] = cache(2, ["a", "b"], lambda indices: iter(all_images))
    assert first.untyped_storage().nbytes() == first.nbytes
    assert cache.get("a") is first
    assert cache.get("c") is None
