"""Requests that join and leave a running batch are answered as each is alone."""

import random
import threading
import time
from dataclasses import replace

import pytest
from PIL import Image
from tiny import CONFIG

from qwenvl_lit.data.collate import Pad
from qwenvl_lit.generation.continuous import ContinuousBatching
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.generation.request import Full, Request
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.types import Conversation, ImageSource, Turn

SECONDS = 60  # after which a test fails instead of waiting on
SEQ_LENGTH = 48  # longer prompts have alphas of their own
# Weights large enough that answers differ from each other.
SIZES = {"num_hidden_layers": 2, "initializer_range": 0.3, "seq_length": SEQ_LENGTH}
WORDS = "the quick brown fox jumps over a lazy dog and then it sleeps in its box again"


def pad_of(processor):
    collate_vision = processor.collate_vision
    return Pad(pad_id=processor.pad_id, collate_vision=collate_vision, side="left")


@pytest.fixture(scope="module")
def family():
    return QwenVLFamily(config={**CONFIG, **SIZES}, vocabulary="tiny")


@pytest.fixture
def model(family):
    return family.load()


@pytest.fixture
def processor(family):
    processor = family.processor()
    # Enough ids that many answers end early.
    processor.stop_ids = tuple(range(7, family.config.vocab_size, 15))
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
            parts.append(ImageSource(Image.new("RGB", (9, 9), color)))
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
        inputs = family.inputs(batch, generate=True)
        stop_ids = processor.stop_ids
        [ids] = generation(model, inputs, stop_ids=stop_ids, pad_id=processor.pad_id)
        return ids

    return answer


class Received:
    """What a request gets."""

    def __init__(self, on_first=None):
        self.tokens, self.reason, self.calls = [], None, 0
        self.ended = threading.Event()

    def __call__(self, tokens, reason):
        assert not self.ended.is_set()
        self.calls += 1
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
    """Submits requests at random times; cancels some. Returns what the others get."""
    choose, received = random.Random(0), []
    for request in requests:
        receive = Received()
        while True:
            try:
                handle = batching.submit(request, receive)
                break
            except Full:
                time.sleep(0.001)
        received.append(receive)
        if choose.random() < 0.1:
            spare = batching.submit if len(received) % 2 else None
            if spare is not None:
                cancelled = Received()
                try:
                    handle = spare(replace(request, max_new_tokens=50), cancelled)
                except Full:
                    continue
                time.sleep(choose.random() * 0.004)
                handle.cancel()
                assert cancelled.ended.wait(SECONDS)
        if choose.random() < 0.3:
            time.sleep(choose.random() * 0.01)
    return received


@pytest.mark.parametrize(
    ("count", "steps_ahead"), [(60, 0), (60, 1), pytest.param(500, 1, marks=pytest.mark.slow)]
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
