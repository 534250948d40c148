import pytest
from small_qwen3_vl import KINDS
from transformers import AutoConfig, PreTrainedConfig

from qwenvl_lit.models.qwen3_vl.memory import answering_bytes, loss_bytes

GIB = 2**30
BFLOAT16 = 2  # bytes
ANSWERS = {"rows": 8, "tokens": 1000, "image_tokens": 800, "new_tokens": 64}
LOSSES = {"rows": 8, "tokens": 1000, "image_tokens": 800, "supervised": 16}


@pytest.fixture(params=KINDS)
def config(request) -> PreTrainedConfig:
    """The sizes of Qwen2.5-VL-7B and Qwen3-VL-8B."""
    if request.param == "qwen2_5_vl":
        text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        text |= {"num_attention_heads": 28, "num_key_value_heads": 4}
        return AutoConfig.for_model(
            "qwen2_5_vl", text_config=text, vision_config={"hidden_size": 1280}
        )
    text = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
    text |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    return AutoConfig.for_model("qwen3_vl", text_config=text)


def test_the_cache_has_the_keys_and_values_of_the_grouped_heads(config):
    def size(new_tokens: int) -> int:
        sizes = {"rows": 64, "tokens": 256, "image_tokens": 0, "at_once": False}
        return answering_bytes(config, BFLOAT16, **sizes, new_tokens=new_tokens)

    text = config.text_config
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * 128 * BFLOAT16
    # 64 rows have slots for a multiple of 64 tokens
    assert size(512) - size(256) == 64 * 256 * per_token
    assert size(257) == size(320)


def test_prompts_and_images_are_read_in_passes_unless_transformers_reads_them(config):
    sizes = ANSWERS | {"rows": 128}
    in_passes = answering_bytes(config, BFLOAT16, **sizes, at_once=False)
    at_once = answering_bytes(config, BFLOAT16, **sizes, at_once=True)
    assert at_once - in_passes > 10 * GIB


def test_memory_grows_with_every_size(config):
    answers = answering_bytes(config, BFLOAT16, **ANSWERS, at_once=False)
    assert 1 < answers / GIB < 4
    for name in ANSWERS:
        larger = ANSWERS | {name: 8 * ANSWERS[name]}
        assert answering_bytes(config, BFLOAT16, **larger, at_once=False) > answers
    losses = loss_bytes(config, BFLOAT16, **LOSSES)
    assert 1 < losses / GIB < 4
    for name in ("rows", "tokens", "supervised"):
        assert loss_bytes(config, BFLOAT16, **LOSSES | {name: 8 * LOSSES[name]}) > losses
