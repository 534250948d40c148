"""Rows are answered together as transformers answers each alone, whatever their lengths, images and
ends."""

import gc
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_network import (
    CLOSE,
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

from qwenvl_lit.generation.decoders import decoder_of
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.generation.sampling import FiniteLogits, NextToken, Sampling, Stops
from qwenvl_lit.models.qwen_vl.decoder import IMAGES_PER_PASS
from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM
from qwenvl_lit.types import DataError

STOPS = (7, 9)
ENDS = {"stop_ids": STOPS, "pad_id": 0}


@pytest.fixture
def model() -> QwenVLForCausalLM:
    return small_network()


def prompts() -> list[list[int]]:
    """Prompts of 1 to 140 tokens; the first five have four images.

    The network's `seq_length` is 32, so that their alphas are 1, 3, 7 and 15.
    """
    return [
        text(3) + IMAGE + text(5),
        IMAGE + text(2) + IMAGE + text(4, seed=1),
        text(1, seed=5),
        text(31, seed=6),
        IMAGE + text(20, seed=8),
        *(text(length, seed=length) for length in (32, 33, 64, 65, 140)),
    ]


def batch_of(rows: list[list[int]], pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    ids, mask = padded(rows, side="left")
    return {
        "input_ids": tensor(*ids),
        "attention_mask": mask,
        "pixel_values": pixels,
        "vision_positions": image_positions(ids),
    }


def together(model, rows, pixels, generation: Generation | None = None, **call) -> list[list[int]]:
    """The answers of `generation` to a batch of all rows."""
    generation = generation or Generation(max_new_tokens=12)
    return generation(model, batch_of(rows, pixels), **ENDS, **call)


def alone(model, rows: list[list[int]], pixels: torch.Tensor, **options) -> list[list[int]]:
    """The answers of transformers' `generate` to each row by itself."""
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    answers, used = [], 0
    for row in rows:
        count = row.count(IMAGE[0])
        image = {"pixel_values": pixels[used : used + count]} if count else {}
        used += count
        ids = torch.tensor([row])
        new = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **image,
            pad_token_id=0,
            eos_token_id=list(STOPS),
            **options,
        )
        answer = []
        for token_id in new[0, len(row) :].tolist():
            if token_id in STOPS:
                break
            answer.append(token_id)
        answers.append(answer)
    return answers


# -- greedy ----------------------------------------------------------------------------------------


def test_a_batch_is_answered_as_its_rows_are_alone(model):
    rows, pixels = prompts(), images(4)
    expected = alone(model, rows, pixels)
    assert {len(answer) for answer in expected} > {12}  # some rows end earlier
    assert together(model, rows, pixels) == expected


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
    rows, pixels = prompts(), images(4)
    expected = alone(model, rows, pixels, **options)
    assert together(model, rows, pixels, Generation(max_new_tokens=12, **options)) == expected


def test_long_answers_read_more_and_more_of_the_cache(model):
    rows = [text(length, seed=length) for length in (100, 90, 101, 3, 5, 6)]
    lengths = {"max_new_tokens": 60, "min_new_tokens": 60}
    expected = alone(model, rows, images(0), **lengths)
    for _ in range(2):  # the second time with the cache of the first
        assert together(model, rows, images(0), Generation(**lengths)) == expected


def test_an_earlier_batch_does_not_change_the_next(model):
    rows, pixels = prompts(), images(4)
    first = together(model, rows[:2], pixels[:3])
    together(model, rows, pixels)
    assert together(model, rows[:2], pixels[:3]) == first
    assert first == alone(model, rows[:2], pixels[:3])


def test_rows_that_fill_up_a_larger_graph_change_nothing(model, monkeypatch):
    rows, pixels = prompts()[:5], images(4)
    monkeypatch.setattr(decoder_of(model), "_choose_rows", lambda n, slots: 8)
    assert together(model, rows, pixels) == alone(model, rows, pixels)


def test_prompts_are_prefilled_in_passes_of_limited_size(model, monkeypatch):
    two_rows_of_140 = 300
    monkeypatch.setattr("qwenvl_lit.models.static_decoder.PROMPT_TOKENS", two_rows_of_140)
    rows, pixels = prompts(), images(4)
    assert together(model, rows, pixels) == alone(model, rows, pixels)


def test_adapters_are_part_of_the_network(model):
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, lora).eval()
    rows, pixels = prompts(), images(4)
    expected = alone(adapted, rows, pixels)
    assert together(adapted, rows, pixels) == expected
    with adapted.disable_adapter():
        assert together(adapted, rows, pixels) != expected


def test_beams_are_those_of_transformers(model):
    rows, pixels = prompts()[:2], images(3)
    expected = alone(model, rows, pixels, max_new_tokens=8, num_beams=3)
    assert together(model, rows, pixels, Generation(max_new_tokens=8, num_beams=3)) == expected


def test_a_network_spread_over_devices_decodes_with_transformers(model):
    model.hf_device_map = {"transformer": 0, "lm_head": "cpu"}
    assert decoder_of(model) is None
    rows = [text(4), text(4, seed=1)]
    assert together(model, rows, images(0)) == alone(model, rows, images(0))


@pytest.mark.parametrize("changes", [{"use_dynamic_ntk": False}, {"use_logn_attn": False}], ids=str)
def test_networks_without_a_rule_for_long_texts_decode_alike(changes):
    model = small_network(**changes)
    rows = [text(90), text(40, seed=1), text(3, seed=2)]
    assert together(model, rows, images(0)) == alone(model, rows, images(0))


# -- compiled --------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch) -> list:
    """The graphs that `torch.compile` traces; they run uncompiled."""
    traced = []

    def backend(graph, example):
        traced.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return traced


def test_compiled_blocks_answer_the_same_and_are_compiled_once(model, graphs):
    rows, pixels = prompts(), images(4)
    expected = alone(model, rows, pixels)
    generation = Generation(max_new_tokens=12, compile=True)
    assert together(model, rows, pixels, generation) == expected
    assert decoder_of(model).compiled
    # Before and after attention, for prompts and for steps, whatever the number of blocks.
    assert len(graphs) == 4
    fewer = rows[:7]
    assert together(model, fewer, pixels, generation) == expected[:7]
    assert len(graphs) == 6  # another number of rows is another step, but the same prompt
    uncompiled = replace(generation, compile=False)
    assert together(model, fewer, pixels, uncompiled) == expected[:7]
    assert not decoder_of(model).compiled


def test_the_tower_is_compiled_for_full_passes_only(model, graphs):
    count = IMAGES_PER_PASS + 1
    rows, pixels = [IMAGE + text(2, seed=row) for row in range(count)], images(count)
    expected = together(model, rows, pixels, Generation(max_new_tokens=2))
    compiled = Generation(max_new_tokens=2, compile=True)
    assert together(model, rows, pixels, compiled) == expected
    # One graph serves all blocks of the tower. The image that is left over runs uncompiled.
    assert sum("gelu" in graph.code for graph in graphs) == 1
    for block in model.transformer.visual.transformer["resblocks"]:
        assert not {"forward", "compute"} & vars(block).keys()


def test_a_network_that_cannot_be_compiled_is_reported_once_and_decodes(model, monkeypatch, caplog):
    attention = type(model.transformer.h[0].attn)
    heads = attention.heads

    def uncompilable(self, x, rotary):
        torch._dynamo.graph_break()
        return heads(self, x, rotary)

    monkeypatch.setattr(attention, "heads", uncompilable)
    rows, pixels = prompts()[:2], images(3)
    expected = alone(model, rows, pixels)
    for _ in range(2):
        generation = Generation(max_new_tokens=12, compile=True)
        assert together(model, rows, pixels, generation) == expected
    ours = [record for record in caplog.records if record.name.startswith("qwenvl_lit")]
    (message,) = [record.message for record in ours]
    assert message.startswith("decoding continues without compilation: ")


# -- graphs ----------------------------------------------------------------------------------------


class Replay:
    """Does what a CUDA graph does: repeats a step on tensors at the same addresses."""

    def __init__(self, decoder, step):
        self.decoder, self.step, self.replays = decoder, step, 0
        self.rows = len(step.args[0].ids)
        self.addresses = self._addresses()
        self.logits = self.step()

    def _addresses(self) -> list[int]:
        inputs, cache = self.decoder.step_inputs[self.rows], self.decoder.cache
        tensors = (cache.memory, inputs.ids, inputs.slot, inputs.starts, inputs.positional)
        return [*(item.data_ptr() for item in tensors), cache.capacity(self.rows)]

    def replay(self) -> None:
        assert self._addresses() == self.addresses
        self.replays += 1
        self.logits.copy_(self.step())


@pytest.fixture
def replaying(model, monkeypatch):
    """The model's decoder as on a GPU, with steps that are captured and replayed."""
    decoder = decoder_of(model)

    def capture(step):
        graph = Replay(decoder, step)
        return graph, graph.logits

    monkeypatch.setattr(decoder.graphs, "help", lambda: True)
    monkeypatch.setattr(decoder.graphs, "_capture", capture)
    return decoder


def test_steps_are_captured_once_for_a_number_of_rows(model, replaying):
    rows, pixels = prompts(), images(4)
    expected = alone(model, rows, pixels)
    assert together(model, rows, pixels) == expected
    assert list(replaying.graphs.captured) == [(10, 256)]
    # Seven rows, say the last batch of a dataset, use graphs of ten ...
    assert together(model, rows[:7], pixels) == expected[:7]
    assert list(replaying.graphs.captured) == [(10, 256), (10, 128)]
    # ... until they come again.
    assert together(model, rows[:7], pixels) == expected[:7]
    assert {size for size, _ in replaying.graphs.captured} == {10, 7}
    captured = dict(replaying.graphs.captured)
    for _ in range(2):
        assert together(model, rows, pixels) == expected
    assert replaying.graphs.captured == captured
    assert captured[10, 256][0].replays > 12


def test_larger_batches_reallocate_the_cache_and_longer_answers_read_more_of_it(model, replaying):
    lengths = {"max_new_tokens": 60, "min_new_tokens": 60}
    generation = Generation(**lengths)
    few = [text(4, seed=row) for row in range(5)]
    many = [text(90, seed=row) for row in range(6)]
    expected_of_few = alone(model, few, images(0), **lengths)
    assert together(model, few, images(0), generation) == expected_of_few
    assert list(replaying.graphs.captured) == [(5, 128)]
    expected_of_many = alone(model, many, images(0), **lengths)
    assert together(model, many, images(0), generation) == expected_of_many
    assert list(replaying.graphs.captured) == [(6, 128), (6, 256)]
    assert together(model, few, images(0), generation) == expected_of_few
    assert together(model, few[:2], images(0), generation) == expected_of_few[:2]
    assert {size for size, _ in replaying.graphs.captured} == {5, 6}
    long = [text(300)]
    expected_of_long = alone(model, long, images(0), **lengths)
    assert together(model, long, images(0), generation) == expected_of_long
    # Not a graph of six rows: six rows of this length do not fit into the cache.
    assert (1, 512) in replaying.graphs.captured


def test_steps_that_cannot_be_captured_run_without_graphs(model, replaying, monkeypatch, caplog):
    reason = "operation not permitted when stream is capturing"

    def fails(step):
        raise RuntimeError(f"{reason}\nCUDA kernel errors might be reported late")

    graphs = replaying.graphs
    monkeypatch.setattr(graphs, "help", lambda: graphs.can_capture)
    monkeypatch.setattr(graphs, "_capture", fails)
    rows, pixels = prompts()[:2], images(3)
    expected = alone(model, rows, pixels)
    for _ in range(2):
        assert together(model, rows, pixels) == expected
    (record,) = caplog.records
    assert record.message.endswith(f"which is slower: RuntimeError: {reason}")


def test_auto_compiles_on_a_gpu_after_a_minute_of_answers(model, replaying, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    rows, pixels = prompts()[:2], images(3)
    expected = alone(model, rows, pixels)
    clock = iter(range(0, 10_000, 4))  # the twelve steps of an answer take 48 seconds
    monkeypatch.setattr("qwenvl_lit.models.static_decoder.perf_counter", lambda: next(clock))
    compiled = []
    for _ in range(4):
        assert together(model, rows, pixels) == expected
        compiled.append(replaying.compiled)
    assert compiled == [False, False, True, True]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_of_a_gpu_answer_as_eager_steps_do(compiled):
    model, rows, pixels = small_network().cuda(), prompts(), images(4)
    expected = alone(small_network(), rows, pixels, max_new_tokens=40)
    inputs = {name: value.cuda() for name, value in batch_of(rows, pixels).items()}
    generation = Generation(max_new_tokens=40, compile=compiled)
    for _ in range(2):
        assert generation(model, inputs, **ENDS) == expected
    decoder = decoder_of(model)
    assert decoder.graphs.captured
    assert decoder.graphs.can_capture
    assert decoder.compiled == compiled
    first = {name: value.cuda() for name, value in batch_of(rows[:1], pixels[:1]).items()}
    for _ in range(2):
        assert streamed(generation, model, first) == expected[0]


# -- stop words ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 2])
def test_an_answer_ends_before_a_stop_word_of_several_ids(model, num_beams):
    row, settings = text(5, seed=6), {"max_new_tokens": 12, "min_new_tokens": 12}
    settings["num_beams"] = num_beams
    [answer] = together(model, [row], images(0), Generation(**settings))
    word = answer[4:6]
    generation = Generation(**settings, stop_words_ids=[word])
    first = next(index for index in range(11) if answer[index : index + 2] == word)
    assert together(model, [row], images(0), generation) == [answer[:first]]
    if num_beams == 1:
        assert streamed(generation, model, batch_of([row], images(0))) == answer[:first]


def test_ids_that_only_begin_a_stop_word_are_part_of_the_answer(model):
    row, settings = text(5, seed=6), {"max_new_tokens": 12, "min_new_tokens": 12}
    [answer] = together(model, [row], images(0), Generation(**settings))
    words = [[*answer[-3:], 1], [answer[2], answer[2], answer[2], 1], [answer[0], 1]]
    generation = Generation(**settings, stop_words_ids=words)
    assert together(model, [row], images(0), generation) == [answer]
    assert streamed(generation, model, batch_of([row], images(0))) == answer


def test_decoding_stops_at_the_last_stop_word_of_a_batch():
    stops = Stops(2, [9], torch.device("cpu"), [[1, 2], [3]])
    steps = [(1, 1), (2, 2), (0, 0)]
    assert [stops.all_ended(torch.tensor(ids)) for ids in steps[:2]] == [False, True]
    stops = Stops(2, [9], torch.device("cpu"), [[1, 2], [3]])
    ended = [stops.all_ended(torch.tensor(ids)) for ids in [(3, 2), (1, 1), (1, 0), (1, 1), (1, 2)]]
    assert ended == [False, False, False, False, True]


@pytest.mark.parametrize("words", [[7], [[]], ["word"], [[7.0]], [[True]]])
def test_stop_words_are_lists_of_ids(words):
    with pytest.raises(ValueError, match=r"generation\.stop_words_ids is a list of words, each a"):
        Generation(stop_words_ids=words)


# -- streams ---------------------------------------------------------------------------------------


def streamed(generation: Generation, model, inputs: dict[str, torch.Tensor]) -> list[int]:
    """All ids of a stream."""
    stream = generation.stream(model, inputs, **ENDS)
    return [token_id for ids in stream for token_id in ids]


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "seed": 3}, {"max_new_tokens": 1}], ids=str
)
def test_a_stream_has_the_ids_of_the_whole_answer(model, options):
    generation = Generation(**{"max_new_tokens": 12, **options})
    with_image, with_early_end = prompts()[0], prompts()[9]
    for row, pixels in ((with_image, images(1)), (with_early_end, images(0))):
        (answer,) = together(model, [row], pixels, generation)
        assert streamed(generation, model, batch_of([row], pixels)) == answer


def test_a_stream_of_a_network_spread_over_devices_is_the_whole_answer(model):
    model.hf_device_map = {"transformer": 0, "lm_head": "cpu"}
    rows, generation = [text(5)], Generation(max_new_tokens=12, min_new_tokens=12)
    (answer,) = together(model, rows, images(0), generation)
    assert streamed(generation, model, batch_of(rows, images(0))) == answer


def test_a_stream_can_be_abandoned_but_not_resumed_after_another_answer(model):
    rows, generation = [text(5)], Generation(max_new_tokens=12, min_new_tokens=12)
    (answer,) = together(model, rows, images(0), generation)
    stream = generation.stream(model, batch_of(rows, images(0)), **ENDS)
    assert next(stream) == answer[:1]
    assert together(model, rows, images(0), generation) == [answer]
    with pytest.raises(ValueError, match="another answer of this model was begun"):
        list(stream)


def test_streams_have_one_row_and_no_beams(model):
    two_rows = batch_of([text(5), text(6)], images(0))
    with pytest.raises(ValueError, match="one prompt at a time"):
        Generation().stream(model, two_rows, **ENDS)
    with pytest.raises(ValueError, match="num_beams=1"):
        Generation(num_beams=2).stream(model, batch_of([text(5)], images(0)), **ENDS)


def test_appended_tokens_have_the_logits_of_steps(model):
    """Also of rows whose answer is longer than `seq_length`, with the alpha of their prompt."""
    decoder, inputs = decoder_of(model), batch_of(prompts(), images(4))
    steps = torch.randint(1, 60, (10, 6), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        decoder.start(inputs, new_tokens=6)
        expected = torch.stack([decoder.step(ids).clone() for ids in steps.T], dim=1)
        decoder.start(inputs, new_tokens=6)
        appended = decoder.append(steps[:, :5])
        following = decoder.step(steps[:, 5])
    torch.testing.assert_close(appended, expected[:, :5], **CLOSE)
    torch.testing.assert_close(following, expected[:, 5], **CLOSE)


# -- logits processors -----------------------------------------------------------------------------


class Odd:
    """Lets only odd tokens be chosen, records its arguments, and writes to the scores."""

    def __init__(self):
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls.append((ids, scores.clone()))
        scores[:, ::2] = -torch.inf
        return scores


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5, "min_new_tokens": 5}], ids=str)
def test_a_logits_processor_changes_answers_as_in_transformers(model, options):
    rows, pixels, odd = prompts()[:4], images(3), Odd()
    generation = Generation(max_new_tokens=12, logits_processor=odd, **options)
    answers = together(model, rows, pixels, generation)
    expected = alone(model, rows, pixels, logits_processor=LogitsProcessorList([Odd()]), **options)
    assert answers == expected
    assert all(token_id % 2 for answer in answers for token_id in answer)
    prompt = batch_of(rows, pixels)["input_ids"]
    for step, (ids, scores) in enumerate(odd.calls):
        assert torch.equal(ids[:, : prompt.shape[1]], prompt)
        assert ids.shape[1] == prompt.shape[1] + step
        assert (scores.dtype, scores.shape) == (torch.float32, (len(rows), 64))
    new = odd.calls[-1][0][:, prompt.shape[1] :].tolist()
    whole = max(range(len(rows)), key=lambda row: len(answers[row]))
    assert answers[whole][: len(new[whole])] == new[whole]


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "seed": 1}], ids=str)
def test_a_logits_processor_works_with_beams_sampling_and_lists(model, options):
    generation = Generation(
        max_new_tokens=6, logits_processor=LogitsProcessorList([Odd()]), **options
    )
    for answer in together(model, prompts()[:2], images(3), generation):
        assert all(token_id % 2 for token_id in answer)


def test_a_stream_and_a_spread_network_have_the_logits_processor(model):
    generation = Generation(max_new_tokens=8, min_new_tokens=8, logits_processor=Odd())
    (answer,) = together(model, [text(5)], images(0), generation)
    assert streamed(generation, model, batch_of([text(5)], images(0))) == answer
    model.hf_device_map = {"transformer": 0, "lm_head": "cpu"}
    assert together(model, [text(5)], images(0), generation) == [answer]


def test_a_logits_processor_comes_before_the_temperature():
    logits, odd = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)), Odd()
    sampling = Sampling(temperature=0.5, repetition_penalty=2.0)
    inputs = {"input_ids": tensor([3, 4], [5, 6])}
    next_token = NextToken.of_batch(inputs, logits, STOPS, sampling, logits_processor=odd)
    scores = next_token.scores(logits)
    [(_, shown)] = odd.calls
    assert torch.equal(scores[:, 1::2], shown[:, 1::2] / 0.5)
    assert shown[0, 3] == min(logits[0, 3] / 2, logits[0, 3] * 2)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (
            lambda ids, scores: scores[:1],
            r"must return scores of shape \(2, 64\), got shape \(1, 64",
        ),
        (lambda ids, scores: None, r"must return scores of shape \(2, 64\), got None"),
        (lambda ids, scores: scores * torch.nan, "has returned NaN, "),
        (
            lambda ids, scores: scores.fill_(-torch.inf),
            "has returned NaN, infinity, or -inf for all",
        ),
    ],
)
def test_a_logits_processor_that_returns_no_scores_is_named(model, processor, message):
    for options in ({}, {"num_beams": 2}):
        generation = Generation(max_new_tokens=2, logits_processor=processor, **options)
        shown = message.replace(r"\(2", r"\(4") if options else message  # beams are rows
        with pytest.raises(ValueError, match=f"^logits_processor {shown}"):
            together(model, [text(5), text(6)], images(0), generation)


def test_a_logits_processor_is_a_function():
    with pytest.raises(ValueError, match=r"^generation\.logits_processor is a function of ids and"):
        Generation(logits_processor="my.Processor")


# -- sampling --------------------------------------------------------------------------------------


def test_scores_are_those_of_transformers():
    logits = 3 * torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    ids, mask = padded([text(6), text(3, seed=1), text(9, seed=2)], side="left")
    inputs = {"input_ids": tensor(*ids).clamp(max=49), "attention_mask": mask}
    sampling = Sampling(temperature=0.7, top_k=12, top_p=0.8, repetition_penalty=1.4)
    next_token = NextToken.of_batch(inputs, logits, STOPS, sampling, min_new_tokens=2)
    scores = next_token.scores(logits)
    for row in range(3):
        prompt = inputs["input_ids"][row][mask[row].bool()][None]
        length = prompt.shape[1]
        processors = LogitsProcessorList(
            [
                logits_process.RepetitionPenaltyLogitsProcessor(1.4),
                logits_process.MinNewTokensLengthLogitsProcessor(length, 2, list(STOPS), "cpu"),
                logits_process.TemperatureLogitsWarper(0.7),
                logits_process.TopKLogitsWarper(12),
                logits_process.TopPLogitsWarper(0.8),
            ]
        )
        expected = processors(prompt, logits[row : row + 1].clone())
        torch.testing.assert_close(scores[row : row + 1], expected)


def test_draws_have_the_distribution_of_the_scores():
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -4.0]).expand(40_000, -1)
    sampling = Sampling(temperature=1.0, top_k=4)
    next_token = NextToken.of_batch({}, logits, (), sampling, seed=0)
    shares = torch.bincount(next_token(logits), minlength=6) / len(logits)
    expected = logits[0, :4].softmax(-1)
    # The tolerance is four standard deviations of 40,000 draws.
    torch.testing.assert_close(shares[:4], expected, atol=0.01, rtol=0)
    assert not shares[4:].any()


def test_a_seed_repeats_an_answer(model):
    rows, pixels = prompts()[:2], images(3)
    free = Generation(max_new_tokens=12, min_new_tokens=12, do_sample=True)
    first, repeated, other = (
        together(model, rows, pixels, replace(free, top_p=0.95, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == repeated != other
    torch.manual_seed(5)
    first, second = together(model, rows, pixels, free), together(model, rows, pixels, free)
    torch.manual_seed(5)
    assert together(model, rows, pixels, free) == first != second


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}], ids=str)
def test_logits_that_are_not_finite_are_an_error(options, value, model):
    rows, generation = prompts()[:2], Generation(max_new_tokens=3, **options)
    model.lm_head.weight.data[5] *= value
    message = "logits of 2 of 2 prompts are not finite"
    if "num_beams" in options:
        message = "logits of 4 of 4 prompts"  # a row for each beam
    else:
        with pytest.raises(DataError, match=r"1 of 1 prompts are not finite .* float32"):
            next(generation.stream(model, batch_of(rows[:1], images(1)), **ENDS))
    with pytest.raises(DataError, match=message):
        together(model, rows, images(3), generation)


def test_a_row_whose_later_logits_are_not_finite_is_counted(model):
    rows, generation = [text(5), text(6)], Generation(max_new_tokens=8)
    [first, _] = together(model, rows, images(0), generation)
    model.transformer.wte.weight.data[first[2]] *= torch.nan  # read after the third new token
    with pytest.raises(DataError, match="of 2 prompts are not finite"):
        together(model, rows, images(0), generation)
    stream = generation.stream(model, batch_of(rows[:1], images(0)), **ENDS)
    with pytest.raises(DataError, match="1 of 1 prompts are not finite"):
        list(stream)


def test_decoding_ends_when_every_row_has_ended():
    stops = Stops(3, STOPS, torch.device("cpu"))
    assert not stops.all_ended(torch.tensor([7, 1, 2]))
    assert not stops.all_ended(torch.tensor([1, 1, 9]))
    assert stops.all_ended(torch.tensor([1, 7, 1]))
    assert not Stops(1, (), torch.device("cpu")).all_ended(torch.tensor([7]))


@pytest.mark.parametrize(
    "wrong",
    [{"compile": "yes"}, {"max_new_tokens": 0}, {"max_new_tokens": 3, "min_new_tokens": 4}],
    ids=str,
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=f"generation.{list(wrong)[-1]}"):
        Generation(**wrong)


# -- images ----------------------------------------------------------------------------------------


def test_equal_images_are_encoded_once(model):
    rows, pixels = [IMAGE + text(3, seed=row) for row in range(4)], images(2)[[0, 1, 0, 0]]
    encoded = []
    model.transformer.visual.register_forward_hook(lambda _, __, out: encoded.append(len(out)))
    expected = together(model, rows, pixels)
    assert encoded == [4]
    assert together(model, rows, pixels, image_keys=["a", "b", "a", "a"]) == expected
    assert encoded == [4, 2]
    assert together(model, rows[1:2], pixels[1:2], image_keys=["b"]) == expected[1:2]
    assert encoded == [4, 2]
    Generation.release(model)
    together(model, rows[1:2], pixels[1:2], image_keys=["b"])
    assert encoded == [4, 2, 1]


def test_there_are_as_many_keys_as_images(model):
    with pytest.raises(ValueError, match="2 keys for 1 images"):
        together(model, [IMAGE], images(1), image_keys=["a", "b"])


def test_a_decoder_is_freed_with_its_network():
    model = small_network()
    together(model, [text(3)], images(0), Generation(max_new_tokens=2))
    decoder = weakref.ref(decoder_of(model))
    del model
    gc.collect()
    assert decoder() is None


def test_a_step_neither_synchronizes_nor_leaves_the_device(monkeypatch):
    """On the meta device, reading a value and mixing in a tensor of the host are errors."""
    # The meta device does not support autocast.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    with torch.device("meta"):
        model = QwenVLForCausalLM(small_config()).eval()
        # Without a mask: `start` reads the lengths of the rows from it, once.
        inputs = {
            "input_ids": torch.empty(6, 20, dtype=torch.int64),
            "pixel_values": torch.empty(3, 3, SIDE, SIDE),
            "vision_positions": torch.empty(3 * QUERIES, dtype=torch.int64),
        }
    decoder = decoder_of(model)
    with torch.inference_mode():
        logits = decoder.start(inputs, new_tokens=8)
        sampling = Sampling(temperature=0.5, top_k=5, top_p=0.9, repetition_penalty=1.2)
        next_token = NextToken.of_batch(inputs, logits, STOPS, sampling, min_new_tokens=1)
        next_token.samplings[1] = Sampling(top_k=3)  # rows may differ
        next_token.samplings[2] = replace(sampling, temperature=2.0, top_k=0, top_p=0.5)
        finite = FiniteLogits()
        for _ in range(2):
            finite(None, logits)
            logits = decoder.step(next_token(logits))
    assert logits.device.type == "meta"
    assert logits.shape == (6, 64)
