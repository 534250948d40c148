"""A model that is spread over devices answers as it does on one, and stays where it is."""

import pytest
from lightning.pytorch.callbacks import LambdaCallback
from test_families_checkpoint import SIZES
from toy_task import trainer

from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.families.qwen_vl import QwenVL
from qwenvl_lit.generation import Generation
from qwenvl_lit.models.tokenizer import TINY_VOCABULARY
from qwenvl_lit.strategies import AsPlaced
from qwenvl_lit.task import Task
from qwenvl_lit.types import Conversation, DataError, Turn
from scripts.make_checkpoint import write_checkpoint

ON_DISK = {"transformer.wte": "cpu", "transformer.h.0": "cpu", "transformer.h.1": "disk", "transformer.ln_f": "cpu"}
ON_DISK |= {"transformer.visual": "cpu", "lm_head": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "small"
    write_checkpoint(QwenVL(config=SIZES, vocabulary="tiny").load(), TINY_VOCABULARY, folder, kind="safetensors")
    return str(folder)


def task(folder: str, **options) -> Task:
    return Task(family=QwenVL(path=folder, **options), adapter=None, generation=Generation(max_new_tokens=4), metrics={})


def rows(made: Task) -> DataModule:
    asked = [(Turn(role="user", parts=(text,)), Turn(role="assistant", parts=("2",))) for text in ("How many?", "What?")]
    questions = [Conversation(id=str(place), turns=turns, index=place) for place, turns in enumerate(asked)]
    return DataModule(processor=made.processor, read=lambda source, reading: questions, test="questions", train="questions")


def answers(tmp_path, made: Task, **options) -> list[str]:
    texts: list[str] = []
    keep = LambdaCallback(on_predict_batch_end=lambda trainer, module, outputs, *_: texts.extend(answer.text for answer in outputs))
    trainer(tmp_path, keep, **options).predict(made, rows(made), return_predictions=False)
    assert len(texts) == 2
    return texts


def test_a_spread_model_answers_as_on_one_device_and_is_not_moved(folder, tmp_path):
    whole, spread = task(folder), task(folder, device_map=ON_DISK)
    assert answers(tmp_path, spread, strategy=AsPlaced()) == answers(tmp_path, whole)
    assert spread.model.hf_device_map == ON_DISK
    assert spread.model.transformer.h[1].ln_1.weight.device.type == "meta"  # what is on the disk is read when it is needed


def test_a_spread_model_is_not_trained(folder, tmp_path):
    spread = task(folder, device_map=ON_DISK)
    with pytest.raises(DataError, match="train with strategy=ddp"):
        trainer(tmp_path, strategy=AsPlaced(), max_steps=1).fit(spread, rows(spread))
