"""The smallest Qwen-VL, and a module that trains it on rows of one letter each."""

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
    """A module with its weights; `options` are those of the family."""
    module = VisionLanguageModule(
        family=tiny_family(**options),
        adapter=adapter,
        generation=Generation(max_new_tokens=2),
        metrics={"exact_match": ExactMatch()},
        optim=AdamW(lr=1e-3),
    )
    module.configure_model()
    return module


def read_letters(source: str, read_options) -> list[Conversation]:
    """Makes each letter a row with an image; the image of a capital letter cannot be decoded."""
    rows = []
    for index, letter in enumerate(source):
        content = b"no image" if letter.isupper() else Image.new("RGB", (9, 9))
        turns = (
            Turn(role="user", parts=(ImageSource(content), letter)),
            Turn(role="assistant", parts=("yes",)),
        )
        rows.append(Conversation(id=letter, turns=turns, index=index))
    return rows
