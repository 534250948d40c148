"""What every model family must do. The tests of a family call these functions.

`family` is small, has random weights and no dropout. `rows` are answered questions: some have one
image, some several and some none, and some have several turns.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn
from toy_task import trainer

from qwenvl_lit.data.collate import Pack, Pad
from qwenvl_lit.data.datamodule import DataModule
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.grounding import Box
from qwenvl_lit.models.components import blocks_of, component_of_tensor, network_of
from qwenvl_lit.models.protocols import Family, FeatureSource, Processor
from qwenvl_lit.training.adapters.methods import Full, LoRA
from qwenvl_lit.training.module import VisionLanguageModule
from qwenvl_lit.training.optim import AdamW
from qwenvl_lit.training.speed import Speed
from qwenvl_lit.types import (
    Batch,
    Conversation,
    DataError,
    GroundedObject,
    ImageSource,
    Sample,
    Turn,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LORA = LoRA(rank=2, alpha=4, dropout=0.0, targets="all-linear")
NEW_TOKENS = 6


def check_lengths(family: Family, rows: Sequence[Conversation]) -> None:
    """`length` tells the size of the sample that `encode` returns."""
    processor = family.processor()
    for row in rows:
        for prompt in (False, True):
            sample = processor.encode(row, prompt=prompt)
            length = processor.length(row, prompt=prompt)
            assert length.tokens == len(sample.input_ids)
            assert length.supervised == int((sample.labels[1:] >= 0).sum())
            assert length.image_tokens == len(sample.vision_positions)
            assert sample.images == (row.prompt() if prompt else row).images
            if sample.position_ids is not None:
                assert sample.position_ids.shape[1] == length.tokens
    assert 0 < processor.length(rows[0]).tokens < family.max_tokens


def check_batches(family: Family, rows: Sequence[Conversation]) -> None:
    """Losses and logits of rows are the same alone, padded and packed."""
    processor, model = family.processor(), family.load().train()
    samples = [processor.encode(row) for row in rows]
    pad = _pad(processor)
    alone = [_loss(family, model, pad([sample])) for sample in samples]
    losses = torch.stack([loss for loss, _ in alone])
    logits = torch.cat([values for _, values in alone])
    batches = [pad(samples)]
    longest = max(len(sample.input_ids) for sample in samples)
    limits = {"max_rows": len(rows) + 2, "longest": longest}
    if family.supports_packing:
        pack = Pack(pad_id=processor.pad_id, collate_vision=processor.collate_vision, **limits)
        with_padding = sum(len(sample.input_ids) for sample in samples) + longest + 3
        batches += [pack(samples), replace(pack, max_tokens=with_padding)(samples)]
    else:
        _refuses_packing(processor)
    for batch in batches:
        loss, of_batch = _loss(family, model, batch)
        torch.testing.assert_close(loss, losses.sum(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(of_batch, logits, rtol=1e-4, atol=1e-5)


def check_training(family: Family, rows: Sequence[Conversation], folder: Path) -> None:
    """Two steps train every tensor, with all blocks recomputed."""
    module = _module(family, Full(), speed=Speed(checkpointing="full"))
    before = family.load().state_dict()
    limits = {"max_steps": 2, "max_epochs": -1}
    losses = _fit(module, rows, folder, **limits, batch_size=len(rows))
    assert len(losses) == 2
    assert torch.isfinite(torch.tensor(losses)).all()
    assert losses[1] < losses[0], "the second step sees the same rows"
    assert all(block.gradient_checkpointing for block in blocks_of(module.model).values())
    for name, tensor in module.model.named_parameters():
        if tensor.requires_grad:
            assert not torch.equal(tensor, before[name]), f"{name} was not trained"


def check_resume(family: Family, rows: Sequence[Conversation], folder: Path) -> None:
    """A resumed run ends with the weights of one that was not interrupted."""
    options = {"max_steps": 3, "max_epochs": -1, "batch_size": 2}
    every_step = ModelCheckpoint(
        dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    whole, resumed = _module(family, LORA), _module(family, LORA)
    losses = _fit(whole, rows, folder, every_step, **options)
    after = _fit(resumed, rows, folder, ckpt_path=folder / "step=1.ckpt", **options)
    assert after == losses[1:]
    for tensor, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(tensor, expected)


def check_adapter(family: Family, rows: Sequence[Conversation]) -> None:
    """Every linear layer but the head takes an adapter, which gets gradients."""
    torch.manual_seed(0)
    model = LORA.apply(family.load(), family).train()
    for name, tensor in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(tensor, std=0.1)
    layers = {}
    for path, module in network_of(model).named_modules():
        if hasattr(module, "base_layer"):
            layers[path] = module
        elif isinstance(module, nn.Linear) and ".lora_" not in path and ".base_layer" not in path:
            component = component_of_tensor(f"{path}.weight", family.components)
            assert component == "head", f"{path} has no adapter"
    assert layers
    processor = family.processor()
    batch = _pad(processor)([processor.encode(row) for row in rows])
    model(**family.inputs(batch)).loss.backward()
    for name, tensor in model.named_parameters():
        if ".lora_" in name:
            assert tensor.grad is not None, name
            assert tensor.grad.any(), name


def check_answers(family: Family, rows: Sequence[Conversation]) -> None:
    """A row has the same answer alone, in a batch and streamed; beams are the same in a batch."""
    processor, model = family.processor(), family.load().eval()
    samples = [processor.encode(row, prompt=True) for row in rows]
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS - 2}
    generation = Generation(**lengths)
    ends = {"stop_ids": processor.stop_ids, "pad_id": processor.pad_id}
    pad = _pad(processor, side="left")

    def inputs(chosen: Sequence[Sample]) -> dict[str, Any]:
        return family.inputs(pad(chosen), generate=True)

    expected = []
    for sample in samples:
        [ids] = generation(model, inputs([sample]), **ends)
        expected.append(ids)
        streamed = list(generation.stream(model, inputs([sample]), **ends))
        assert [token_id for piece in streamed for token_id in piece] == ids
        text = processor.decode(ids, sample.conversation).text
        assert "".join(processor.stream(ids)).strip() == text
    keys = [image.key for image in pad(samples).images]
    for _ in range(2):  # the second time with images that are kept
        assert generation(model, inputs(samples), **ends, image_keys=keys) == expected
    generation.release(model)
    beams = Generation(**lengths, num_beams=2)  # transformers decodes
    alone = [beams(model, inputs([sample]), **ends)[0] for sample in samples]
    assert beams(model, inputs(samples), **ends) == alone


def check_attention(family: Family, rows: Sequence[Conversation]) -> None:
    """Each image has a grid of cells, and each of its tokens attends to them or is one of them."""
    processor, model = family.processor(), family.load().eval()
    batch = _pad(processor)([processor.encode(row) for row in rows])
    with torch.no_grad():
        features = family.image_features(model, batch.vision)
        queries = family.query_attention(model, batch.vision)
    grids = family.image_grids(batch.vision)
    assert len(grids) == len(features) == len(batch.images)
    for index, (height, width) in enumerate(grids):
        tokens = len(features[index])
        if queries is None:
            assert height * width == tokens
        else:
            assert queries[index].shape == (tokens, height * width)
            torch.testing.assert_close(queries[index].sum(1), torch.ones(tokens))


def check_boxes(
    family: Family, sizes: Sequence[tuple[int, int]] = ((640, 480), (333, 1000), (64, 64))
) -> None:
    """A box in pixels is written as the model has it and comes back within a pixel.

    Args:
        sizes: of images that the family does not make smaller.
    """
    processor = family.processor()
    for size in sizes:
        image = ImageSource(Image.new("RGB", size))
        width, height = size
        box = Box(x0=width * 0.1, y0=height * 0.25, x1=width * 0.73, y1=height * 0.9)
        found = GroundedObject(label="the red car", boxes=(box,))
        turns = (
            Turn(role="user", parts=(image, "Find ", GroundedObject(label="the red car"))),
            Turn(role="assistant", parts=(found,)),
        )
        row = Conversation(id="box", turns=turns)
        sample = processor.encode(row)
        answer = sample.labels[sample.labels >= 0].tolist()
        prediction = processor.decode(answer, row)
        [back] = [part for part in prediction.parts if isinstance(part, GroundedObject)]
        assert back.label == found.label
        [in_pixels] = back.boxes
        assert in_pixels.frame == "pixel"
        for side in ("x0", "y0", "x1", "y1"):
            assert abs(getattr(in_pixels, side) - getattr(box, side)) <= 1, (size, side)
        assert prediction.text == prediction.reference
    assert "{image}" in processor.find_prompt
    assert "{question}" in processor.find_prompt


def check_vision_cache(family: Family, rows: Sequence[Conversation]) -> None:
    """Features that were computed before give the losses that the images give."""
    if not family.supports_vision_cache:
        return
    processor, model = family.processor(), family.load().train()
    features = _features(family, processor, model, rows)
    cached = family.processor(features)
    pad = _pad(processor)
    for chosen in (rows, *([row] for row in rows)):
        expected, _ = _loss(family, model, pad([processor.encode(row) for row in chosen]))
        loss, _ = _loss(family, model, pad([cached.encode(row) for row in chosen]))
        torch.testing.assert_close(loss, expected, **CLOSE)


def check_export(
    family: Family, folder: Path, load: Callable[[Path], Family], *, refusal: str | None = None
) -> None:
    """An exported folder has the weights, or exporting is refused by name.

    Args:
        load: makes the family of an exported folder.
        refusal: what the message of the refusal says.
    """
    folder.mkdir(exist_ok=True)
    read = family.base_reader()
    if refusal is not None:
        with pytest.raises(DataError, match=refusal) as error:
            family.export(read, folder, dtype=torch.float32)
        assert "\n" not in str(error.value)
        return
    family.export(read, folder, dtype=torch.float32)
    exported, loaded = load(folder), family.load().state_dict()
    state = exported.load().state_dict()
    assert state.keys() == loaded.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, loaded[name]), name
    question = Conversation(id="q", turns=(Turn(role="user", parts=("What is this?",)),))
    ids = [
        one.processor().encode(question, prompt=True).input_ids.tolist()
        for one in (family, exported)
    ]
    assert ids[0] == ids[1]


# -- helpers ---------------------------------------------------------------------------------------


def _pad(processor: Processor, **options: Any) -> Pad:
    return Pad(pad_id=processor.pad_id, collate_vision=processor.collate_vision, **options)


def _loss(family: Family, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the losses of a batch, and the logits of its supervised tokens."""
    with torch.no_grad():
        output = model(**family.inputs(batch), num_items_in_batch=1)
    assert len(output.logits) == len(batch.target_positions)
    return output.loss, output.logits


def _refuses_packing(processor: Processor) -> None:
    name = type(processor).__name__.removesuffix("Processor")
    with pytest.raises(ValueError, match=f"models of the family {name} cannot train on packed"):
        DataModule(processor=processor, read=None, packing=True, max_tokens=100)


def _module(family: Family, adapter: Full | LoRA, **options: Any) -> VisionLanguageModule:
    torch.manual_seed(0)
    return VisionLanguageModule(
        family=family,
        adapter=adapter,
        generation=Generation(max_new_tokens=2),
        metrics={},
        optim=AdamW(lr=1e-3),
        **options,
    )


class _Losses(lightning.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))


def _fit(
    module: VisionLanguageModule,
    rows: Sequence[Conversation],
    folder: Path,
    *callbacks: lightning.Callback,
    batch_size: int,
    ckpt_path: Path | None = None,
    **options: Any,
) -> list[float]:
    data = DataModule(
        processor=module.processor,
        read=lambda *_: list(rows),
        train="rows",
        batch_size=batch_size,
    )
    losses = _Losses()
    fit = trainer(folder, losses, *callbacks, enable_checkpointing=bool(callbacks), **options)
    fit.fit(module, data, ckpt_path=ckpt_path)
    return losses.losses


def _features(
    family: Family, processor: Processor, model: nn.Module, rows: Sequence[Conversation]
) -> FeatureSource:
    nothing = torch.empty(0, dtype=torch.int64)
    samples: list[Sample] = []
    for row in rows:
        for image in row.images:
            samples.append(
                Sample(
                    conversation=row,
                    input_ids=nothing,
                    labels=nothing,
                    vision_positions=nothing,
                    vision=processor.image_vision(image),
                    images=(image,),
                )
            )
    with torch.no_grad():
        encoded = family.image_features(model, processor.collate_vision(samples))
    stored = {}
    for sample, values in zip(samples, encoded, strict=True):
        [image] = sample.images
        stored[image.key] = values
    return lambda images: [stored[image.key] for image in images]
