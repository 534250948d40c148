"""Requests that join and leave a running batch are answered as each is alone."""

import random
import threading
import time
from collections import deque
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny import CONFIG
from tiny_qwen3_vl import KINDS, tiny_qwen3_vl

from qwenvl_lit.data.collate import Pad
from qwenvl_lit.generation.continuous import ContinuousBatching
from qwenvl_lit.generation.decoders import decoder_of
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.generation.request import Closed, Full, Handle, Request
from qwenvl_lit.models.cuda_graphs import CUDAGraphs
from qwenvl_lit.models.kv_cache import KVCache
from qwenvl_lit.models.qwen_vl.dynamic_ntk import ntk_alpha
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.running_rows import RunningRows
from qwenvl_lit.types import Conversation, DataError, ImageSource, Turn

SECONDS = 60  # after which a test fails instead of waiting on
SEQ_LENGTH = 48  # longer prompts have alphas of their own
# Weights large enough that answers differ from each other.
SIZES = {"num_hidden_layers": 2, "initializer_range": 0.3, "seq_length": SEQ_LENGTH}
EVERY_FAMILY = pytest.mark.parametrize("family", ["qwen_vl", *KINDS], indirect=True)
WORDS = "the quick brown fox jumps over a lazy dog and then it sleeps in its box again"


def pad_of(processor):
    collate_vision = processor.collate_vision
    return Pad(pad_id=processor.pad_id, collate_vision=collate_vision, side="left")


@pytest.fixture(scope="module")
def family(request):
    """Qwen-VL, or the kind that `EVERY_FAMILY` names."""
    kind = getattr(request, "param", "qwen_vl")
    if kind in KINDS:
        return tiny_qwen3_vl(kind)
    return QwenVLFamily(config={**CONFIG, **SIZES}, vocabulary="tiny")


@pytest.fixture
def model(family):
    return family.load()


@pytest.fixture
def processor(family):
    processor = family.processor()
    # Enough ids that many answers end early.
    processor.stop_ids = tuple(range(7, family.config.get_text_config().vocab_size, 15))
    return processor


@pytest.fixture
def batching_of(model, family, processor):
    """Returns a function that makes a started ContinuousBatching, which is closed at the end."""
    made = []

    def make(*, start=True, **options):
        options = {"rows": 4, "slots": 512, **options}
        collate = pad_of(processor)
        batching = ContinuousBatching(model, family, processor, collate=collate, **options)
        made.append(batching)
        if start:
            batching.start()
        return batching

    yield make
    for batching in made:
        batching.close()


@pytest.fixture
def sample_of(processor):
    """Returns a function that encodes a question of so many words, after so many images."""

    def make(words, images=0, seed=0):
        choose = random.Random(seed)
        parts = []
        for _ in range(images):
            color = (choose.randrange(4) * 80, choose.randrange(2) * 255, 0)
            size = (choose.choice((40, 90)), choose.choice((40, 70)))
            parts.append(ImageSource(Image.new("RGB", size, color)))
        parts.append(" ".join(choose.choices(WORDS.split(), k=words)))
        conversation = Conversation(id="q", turns=(Turn(role="user", parts=tuple(parts)),))
        return processor.encode(conversation, prompt=True)

    return make


@pytest.fixture
def alone(model, family, processor):
    """Returns a function that answers a request by itself, with `Generation`."""

    def answer(request):
        generation = Generation(
            max_new_tokens=request.max_new_tokens,
            do_sample=request.temperature > 0,
            temperature=request.temperature or 1.0,
            top_p=request.top_p,
            top_k=request.top_k,
            repetition_penalty=request.repetition_penalty,
            seed=request.seed,
        )
        batch = pad_of(processor)([request.prompt])
        inputs = family.inputs(batch.to(model.device), generate=True)
        stop_ids = processor.stop_ids
        [ids] = generation(model, inputs, stop_ids=stop_ids, pad_id=processor.pad_id)
        return ids

    return answer


class Received:
    """What a request gets."""

    def __init__(self):
        self.tokens, self.reason = [], None
        self.ended = threading.Event()

    def __call__(self, tokens, reason):
        assert not self.ended.is_set()
        self.tokens += tokens
        self.reason = reason
        if reason is not None:
            self.ended.set()

    @property
    def ids(self):
        assert self.ended.wait(SECONDS)
        return [token.id for token in self.tokens]


def answers(batching, requests):
    """The ids of the answers to requests that are submitted at once."""
    received = [Received() for _ in requests]
    for request, receive in zip(requests, received, strict=True):
        batching.submit(request, receive)
    return [receive.ids for receive in received]


def random_request(sample_of, seed):
    choose = random.Random(seed)
    words = choose.choice([1, 4, 9, 9, 20, 40])
    options = {"max_new_tokens": choose.randint(1, 14)}
    if choose.random() < 0.4:
        options |= {"temperature": choose.uniform(0.3, 2), "seed": seed}
        options |= {"top_p": choose.choice([1.0, 0.7]), "top_k": choose.choice([0, 5])}
    if choose.random() < 0.2:
        options["repetition_penalty"] = 1.4
    prompt = sample_of(words, images=choose.choice([0, 0, 1, 2]), seed=seed)
    return Request(prompt=prompt, **options)


def serve_at_random(batching, requests):
    """Submits requests at random times, and others that are cancelled. Returns what they get."""
    choose, received = random.Random(0), []
    for request in requests:
        received.append(submit(batching, request)[0])
        if choose.random() < 0.1:
            cancelled, handle = submit(batching, replace(request, max_new_tokens=50))
            time.sleep(choose.random() * 0.004)
            handle.cancel()
            assert cancelled.ended.wait(SECONDS)
        if choose.random() < 0.3:
            time.sleep(choose.random() * 0.01)
    return received


def submit(batching, request):
    """Submits a request as soon as the queue is not full."""
    received = Received()
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return received, batching.submit(request, received)
        except Full:
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.mark.parametrize(
    ("family", "count", "steps_ahead"),
    [
        *(("qwen_vl", 60, 0), ("qwen_vl", 60, 1), *((kind, 60, 1) for kind in KINDS)),
        *(pytest.param(kind, 500, 1, marks=pytest.mark.slow) for kind in ("qwen_vl", *KINDS)),
    ],
    indirect=["family"],
)
def test_requests_that_come_and_go_at_random_are_answered_as_each_alone(
    count, steps_ahead, batching_of, sample_of, alone
):
    requests = [random_request(sample_of, seed) for seed in range(count)]
    batching = batching_of(rows=6, slots=256, prompt_tokens=90, max_waiting=20, start=False)
    batching._batch.steps_ahead = steps_ahead  # as on a GPU
    batching.start()
    received = serve_at_random(batching, requests)
    expected = [alone(request) for request in requests]
    assert [receive.ids for receive in received] == expected
    reasons = {"stop": 0, "length": 0}
    for request, receive in zip(requests, received, strict=True):
        reasons[receive.reason] += 1
        assert (receive.reason == "length") == (len(receive.ids) == request.max_new_tokens)
    assert min(reasons.values()) > count / 10
    assert batching.drain(SECONDS)
    assert batching.waiting == batching.running == 0


@EVERY_FAMILY
def test_images_are_encoded_once(batching_of, sample_of, model, alone):
    requests = []
    for seed, images in ((3, 2), (4, 7)):
        prompt = sample_of(4, images=images, seed=seed)
        requests.append(Request(prompt=prompt, max_new_tokens=4))
    requests = [*requests, requests[0]]
    expected, encoded = [alone(request) for request in requests], []
    decoder = decoder_of(model)
    encode = decoder.encode_images

    def counting(inputs, indices):
        encoded.append(len(indices))
        return encode(inputs, indices)

    decoder.encode_images = counting
    batching = batching_of()
    for _ in range(2):
        assert answers(batching, requests) == expected
    keys = set()
    for request in requests:
        keys.update(image.key for image in request.prompt.conversation.images)
    assert sum(encoded) == len(keys)
    assert set(encoded) <= {1, 2, 3, 4}


@EVERY_FAMILY
@pytest.mark.parametrize("slots", [20, 64])  # the prompts of the warm-up fit only into 64
def test_a_warm_up_leaves_nothing_behind(slots, batching_of, sample_of, alone):
    batching = batching_of(slots=slots, start=False)
    batching._batch.warm_up()
    assert (batching.waiting, batching.running) == (0, 0)
    request = Request(prompt=sample_of(1, images=slots // 64), max_new_tokens=2)
    batching.start()
    if len(request.prompt.input_ids) < slots:
        assert answers(batching, [request] * 3) == [alone(request)] * 3


@EVERY_FAMILY
@pytest.mark.parametrize("prompt_tokens", [1, 40, 10_000])
def test_prompts_are_read_in_pieces(prompt_tokens, batching_of, sample_of, alone):
    requests = []
    for seed, words in enumerate((1, 40, 9, 10, 11)):
        prompt = sample_of(words, images=seed % 2, seed=seed)
        requests.append(Request(prompt=prompt, max_new_tokens=6))
    expected = [alone(request) for request in requests]
    assert answers(batching_of(prompt_tokens=prompt_tokens), requests) == expected


def test_a_long_prompt_does_not_hold_up_running_rows(batching_of, sample_of, processor):
    processor.stop_ids = ()
    batch = batching_of(start=False, prompt_tokens=32)._batch
    running, later = Received(), Received()
    batch.take(queue_of(running, sample_of(1), 100))
    while not batch.running:
        batch.turn()
    long = sample_of(40)
    batch.take(queue_of(later, long, 2))
    pieces = 0
    while not later.tokens:
        before = len(running.tokens)
        batch.turn()
        assert len(running.tokens) == before + 1
        pieces += 1
    assert pieces == len(long.input_ids) // 32  # the last piece is a little longer


def queue_of(received, sample, max_new_tokens):
    request = Request(prompt=sample, max_new_tokens=max_new_tokens)
    handle = Handle(
        request, received, image_keys=[], most=max_new_tokens, cancel=lambda handle: None
    )
    return deque([handle])


@EVERY_FAMILY
def test_rows_move_at_the_end_of_the_cache(batching_of, sample_of, alone, processor, monkeypatch):
    processor.stop_ids = ()
    moves = []
    move = RunningRows._move

    def record(self, by):
        moves.append(by)
        move(self, by)

    monkeypatch.setattr(RunningRows, "_move", record)
    prompts = []
    for words, images in ((1, 1), (14, 0), (4, 0), (12, 0), (1, 2), (2, 1)):
        prompts.append(sample_of(words, images, seed=words))
    requests = []
    for index, prompt in enumerate(prompts * 3):
        left = 128 - len(prompt.input_ids)
        requests.append(Request(prompt=prompt, max_new_tokens=[left, 9, 30][index % 3]))
    expected = [alone(request) for request in requests]
    monkeypatch.setattr(KVCache, "capacity", lambda self, rows: 128)
    assert answers(batching_of(rows=3, slots=128), requests) == expected
    assert min(moves) < 0 < max(moves)
    assert sum(by < 0 for by in moves) >= 3


def test_steps_read_few_slots_although_the_counter_goes_on(batching_of, sample_of, processor):
    processor.stop_ids = ()
    batching = batching_of(rows=6, slots=1024)
    read = []
    rows = batching._batch.running_rows
    run = rows._run
    rows._run = lambda size, slots_read: read.append(slots_read) or run(size, slots_read)
    requests = []
    for seed in range(60):
        requests.append(Request(prompt=sample_of(4, seed=seed), max_new_tokens=20 + seed % 30))
    answers(batching, requests)
    assert set(read) <= {128, 256}


@EVERY_FAMILY
def test_graphs_replay_on_the_same_addresses(batching_of, sample_of, alone, monkeypatch):
    replays = []

    class Replay:
        def __init__(self, step):
            self.step, self.logits = step, step()

        def replay(self):
            replays.append(self)
            self.logits.copy_(self.step())

    def capture(self, step):
        graph = Replay(step)
        return graph, graph.logits

    requests = [random_request(sample_of, seed) for seed in range(30)]
    expected = [alone(request) for request in requests]
    monkeypatch.setattr(CUDAGraphs, "help", lambda self: True)
    monkeypatch.setattr(CUDAGraphs, "_capture", capture)
    batching = batching_of(rows=10, slots=256, start=False)
    batch = batching._batch
    batch.steps_ahead = 1
    with torch.inference_mode():
        batch.running_rows.warm_up()
    captured = dict(batch.running_rows.graphs.captured)
    assert set(captured) == {(size, slots) for size in (1, 8, 10) for slots in (128, 256)}
    replays.clear()
    batching.start()
    assert answers(batching, requests) == expected
    assert batch.running_rows.graphs.captured == captured
    assert len({id(graph) for graph in replays}) >= 2


@pytest.mark.gpu
@EVERY_FAMILY
@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_of_a_gpu_answer_as_each_alone(compiled, batching_of, sample_of, alone, model):
    model.cuda()
    requests = [random_request(sample_of, seed) for seed in range(60)]
    expected = [alone(request) for request in requests]
    batching = batching_of(rows=10, slots=256, prompt_tokens=300, compiled=compiled)
    assert batching.ready.wait(10 * SECONDS)
    running = batching._batch.running_rows
    captured = dict(running.graphs.captured)
    assert {size for size, _ in captured} == {1, 8, 10}
    received = serve_at_random(batching, requests)
    assert [receive.ids for receive in received] == expected
    assert running.graphs.captured == captured
    assert running.passes.compiled == compiled


def test_logprobs_are_those_of_the_network(batching_of, sample_of, model, family, processor):
    prompt = sample_of(3, images=1)
    alphas = {ntk_alpha(len(prompt.input_ids) + tokens, SEQ_LENGTH) for tokens in (0, 6)}
    assert len(alphas) == 1  # the network's own depends on the length of prompt and answer
    common = {"prompt": prompt, "max_new_tokens": 5}
    requests = [
        Request(**common, logprobs=3),
        Request(**common, logprobs=0, temperature=0.5, repetition_penalty=1.5, seed=0),
        Request(**common),
    ]
    processor.stop_ids = ()
    received = [Received() for _ in requests]
    batching = batching_of()
    for request, receive in zip(requests, received, strict=True):
        batching.submit(request, receive)
    for receive, tops in zip(received[:2], (3, 0), strict=True):
        ids = receive.ids
        batch = pad_of(processor)([prompt])
        inputs = family.inputs(batch, generate=True)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
        del inputs["attention_mask"]
        with torch.inference_mode():
            logprobs = model(**inputs).logits[0, -len(ids) - 1 :].float().log_softmax(-1)
        for token, expected in zip(receive.tokens, logprobs, strict=False):
            assert token.logprob == pytest.approx(expected[token.id].item(), abs=1e-4)
            best = expected.topk(tops)
            assert [token_id for token_id, _ in token.top] == best.indices.tolist()
            values = [value for _, value in token.top]
            assert values == pytest.approx(best.values.tolist(), abs=1e-4)
    received[2].ended.wait(SECONDS)
    assert {(token.logprob, token.top) for token in received[2].tokens} == {(None, ())}


# -- ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_cancelled_row_is_free_at_once(steps_ahead, batching_of, sample_of, processor):
    processor.stop_ids = ()
    batching = batching_of(rows=1, start=False)
    batch = batching._batch
    batch.steps_ahead = steps_ahead
    request = Request(prompt=sample_of(3), max_new_tokens=400)
    first, second = Received(), Received()
    handle = batching.submit(request, first)
    batching.submit(replace(request, max_new_tokens=2), second)
    while len(first.tokens) < 3:
        assert batching._wait_for_work()
        batch.turn()
    assert (batching.running, batching.waiting) == (1, 1)
    handle.cancel()
    assert batching._wait_for_work()
    assert first.reason == "cancelled"
    assert batching.running == 0
    count = len(first.tokens)
    while not second.ended.is_set():
        assert batching._wait_for_work()
        batch.turn()
    assert len(first.tokens) == count
    handle.cancel()  # has ended
    assert batching._wait_for_work()


def test_requests_can_be_cancelled_before_they_have_a_row(batching_of, sample_of):
    batching = batching_of(rows=1, prompt_tokens=8, start=False)
    received = [Received() for _ in range(3)]
    request = Request(prompt=sample_of(20), max_new_tokens=5)
    handles = [batching.submit(request, receive) for receive in received]
    assert batching._wait_for_work()
    batching._batch.turn()  # reads a piece of the first
    assert batching.waiting == 3
    handles[2].cancel()
    handles[0].cancel()
    assert batching._wait_for_work()
    assert [receive.reason for receive in received] == ["cancelled", None, "cancelled"]
    batching.start()
    assert received[1].ended.wait(SECONDS)
    assert received[1].reason in ("stop", "length")


def test_the_queue_is_bounded(batching_of, sample_of):
    batching = batching_of(max_waiting=2, start=False)
    request = Request(prompt=sample_of(3), max_new_tokens=3)
    received = [Received() for _ in range(3)]
    for receive in received[:2]:
        batching.submit(request, receive)
    with pytest.raises(Full, match="2 requests wait already"):
        batching.submit(request, received[2])
    batching.start()
    assert received[1].ended.wait(SECONDS)
    batching.submit(request, received[2])
    assert received[2].ended.wait(SECONDS)


def test_an_answer_ends_with_the_slots(batching_of, sample_of, alone, processor):
    processor.stop_ids = ()
    batching, prompt = batching_of(slots=64), sample_of(4)
    left = 64 - len(prompt.input_ids)
    [ids] = answers(batching, [Request(prompt=prompt, max_new_tokens=500)])
    assert ids == alone(Request(prompt=prompt, max_new_tokens=left))
    with pytest.raises(DataError, match="and with its answer it may have 64; shorten it"):
        batching.submit(Request(prompt=sample_of(60), max_new_tokens=5), Received())


def test_an_error_in_the_inputs_of_a_row_ends_that_row_only(batching_of, sample_of, alone):
    good = [Request(prompt=sample_of(3, images=1, seed=seed), max_new_tokens=5) for seed in (1, 2)]
    sample = good[0].prompt
    broken = replace(sample, vision_positions=sample.vision_positions[:-1])
    requests = [good[0], Request(prompt=broken, max_new_tokens=5), good[1]]
    received = [Received() for _ in requests]
    batching = batching_of(start=False)
    handles = []
    for request, receive in zip(requests, received, strict=True):
        handles.append(batching.submit(request, receive))
    batching.start()
    assert received[1].ids == []
    assert received[1].reason == "error"
    assert "vision_positions has 3 entries" in str(handles[1].error)
    assert [received[0].ids, received[2].ids] == [alone(request) for request in good]


def test_logits_that_are_not_finite_end_that_row_only(batching_of, sample_of, model, alone):
    good = Request(prompt=sample_of(3, seed=1), max_new_tokens=5)
    expected = alone(good)
    bad = Request(prompt=sample_of(3, seed=2), max_new_tokens=5)
    only_in_bad = set(bad.prompt.input_ids.tolist()) - set(good.prompt.input_ids.tolist())
    model.transformer.wte.weight.data[max(only_in_bad - set(expected))] *= torch.nan
    batching = batching_of(rows=2)
    received = Received()
    handle = batching.submit(bad, received)
    assert answers(batching, [good]) == [expected]
    assert received.ids == []
    assert received.reason == "error"
    with pytest.raises(DataError, match="logits of this answer are not finite"):
        raise handle.error
    # The rows that follow in its place are not affected.
    assert answers(batching, [good] * 4) == [expected] * 4


def test_a_receiver_that_fails_ends_its_own_answer_only(batching_of, sample_of, alone, caplog):
    def fails(tokens, reason):
        raise OSError("connection lost")

    batching = batching_of()
    request = Request(prompt=sample_of(3), max_new_tokens=5)
    handle = batching.submit(request, fails)
    assert answers(batching, [request]) == [alone(request)]
    assert str(handle.error) == "connection lost"
    assert batching.drain(SECONDS)
    assert batching.running == 0
    assert "a function that receives tokens has failed" in caplog.text


def test_draining_answers_what_was_accepted(batching_of, sample_of, alone):
    batching = batching_of(rows=2)
    request = Request(prompt=sample_of(3), max_new_tokens=5)
    received = [Received() for _ in range(7)]
    for receive in received:
        batching.submit(request, receive)
    assert batching.drain(SECONDS)
    assert all(receive.ended.is_set() for receive in received)
    assert [receive.ids for receive in received] == [alone(request)] * 7
    with pytest.raises(Closed):
        batching.submit(request, Received())


@pytest.mark.parametrize("start", [True, False])
def test_closing_cancels_what_is_left(start, batching_of, sample_of, processor):
    processor.stop_ids = ()
    batching = batching_of(rows=1, start=start)
    request = Request(prompt=sample_of(3), max_new_tokens=450)
    received = [Received() for _ in range(3)]
    for receive in received:
        batching.submit(request, receive)
    assert not batching.drain(0)
    batching.close()
    assert [receive.reason for receive in received] == ["cancelled"] * 3
    assert batching.waiting == batching.running == 0
    with pytest.raises(Closed):
        batching.submit(request, Received())


def test_a_step_that_fails_ends_all_answers(batching_of, sample_of, caplog):
    batching = batching_of(start=False)
    reason = RuntimeError("CUDA error: an illegal memory access was encountered")

    def fails():
        raise reason

    batching._batch.running_rows.step = fails
    request = Request(prompt=sample_of(3), max_new_tokens=5)
    received = [Received() for _ in range(6)]
    handles = [batching.submit(request, receive) for receive in received]
    batching.start()
    for receive, handle in zip(received, handles, strict=True):
        assert receive.ended.wait(SECONDS)
        assert receive.reason == "error"
        assert handle.error is reason
    assert batching.failure is reason
    with pytest.raises(Closed):
        batching.submit(request, Received())


def test_networks_without_running_rows_are_refused(batching_of, model):
    model.hf_device_map = {"transformer": 0, "lm_head": "cpu"}
    with pytest.raises(ValueError, match="a network on a single device"):
        batching_of()


@pytest.mark.parametrize(
    "wrong", [{"rows": 0}, {"slots": 1}, {"max_waiting": 0}, {"prompt_tokens": 0.5}], ids=str
)
def test_wrong_sizes_are_named(wrong, batching_of):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a whole number"):
        batching_of(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"logprobs": 21}, {"seed": 0.5}, {"top_p": 2.0}], ids=str
)
def test_wrong_requests_are_named(wrong, sample_of):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        Request(**{"prompt": sample_of(1), "max_new_tokens": 1, **wrong})
