"""The demo dataset in sizes for tests."""

SIZES = {
    "train": 40,
    "single": 16,
    "validation": 4,
    "test": 4,
    "unseen_pairs": 2,
    "new_classes": 8,
}


def small_demo(**sizes: int) -> list[str]:
    """Overrides of `data=demo` that write so many images to each file; `SIZES` by default."""
    return [f"+data.prepare.{name}={count}" for name, count in {**SIZES, **sizes}.items()]
