"""The smallest Qwen-VL, and a task that trains it on rows of one letter each."""

from PIL import Image

from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.metrics.exact_match import ExactMatch
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.training.optim import AdamW
from qwenvl_lit.types import Conversation, ImageSource, Turn

VISUAL = {
    "image_size": 16,
    "patch_size": 8,
    "width": 16,
    "layers": 1,
    "heads": 2,
    "mlp_ratio": 2.0,
    "output_dim": 32,
    "n_queries": 4,
}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "kv_channels": 16,
    "intermediate_size": 64,
}
CONFIG = {**SIZES, "visual": {**VISUAL, "resampler_heads": 2}}


def tiny_family(**options) -> QwenVLFamily:
    return QwenVLFamily(config=CONFIG, vocabulary="tiny", **options)


def tiny_task(adapter, **options) -> VisionLanguageModule:
    task = VisionLanguageModule(
        family=tiny_family(**options),
        adapter=adapter,
        generation=Generation(max_new_tokens=2),
        metrics={"exact_match": ExactMatch()},
        optim=AdamW(lr=1e-3),
    )
    task.configure_model()
    return task


def read_letters(source: str, read_options) -> list[Conversation]:
    """Each letter is a row with an image; the image of a capital letter cannot be opened."""
    rows = []
    for place, letter in enumerate(source):
        image = (
            ImageSource(b"no image") if letter.isupper() else ImageSource(Image.new("RGB", (9, 9)))
        )
        turns = (Turn(role="user", parts=(image, letter)), Turn(role="assistant", parts=("yes",)))
        rows.append(Conversation(id=letter, turns=turns, index=place))
    return rows
