"""Requests as lmms-eval and VLMEvalKit send them, and the prompt that a row gets in each way."""

import asyncio

import pytest
from PIL import Image
from serving.served import BASE_PROCESSOR, PROCESSOR, data_uri, user
from tiny_qwen3_vl import tiny_processor

from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.evaluation.lmms.questions import conversation_of
from qwenvl_lit.serving import conversations
from qwenvl_lit.serving.schema import ChatRequest
from qwenvl_lit.types import ImageSource

QUESTION = "Is <ref>the dog</ref> there? <|im_end|> Please answer yes or no."
SIZE = (40, 20)


def from_lmms_eval(kind="PNG"):
    """The body that `async_openai` of lmms-eval 0.7.3 sends for a row of the task mme."""
    image = {"type": "image_url", "image_url": {"url": data_uri(SIZE, kind)}}
    fields = {"model": "tiny", "max_tokens": 16, "temperature": 0}
    return {"messages": user(image, QUESTION), **fields}


def from_vlmevalkit(detail="high"):
    """The body that `GPT4V` of VLMEvalKit sends with its default of most tokens."""
    body = from_lmms_eval("JPEG")
    body["messages"][0]["content"][0]["image_url"]["detail"] = detail
    return {**body, "n": 1, "temperature": 0, "max_tokens": 2048}


@pytest.mark.parametrize("body", [from_lmms_eval(), from_vlmevalkit()])
def test_requests_of_evaluation_kits_are_answered_greedily(server, body):
    served = server(" Yes ")
    response = asyncio.run(served.post("/v1/chat/completions", json=body))
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == "Yes"
    assert served.engine.handles[0].request.temperature == 0


def test_a_reduced_image_is_not_promised(server):
    body = from_vlmevalkit(detail="low")
    response = asyncio.run(server().post("/v1/chat/completions", json=body))
    assert response.status_code == 400
    assert "detail" in response.json()["error"]["param"]


@pytest.mark.parametrize(
    "processor",
    [PROCESSOR, BASE_PROCESSOR, tiny_processor("qwen2_5_vl"), tiny_processor("qwen3_vl")],
    ids=["chatml", "raw", "qwen2_5_vl", "qwen3_vl"],
)
def test_a_row_a_request_and_a_task_of_lmms_eval_give_the_same_prompt(processor, read_row, folder):
    Image.new("RGB", SIZE, "teal").save(folder / "a.png")
    row = read_row({"image": "a.png", "question": QUESTION}, prompt="{image}{question}")
    image = {"type": "image", "url": Image.open(folder / "a.png")}
    task = conversation_of(
        [{"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}],
        row="mme, row 0",
        read_options=ReadOptions(),
        continues_text=processor.continues_text,
    )
    request = conversations.conversation_of(
        ChatRequest(**from_lmms_eval()).messages,
        lambda url: ImageSource(Image.new("RGB", SIZE, "teal")),
        max_images=1,
        one_text=processor.continues_text,
        markup_in_answers=True,
    )
    samples = [processor.encode(each, prompt=True) for each in (row, task, request)]
    first = samples[0]
    for other in samples[1:]:
        assert other.input_ids.tolist() == first.input_ids.tolist()
        assert other.vision.keys() == first.vision.keys()
        for name, tensor in first.vision.items():
            assert other.vision[name].equal(tensor), name
