"""The demo dataset in sizes for tests."""

SIZES = {  # in images
    "train": 40,
    "single": 16,
    "validation": 4,
    "test": 4,
    "unseen_pairs": 2,
    "new_classes": 8,
}


def small_demo(**sizes: int) -> list[str]:
    """Overrides that set the sizes of the files of `data=demo`: `SIZES`, updated with `sizes`."""
    return [f"+data.prepare.{name}={count}" for name, count in {**SIZES, **sizes}.items()]
