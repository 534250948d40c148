from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny import CONFIG

from qwenvl_lit.data.collate import Pack, Pad, target_positions
from qwenvl_lit.models import vision_tensors
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.vision_tensors import concatenate_vision
from qwenvl_lit.types import Conversation, Dropped, ImageSource, Sample, Turn

TWO_LAYERS = CONFIG | {"num_hidden_layers": 2}


def conversation(answer: str, *further_answers: str, images: int) -> Conversation:
    parts = [ImageSource(Image.new("RGB", (20, 30), (40 * k, 99, 7))) for k in range(images)]
    turns = [
        Turn(role="user", parts=(*parts, "What?")),
        Turn(role="assistant", parts=(answer,)),
    ]
    for further_answer in further_answers:
        turns.append(Turn(role="user", parts=("What?",)))
        turns.append(Turn(role="assistant", parts=(further_answer,)))
    return Conversation(id=answer, turns=tuple(turns))


def small_family(**options) -> QwenVLFamily:
    return QwenVLFamily(config=TWO_LAYERS, vocabulary="tiny", **options)


def sample(ids: list[int], labels: list[int], image_at: list[int] = ()) -> Sample:
    return Sample(
        conversation=Conversation(id=str(ids), turns=()),
        input_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        vision_positions=torch.tensor(image_at, dtype=torch.int64),
        vision={"pixel_values": torch.full((1 if image_at else 0, 2), float(ids[0]))},
    )


SHORT = sample([1, 2], [-100, 2])
LONG = sample([3, 4, 5, 6], [-100, -100, 5, 6], image_at=[1, 2])
COLLATION = {"pad_id": 9, "collate_vision": concatenate_vision}
PACK = Pack(**COLLATION, max_tokens=12, max_rows=3, longest=4)


def test_training_rows_are_padded_on_the_right():
    batch = Pad(**COLLATION)([SHORT, LONG])
    assert batch.input_ids.tolist() == [[1, 2, 9, 9], [3, 4, 5, 6]]
    assert batch.labels.tolist() == [[-100, 2, -100, -100], [-100, -100, 5, 6]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.vision_positions.tolist() == [5, 6]
    assert batch.target_positions.tolist() == [0, 5, 6]


def test_prompts_are_padded_on_the_left():
    batch = Pad(**COLLATION, side="left")([LONG, SHORT])
    assert batch.input_ids.tolist() == [[3, 4, 5, 6], [9, 9, 1, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch.vision_positions.tolist() == [1, 2]


def test_rows_are_padded_to_a_multiple():
    batch = Pad(**COLLATION, side="left", multiple_of=3)([LONG, SHORT])
    assert batch.input_ids.tolist() == [[9, 9, 3, 4, 5, 6], [9, 9, 9, 9, 1, 2]]
    assert batch.attention_mask.sum(1).tolist() == [4, 2]
    assert batch.vision_positions.tolist() == [3, 4]


def test_positions_point_at_image_tokens_and_before_supervised_tokens():
    batch = Pad(**COLLATION, side="left")([SHORT, LONG, SHORT])
    assert batch.input_ids.flatten()[batch.vision_positions].tolist() == [4, 5]
    successors = batch.labels.flatten()[batch.target_positions + 1]
    assert successors.tolist() == [2, 5, 6, 2]


def test_images_are_concatenated_in_order_and_a_row_may_have_none():
    batch = Pad(**COLLATION)([SHORT, LONG, LONG])
    assert batch.vision["pixel_values"].tolist() == [[3.0, 3.0], [3.0, 3.0]]


def test_the_first_token_of_a_row_is_never_a_target():
    assert target_positions(torch.tensor([[5, -100], [6, 7]])).tolist() == [2]


def test_all_tensors_of_a_batch_move_to_a_device():
    batch = Pad(**COLLATION)([SHORT, LONG]).to("meta")
    assert batch.input_ids.is_meta
    assert batch.vision["pixel_values"].is_meta
    assert batch.position_ids is None
    assert batch.conversations[0].id == "[1, 2]"


def test_packed_samples_follow_each_other_and_their_positions_restart():
    batch = PACK([LONG, SHORT, LONG])
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 9, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 5, 6, -100, 2, -100, -100, 5, 6, -100, -100]]
    assert batch.attention_mask is None
    assert batch.vision_positions.tolist() == [1, 2, 7, 8]
    assert batch.target_positions.tolist() == [1, 2, 4, 7, 8]
    assert batch.vision["pixel_values"].tolist() == [[3.0, 3.0], [3.0, 3.0]]
    assert batch.lengths == (4, 2, 4)


@pytest.mark.parametrize(
    ("samples", "bounds"),
    [
        ([LONG, SHORT, LONG], [0, 4, 6, 10, 12, 12, 12, 12]),
        ([LONG, LONG, LONG], [0, 4, 8, 12, 12, 12, 12, 12]),  # without padding
        # No segment of padding is longer than the longest sample may be.
        ([SHORT], [0, 2, 6, 10, 12, 12, 12, 12]),
        ([], [0, 4, 8, 12, 12, 12, 12, 12]),
    ],
)
def test_segment_bounds_have_the_same_shape_for_any_number_of_samples(samples, bounds):
    batch = PACK(samples)
    assert batch.segment_bounds.tolist() == bounds
    assert batch.segment_bounds.dtype == torch.int32
    assert batch.longest_segment == 4
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (1, 12)


@pytest.mark.parametrize(
    "samples",
    [[SHORT] * 4, [LONG, LONG, LONG, LONG], [sample([1] * 5, [1] * 5)]],
    ids=["too many samples", "too many tokens", "too long a sample"],
)
def test_samples_that_do_not_fit_into_a_row_are_refused(samples):
    limits = r"Pack\(pad_id=9, max_rows=3, longest=4, max_tokens=12\)"
    with pytest.raises(ValueError, match=f"do not fit into {limits}"):
        PACK(samples)


def test_no_packed_sample_learns_to_predict_the_next_one():
    supervised_from_the_start = sample([7, 8], [7, 8])
    batch = PACK([SHORT, supervised_from_the_start])
    assert batch.labels.tolist() == [[-100, 2, -100, 8, *[-100] * 8]]
    assert batch.target_positions.tolist() == [0, 2]


@pytest.mark.parametrize("collate_fn", [Pad(**COLLATION), PACK], ids=["pad", "pack"])
def test_dropped_rows_are_left_out_and_their_reasons_listed(collate_fn):
    batch = collate_fn([SHORT, Dropped("a.jsonl:3: broken"), LONG])
    without = collate_fn([SHORT, LONG])
    assert list(map(str, batch.dropped)) == ["a.jsonl:3: broken"]
    assert without.dropped == ()
    assert batch.input_ids.tolist() == without.input_ids.tolist()
    assert batch.target_positions.tolist() == without.target_positions.tolist()
    assert batch.lengths == without.lengths == (2, 4)


@pytest.mark.parametrize(
    ("collate_fn", "tokens"),
    [(Pad(**COLLATION), 2), (Pad(**COLLATION, side="left"), 2), (PACK, 12)],
    ids=["right", "left", "pack"],
)
def test_a_batch_whose_rows_are_all_dropped_is_padding(collate_fn, tokens):
    batch = collate_fn([Dropped("one"), Dropped("two")])
    assert batch.input_ids.tolist() == [[9] * tokens]
    assert batch.conversations == batch.lengths == ()
    assert list(map(str, batch.dropped)) == ["one", "two"]
    assert not len(batch.target_positions)
    assert not len(batch.vision_positions)


def test_a_data_worker_concatenates_images_in_shared_memory(monkeypatch):
    """Fails when torch changes the private storage methods that `vision_tensors` uses."""
    here = Pad(**COLLATION)([SHORT, LONG, LONG]).vision["pixel_values"]
    monkeypatch.setattr(vision_tensors, "get_worker_info", lambda: "a worker")
    in_worker = Pad(**COLLATION)([SHORT, LONG, LONG]).vision["pixel_values"]
    assert in_worker.is_shared()
    assert not here.is_shared()
    torch.testing.assert_close(in_worker, here, rtol=0, atol=0)


@pytest.mark.parametrize("supervise", ["answers", "official"])
def test_packing_gives_the_same_loss_as_padding(supervise):
    """The loss is the mean over all supervised tokens.

    Float32 sums in another order differ by 2e-7 at most.
    """
    family = small_family(supervise=supervise)
    processor, model = family.processor(), family.load().train()
    answers = [("a car",), ("2", "a tree"), ("no",)]
    samples = []
    for images, texts in enumerate(answers):
        samples.append(processor.encode(conversation(*texts, images=images)))
    lengths = [len(sample.input_ids) for sample in samples]
    collation = {"pad_id": processor.pad_id, "collate_vision": processor.collate_vision}
    limits = {**collation, "max_rows": 3, "longest": max(lengths)}
    full = Pack(**limits, max_tokens=sum(lengths))
    with_padding = Pack(**limits, max_tokens=sum(lengths) + max(lengths) + 7)

    batch = Pad(**collation)(samples)
    padded_loss, padded_gradients = loss_and_gradients(model, family, batch)
    for pack in (full, with_padding):
        loss, gradients = loss_and_gradients(model, family, pack(samples))
        torch.testing.assert_close(loss, padded_loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(gradients, padded_gradients, rtol=1e-4, atol=1e-6)

    sum_of_single = 0
    for sample in samples:
        single = with_padding([sample])
        loss, _ = loss_and_gradients(model, family, single)
        sum_of_single += loss * len(single.target_positions)
    mean = sum_of_single / len(batch.target_positions)
    torch.testing.assert_close(mean, padded_loss, rtol=1e-5, atol=0)


def loss_and_gradients(model, family, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**family.inputs(batch)).loss
    loss.backward()
    return loss.detach(), {name: tensor.grad.clone() for name, tensor in model.named_parameters()}


def test_no_packed_sample_attends_to_another():
    """Ids and images of one sample change; the logits of the others stay bit-identical."""
    family = small_family()
    processor, model = family.processor(), family.load().train()
    first, middle, last = (
        processor.encode(conversation(answer, images=1)) for answer in ("a car", "a tree", "no")
    )
    changed_middle = replace(
        middle,
        input_ids=middle.input_ids.where(middle.labels == -100, 7),
        vision={"pixel_values": 255 - middle.vision["pixel_values"]},
    )
    pack = Pack(**COLLATION, max_tokens=150, max_rows=3, longest=50)
    logits = []
    for sample in (middle, changed_middle):
        inputs = family.inputs(pack([first, sample, last]))
        inputs |= {"labels": None, "target_positions": None}
        logits.append(model(**inputs).logits[0])
    start, stop = len(first.input_ids), len(first.input_ids) + len(middle.input_ids)
    changed = (logits[0] != logits[1]).any(-1)
    assert changed[start:stop].any()
    assert not changed[:start].any()
    assert not changed[stop:].any()


def test_a_row_of_padding_makes_a_step_with_gradients_of_zero():
    family = small_family()
    model = family.load().train()
    output = model(**family.inputs(Pack(**COLLATION, max_tokens=50, max_rows=3, longest=20)([])))
    assert output.logits.shape[1] == 1
    (output.logits.sum() * 0).backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in model.parameters())


def test_packed_rows_have_their_bounds_under_the_names_of_transformers_kernels():
    inputs = small_family().inputs(PACK([SHORT, SHORT]))
    bounds = [0, 2, 4, 8, 12, 12, 12, 12]
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == bounds
    assert inputs["max_length_q"] == inputs["max_length_k"] == 4
    assert "attention_mask" not in inputs


AXES = [replace(SHORT, position_ids=torch.tensor([[0, 1], [0, 7]]))]
AXES.append(replace(LONG, position_ids=torch.tensor([[0, 1, 1, 2], [0, 3, 4, 5]])))


@pytest.mark.parametrize(
    ("collate", "expected"),
    [
        (Pad(**COLLATION), [[[0, 1, 0, 0], [0, 1, 1, 2]], [[0, 7, 0, 0], [0, 3, 4, 5]]]),
        (
            Pad(**COLLATION, side="left"),
            [[[0, 0, 0, 1], [0, 1, 1, 2]], [[0, 0, 0, 7], [0, 3, 4, 5]]],
        ),
        (
            Pack(**COLLATION, max_tokens=7, max_rows=2, longest=4),
            [[[0, 1, 0, 1, 1, 2, 0]], [[0, 7, 0, 3, 4, 5, 0]]],
        ),
    ],
    ids=["right", "left", "packed"],
)
def test_positions_of_samples_are_padded_or_packed(collate, expected):
    batch = collate(AXES)
    assert batch.axis_positions.tolist() == expected
    assert batch.to("meta").axis_positions.is_meta
    assert collate([SHORT, LONG]).axis_positions is None
    assert collate([Dropped("a.jsonl:3: broken")]).axis_positions is None


@pytest.mark.parametrize("collate", [Pad, PACK], ids=["pad", "pack"])
def test_vision_tensors_are_those_that_the_processor_collates(collate):
    def numbers(samples):
        return {"longest": max(len(sample.input_ids) for sample in samples), "a": torch.ones(2)}

    if collate is PACK:
        collate = replace(PACK, collate_vision=numbers)
    else:
        collate = Pad(pad_id=9, collate_vision=numbers)
    batch = collate([SHORT, LONG]).to("meta")
    assert batch.vision["longest"] == 4, "a number stays on the host"
    assert batch.vision["a"].is_meta
    assert collate([]).vision == {}


def test_features_of_no_images_take_the_shape_of_the_others():
    with_images = replace(LONG, vision={"vision_features": torch.ones(1, 3, 2).half()})
    without = replace(SHORT, vision={"vision_features": torch.empty(0)})
    for samples in ([without, with_images], [with_images, without], [without, without]):
        features = concatenate_vision(samples)["vision_features"]
        images = samples.count(with_images)
        assert features.shape == ((1, 3, 2) if images else (0,))
        assert not images or features.dtype == torch.float16
