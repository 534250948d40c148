"""Rows are answered together as transformers answers each alone, whatever their lengths, images and ends."""

import gc
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_network import (
    IMAGE,
    QUERIES,
    SIDE,
    image_positions,
    images,
    padded,
    small_config,
    small_network,
    tensor,
    text,
)
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.generation.sampling import Choice, Stops
from qwenvl_lit.models.qwen_vl.decoder import decoder_of
from qwenvl_lit.models.qwen_vl.image_cache import REMEMBERED, TOGETHER, ImageCache
from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM

STOPS = (7, 9)
ENDS = {"stop_ids": STOPS, "pad_id": 0}


@pytest.fixture
def model() -> QwenVLForCausalLM:
    return small_network()


def prompts() -> list[list[int]]:
    """Of 1 to 140 tokens, four of them images: alpha is 1, 3, 7 and 15 where the network was trained on 32."""
    return [
        text(3) + IMAGE + text(5),
        IMAGE + text(2) + IMAGE + text(4, seed=1),
        text(1, seed=5),
        text(31, seed=6),
        IMAGE + text(20, seed=8),
        *(text(length, seed=length) for length in (32, 33, 64, 65, 140)),
    ]


def together(rows: list[list[int]], seen: torch.Tensor) -> dict[str, torch.Tensor]:
    ids, mask = padded(rows, side="left")
    return {
        "input_ids": tensor(*ids),
        "attention_mask": mask,
        "pixel_values": seen,
        "vision_positions": image_positions(ids),
    }


def alone(model, rows: list[list[int]], seen: torch.Tensor, **options) -> list[list[int]]:
    """What transformers answers to each row by itself."""
    answers, used = [], 0
    for row in rows:
        count = row.count(IMAGE[0])
        given = {"pixel_values": seen[used : used + count]} if count else {}
        used += count
        options = {"max_new_tokens": 12, "do_sample": False, **options}
        ids = torch.tensor([row])
        new = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **given,
            pad_token_id=0,
            eos_token_id=list(STOPS),
            **options,
        )
        new = new[0, len(row) :].tolist()
        answers.append(
            new[: next((place for place, id in enumerate(new) if id in STOPS), len(new))]
        )
    return answers


# -- greedy -----------------------------------------------------------------------------------------------------------------------


def test_a_batch_is_answered_as_its_rows_are_alone(model):
    rows, seen = prompts(), images(4)
    expected = alone(model, rows, seen)
    assert {len(answer) for answer in expected} > {12}  # some come to an end before
    assert Generation(max_new_tokens=12)(model, together(rows, seen), **ENDS) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"min_new_tokens": 6},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7, "min_new_tokens": 12},
    ],
    ids=str,
)
def test_settings_do_what_they_do_in_transformers(model, options):
    rows, seen = prompts(), images(4)
    expected = alone(model, rows, seen, **options)
    assert Generation(max_new_tokens=12, **options)(model, together(rows, seen), **ENDS) == expected


def test_long_answers_look_at_more_and_more_of_the_cache(model):
    rows = [text(length, seed=length) for length in (100, 90, 101, 3, 5, 6)]
    expected = alone(model, rows, images(0), max_new_tokens=60, min_new_tokens=60)
    for _ in range(2):  # the second time in a cache that is there
        found = Generation(max_new_tokens=60, min_new_tokens=60)(
            model, together(rows, images(0)), **ENDS
        )
        assert found == expected


def test_nothing_of_an_earlier_batch_is_left(model):
    rows, seen = prompts(), images(4)
    generation = Generation(max_new_tokens=12)
    first = generation(model, together(rows[:2], seen[:3]), **ENDS)
    generation(model, together(rows, seen), **ENDS)
    assert (
        generation(model, together(rows[:2], seen[:3]), **ENDS)
        == first
        == alone(model, rows[:2], seen[:3])
    )


def test_rows_that_fill_up_a_larger_graph_change_nothing(model, monkeypatch):
    rows, seen = prompts()[:5], images(4)
    monkeypatch.setattr(decoder_of(model), "_size", lambda n, slots: 8)
    assert Generation(max_new_tokens=12)(model, together(rows, seen), **ENDS) == alone(
        model, rows, seen
    )


def test_a_prompt_goes_in_by_parts_that_fit(model, monkeypatch):
    monkeypatch.setattr("qwenvl_lit.models.qwen_vl.decoder.PROMPT_TOKENS", 300)  # two rows of 140
    rows, seen = prompts(), images(4)
    assert Generation(max_new_tokens=12)(model, together(rows, seen), **ENDS) == alone(
        model, rows, seen
    )


def test_adapters_are_part_of_the_network(model):
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    rows, seen = prompts(), images(4)
    expected = alone(adapted, rows, seen)
    assert Generation(max_new_tokens=12)(adapted, together(rows, seen), **ENDS) == expected
    with adapted.disable_adapter():
        plain = Generation(max_new_tokens=12)(adapted, together(rows, seen), **ENDS)
    assert plain != expected


def test_beams_are_those_of_transformers(model):
    rows, seen = prompts()[:2], images(3)
    found = Generation(max_new_tokens=8, num_beams=3)(model, together(rows, seen), **ENDS)
    assert found == alone(model, rows, seen, max_new_tokens=8, num_beams=3)


def test_a_network_spread_over_devices_decodes_by_transformers(model):
    model.hf_device_map = {"transformer": 0, "lm_head": "cpu"}
    assert decoder_of(model) is None
    rows = [text(4), text(4, seed=1)]
    assert Generation(max_new_tokens=12)(model, together(rows, images(0)), **ENDS) == alone(
        model, rows, images(0)
    )


@pytest.mark.parametrize("changes", [{"use_dynamic_ntk": False}, {"use_logn_attn": False}], ids=str)
def test_networks_without_the_rules_for_long_texts(changes):
    model = small_network(**changes)
    rows = [text(90), text(40, seed=1), text(3, seed=2)]
    assert Generation(max_new_tokens=12)(model, together(rows, images(0)), **ENDS) == alone(
        model, rows, images(0)
    )


# -- compiled ---------------------------------------------------------------------------------------------------------------------


def test_compiled_blocks_answer_the_same_and_are_compiled_once(model, monkeypatch):
    rows, seen = prompts(), images(4)
    expected = alone(model, rows, seen)
    traced = []

    def backend(graph, example):
        traced.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    generation = Generation(max_new_tokens=12, compile=True)
    assert generation(model, together(rows, seen), **ENDS) == expected
    assert decoder_of(model).compiled
    assert (
        len(traced) == 4
    )  # before and after attention, of a prompt and of a step, whatever the number of blocks
    shorter = rows[:7]
    assert generation(model, together(shorter, seen), **ENDS) == expected[:7]
    assert len(traced) == 6  # another number of rows is another step, but the same prompt
    assert (
        replace(generation, compile=False)(model, together(shorter, seen), **ENDS) == expected[:7]
    )
    assert not decoder_of(model).compiled


def test_the_tower_is_compiled_for_whole_parts_only(model, monkeypatch):
    traced = []
    torch._dynamo.reset()
    monkeypatch.setattr(
        torch,
        "compile",
        partial(
            torch.compile, backend=lambda graph, example: traced.append(graph) or graph.forward
        ),
    )
    rows, seen = (
        [IMAGE + text(2, seed=place) for place in range(TOGETHER + 1)],
        images(TOGETHER + 1),
    )
    expected = Generation(max_new_tokens=2)(model, together(rows, seen), **ENDS)
    assert (
        Generation(max_new_tokens=2, compile=True)(model, together(rows, seen), **ENDS) == expected
    )
    towers = [
        graph for graph in traced if any("gelu" in str(node.target) for node in graph.graph.nodes)
    ]
    assert len(towers) == 1  # for all blocks; and the image that is left over goes through as it is
    assert all(
        "forward" not in vars(block) for block in model.transformer.visual.transformer["resblocks"]
    )


def test_what_cannot_be_compiled_is_said_once_and_decoded_all_the_same(model, monkeypatch, caplog):
    attention = type(model.transformer.h[0].attn)
    heads = attention.heads

    def stubborn(self, x, rotary):
        torch._dynamo.graph_break()
        return heads(self, x, rotary)

    monkeypatch.setattr(attention, "heads", stubborn)
    rows, seen = prompts()[:2], images(3)
    for _ in range(2):
        assert Generation(max_new_tokens=12, compile=True)(
            model, together(rows, seen), **ENDS
        ) == alone(model, rows, seen)
    ours = [record for record in caplog.records if record.name.startswith("qwenvl_lit")]
    assert [record.message.split(":")[0] for record in ours] == [
        "decoding goes on without compilation"
    ]


# -- graphs -----------------------------------------------------------------------------------------------------------------------


class Replay:
    """Does what a CUDA graph does: the same step again, on tensors in the same places."""

    def __init__(self, decoder, size: int, in_use: int):
        self.decoder, self.step, self.places = (
            decoder,
            partial(decoder._step, size, in_use),
            self._places(decoder, size),
        )
        self.size, self.replays = size, 0
        self.logits = self.step()

    @staticmethod
    def _places(decoder, size: int) -> list[int]:
        rows = decoder.rows[size]
        tensors = (decoder.memory, rows.ids, rows.slot, rows.starts, rows.frequencies)
        return [some.data_ptr() for some in tensors] + [decoder._cache(size).shape[4]]

    def replay(self) -> None:
        assert self._places(self.decoder, self.size) == self.places
        self.replays += 1
        self.logits.copy_(self.step())


@pytest.fixture
def replaying(model, monkeypatch):
    """The model's decoder as on a GPU, with steps that are recorded and replayed."""
    decoder = decoder_of(model)
    monkeypatch.setattr(decoder, "_graphs_help", lambda: True)

    def capture(size: int, in_use: int):
        graph = Replay(decoder, size, in_use)
        return graph, graph.logits

    monkeypatch.setattr(decoder, "_captured", capture)
    return decoder


def test_steps_are_recorded_once_for_a_number_of_rows(model, replaying):
    rows, seen = prompts(), images(4)
    expected = alone(model, rows, seen)
    generation = Generation(max_new_tokens=12)
    assert generation(model, together(rows, seen), **ENDS) == expected
    assert list(replaying.graphs) == [(10, 256)]
    assert (
        generation(model, together(rows[:7], seen), **ENDS) == expected[:7]
    )  # the last batch of a dataset, say
    assert list(replaying.graphs) == [(10, 256), (10, 128)]
    assert generation(model, together(rows[:7], seen), **ENDS) == expected[:7]
    assert {size for size, _ in replaying.graphs} == {10, 7}  # it was no exception
    recorded = dict(replaying.graphs)
    for _ in range(2):
        assert generation(model, together(rows, seen), **ENDS) == expected
    assert replaying.graphs == recorded
    assert recorded[10, 256][0].replays > 12


def test_a_larger_batch_makes_the_cache_anew_and_a_longer_answer_looks_further(model, replaying):
    generation = Generation(max_new_tokens=60, min_new_tokens=60)
    few, many = (
        [text(4, seed=place) for place in range(5)],
        [text(90, seed=place) for place in range(6)],
    )
    options = {"max_new_tokens": 60, "min_new_tokens": 60}
    expected = [alone(model, rows, images(0), **options) for rows in (few, many)]
    assert generation(model, together(few, images(0)), **ENDS) == expected[0]
    assert list(replaying.graphs) == [(5, 128)]
    assert generation(model, together(many, images(0)), **ENDS) == expected[1]
    assert list(replaying.graphs) == [(6, 128), (6, 256)]
    assert generation(model, together(few, images(0)), **ENDS) == expected[0]
    assert generation(model, together(few[:2], images(0)), **ENDS) == expected[0][:2]
    assert {size for size, _ in replaying.graphs} == {5, 6}
    long = [text(300)]
    assert generation(model, together(long, images(0)), **ENDS) == alone(
        model, long, images(0), **options
    )
    assert (1, 512) in replaying.graphs  # not one of six rows, which there is no room for


def test_steps_that_cannot_be_recorded_are_made_all_the_same(model, replaying, monkeypatch, caplog):
    def fails(size: int, in_use: int):
        raise RuntimeError(
            "operation not permitted when stream is capturing\nCUDA kernel errors might be reported late"
        )

    monkeypatch.setattr(type(replaying), "_graphs_help", lambda self: self.graphable)
    monkeypatch.delattr(replaying, "_graphs_help")
    monkeypatch.setattr(replaying, "_captured", fails)
    rows, seen = prompts()[:2], images(3)
    for _ in range(2):
        assert Generation(max_new_tokens=12)(model, together(rows, seen), **ENDS) == alone(
            model, rows, seen
        )
    (record,) = caplog.records
    assert record.message.endswith(
        "which is slower: RuntimeError: operation not permitted when stream is capturing"
    )


def test_auto_compiles_on_a_gpu_after_a_minute_of_answers(model, replaying, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    rows, seen = prompts()[:2], images(3)
    expected, generation = alone(model, rows, seen), Generation(max_new_tokens=12)
    clock = iter(range(0, 10_000, 4))  # twelve steps are three quarters of a minute
    monkeypatch.setattr("qwenvl_lit.models.qwen_vl.decoder.perf_counter", lambda: next(clock))
    compiled = []
    for _ in range(4):
        assert generation(model, together(rows, seen), **ENDS) == expected
        compiled.append(replaying.compiled)
    assert compiled == [False, False, True, True]


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_graphs_of_a_gpu_answer_as_eager_steps_do(compile):
    model, rows, seen = small_network().cuda(), prompts(), images(4).cuda()
    expected = alone(small_network(), rows, images(4), max_new_tokens=40)
    inputs = {name: value.cuda() for name, value in together(rows, seen.cpu()).items()}
    generation = Generation(max_new_tokens=40, compile=compile)
    for _ in range(2):
        assert generation(model, inputs, **ENDS) == expected
    decoder = decoder_of(model)
    assert decoder.graphs
    assert decoder.graphable
    assert decoder.compiled == compile
    one = {name: value.cuda() for name, value in together(rows[:1], seen[:1].cpu()).items()}
    for _ in range(2):
        assert [id for ids in generation.stream(model, one, **ENDS) for id in ids] == expected[0]


# -- streams ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "seed": 3}, {"max_new_tokens": 1}], ids=str
)
def test_a_stream_has_the_ids_of_the_whole_answer(model, options):
    generation = Generation(**{"max_new_tokens": 12, **options})
    for row, seen in (
        (prompts()[0], images(1)),
        (prompts()[9], images(0)),
    ):  # the second comes to an end
        inputs = together([row], seen)
        (answer,) = generation(model, inputs, **ENDS)
        assert [id for ids in generation.stream(model, inputs, **ENDS) for id in ids] == answer


def test_a_stream_can_be_left_and_is_no_other_answers(model):
    inputs, generation = (
        together([text(5)], images(0)),
        Generation(max_new_tokens=12, min_new_tokens=12),
    )
    (answer,) = generation(model, inputs, **ENDS)
    stream = generation.stream(model, inputs, **ENDS)
    assert next(stream) == answer[:1]
    assert generation(model, inputs, **ENDS) == [answer]
    with pytest.raises(ValueError, match="another answer of this model was begun"):
        list(stream)


def test_streams_have_one_row_and_no_beams(model):
    with pytest.raises(ValueError, match="one prompt at a time"):
        Generation().stream(model, together([text(5), text(6)], images(0)), **ENDS)
    with pytest.raises(ValueError, match="num_beams=1"):
        Generation(num_beams=2).stream(model, together([text(5)], images(0)), **ENDS)


# -- sampling ---------------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_transformers():
    logits = 3 * torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    ids, mask = padded([text(6), text(3, seed=1), text(9, seed=2)], side="left")
    inputs = {"input_ids": tensor(*ids).clamp(max=49), "attention_mask": mask}
    found = Choice(
        inputs,
        logits,
        STOPS,
        do_sample=True,
        temperature=0.7,
        top_k=12,
        top_p=0.8,
        repetition_penalty=1.4,
        min_new_tokens=2,
    ).scores(logits)
    for row in range(3):
        said = inputs["input_ids"][row][mask[row].bool()][None]
        rules = LogitsProcessorList(
            [
                logits_process.RepetitionPenaltyLogitsProcessor(1.4),
                logits_process.MinNewTokensLengthLogitsProcessor(
                    said.shape[1], 2, list(STOPS), device="cpu"
                ),
                logits_process.TemperatureLogitsWarper(0.7),
                logits_process.TopKLogitsWarper(12),
                logits_process.TopPLogitsWarper(0.8),
            ]
        )
        torch.testing.assert_close(found[row : row + 1], rules(said, logits[row : row + 1].clone()))


def test_draws_have_the_distribution_of_the_scores():
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -4.0]).expand(40_000, -1)
    choice = Choice({}, logits, (), do_sample=True, top_k=4, seed=0)
    shares = torch.bincount(choice(logits), minlength=6) / len(logits)
    expected = logits[0, :4].softmax(-1)
    torch.testing.assert_close(
        shares[:4], expected, atol=0.01, rtol=0
    )  # four standard deviations of 40,000 draws
    assert not shares[4:].any()


def test_a_seed_repeats_an_answer(model):
    inputs = together(prompts()[:2], images(3))
    drawn = [
        Generation(max_new_tokens=12, min_new_tokens=12, do_sample=True, top_p=0.95, seed=seed)(
            model, inputs, **ENDS
        )
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    torch.manual_seed(5)
    free = Generation(max_new_tokens=12, min_new_tokens=12, do_sample=True)
    first, second = free(model, inputs, **ENDS), free(model, inputs, **ENDS)
    torch.manual_seed(5)
    assert free(model, inputs, **ENDS) == first != second


def test_decoding_ends_when_every_row_has_ended():
    stops = Stops(3, STOPS, torch.device("cpu"))
    assert [stops.all_seen(torch.tensor(ids)) for ids in ([7, 1, 2], [1, 1, 9], [1, 7, 1])] == [
        False,
        False,
        True,
    ]
    assert not Stops(1, (), torch.device("cpu")).all_seen(torch.tensor([7]))


@pytest.mark.parametrize(
    "wrong",
    [{"compile": "yes"}, {"max_new_tokens": 0}, {"max_new_tokens": 3, "min_new_tokens": 4}],
    ids=str,
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=f"generation.{next(iter(wrong))}"):
        Generation(**wrong)


# -- images ---------------------------------------------------------------------------------------------------------------------


def test_equal_images_are_encoded_once(model):
    rows, seen = [IMAGE + text(3, seed=place) for place in range(4)], images(2)[[0, 1, 0, 0]]
    encoded = []
    model.transformer.visual.register_forward_hook(
        lambda module, args, out: encoded.append(len(out))
    )
    generation = Generation(max_new_tokens=12)
    expected = generation(model, together(rows, seen), **ENDS)
    assert encoded == [4]
    assert (
        generation(model, together(rows, seen), **ENDS, image_keys=["a", "b", "a", "a"]) == expected
    )
    assert encoded == [4, 2]
    assert (
        generation(model, together(rows[1:2], seen[1:2]), **ENDS, image_keys=["b"]) == expected[1:2]
    )
    assert encoded == [4, 2]
    generation.release(model)
    generation(model, together(rows[1:2], seen[1:2]), **ENDS, image_keys=["b"])
    assert encoded == [4, 2, 1]


def test_the_oldest_images_are_forgotten():
    asked, known = [], ImageCache()

    def encode(pixels):
        asked.extend(pixels[:, 0].tolist())
        return pixels[:, :, None].expand(-1, QUERIES, 2)

    values = torch.arange(REMEMBERED + 1.0)[:, None]
    found = known(values, [str(place) for place in range(len(values))], encode)
    assert torch.equal(found[:, 0, 0], values[:, 0])
    asked.clear()
    assert known(values[[1, 0]], ["1", "0"], encode)[:, 0, 0].tolist() == [1, 0]
    assert asked == [0]


def test_keys_are_as_many_as_images(model):
    with pytest.raises(ValueError, match="2 keys for 1 images"):
        Generation()(model, together([IMAGE], images(1)), **ENDS, image_keys=["a", "b"])


def test_a_network_that_is_given_up_takes_its_cache_with_it():
    model = small_network()
    Generation(max_new_tokens=2)(model, together([text(3)], images(0)), **ENDS)
    gone = weakref.ref(decoder_of(model))
    del model
    gc.collect()
    assert gone() is None


def test_nothing_of_a_step_waits_for_the_device_or_leaves_it(monkeypatch):
    """On the meta device a value that is asked for, or a tensor of the host beside one of the device, is an error."""
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda device: False
    )  # which knows no such device
    with torch.device("meta"):
        model = QwenVLForCausalLM(small_config()).eval()
        inputs = {
            "input_ids": torch.empty(6, 20, dtype=torch.int64),
            "pixel_values": torch.empty(3, 3, SIDE, SIDE),
        }
        inputs["vision_positions"] = torch.empty(3 * QUERIES, dtype=torch.int64)
    decoder = decoder_of(model)
    with torch.inference_mode():
        logits = decoder.start(
            inputs, new_tokens=8
        )  # without a mask: how long the rows are is asked once
        choice = Choice(
            inputs,
            logits,
            STOPS,
            repetition_penalty=1.2,
            min_new_tokens=1,
            do_sample=True,
            temperature=0.5,
            top_k=5,
            top_p=0.9,
        )
        for _ in range(2):
            logits = decoder.step(choice(logits))
    assert logits.device.type == "meta"
    assert logits.shape == (6, 64)
