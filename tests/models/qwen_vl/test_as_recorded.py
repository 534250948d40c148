"""Settings with which samples are those of ms-swift and of the published fine-tuning script."""

import json
from functools import partial
from pathlib import Path

import pytest
from parity.chat import turns_of
from parity.conversations import golden_sample, sample, swift_sample

from qwenvl_lit.models.qwen_vl.processor import QwenVLProcessor
from qwenvl_lit.models.qwen_vl.tokenizer import QwenTokenizer
from qwenvl_lit.types import Conversation, DataError

GOLDEN = Path(__file__).parents[2] / "golden"
TOKENIZER = QwenTokenizer(GOLDEN / "tokenizer" / "synthetic.tiktoken")
processor = partial(QwenVLProcessor, TOKENIZER, image_size=14)


def cases(name: str) -> dict[str, dict]:
    """The recorded cases of a file by name."""
    data = json.loads((GOLDEN / "chat" / f"{name}_synthetic.json").read_text())
    return {case["name"]: case for case in data["cases"]}


@pytest.mark.parametrize("name", ["system_empty", "default_system_off"])
def test_without_a_system_message_samples_are_those_of_ms_swift_with_an_empty_one(name):
    case = cases("train_swift")[name]
    without = {**case, "example": {**case["example"], "system": None}}
    assert swift_sample(processor(system="none"), without, {}) == golden_sample(case, TOKENIZER)


@pytest.mark.parametrize("limit", [16, 40, 64])
def test_truncated_on_the_right_samples_are_those_of_the_fine_tuning_script(limit):
    case = cases("train_finetune")[f"max_len_{limit}"]
    truncating = processor(supervise="official", max_length=limit, too_long="truncate_right")
    ours = sample(truncating, Conversation(id="a", turns=turns_of(case["conversations"])))
    golden = golden_sample(case, TOKENIZER)
    # The script cuts an image as well, which leaves it half of a span; here it is left out.
    start = TOKENIZER.img_start_id
    kept = golden["ids"].index(start) if start in golden["ids"] else limit
    assert ours == {name: values[:kept] for name, values in golden.items()}


def test_a_sample_whose_answer_is_cut_off_is_refused():
    talk = Conversation(
        id="a", turns=turns_of(cases("train_finetune")["empty_answer"]["conversations"])
    )
    with pytest.raises(DataError, match="truncate_right leaves no answer of the row"):
        processor(max_length=8, too_long="truncate_right").encode(talk)
