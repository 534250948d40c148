"""What scripts/bench_serve.py computes from the times of tokens."""

import threading
import time

import bench_serve
import pytest
from bench_serve import Answer, closed, open_loop, percentile, times


def answer_of(asked, *arrived):
    return Answer(asked, list(arrived))


def test_times_are_those_to_the_first_token_and_between_tokens():
    measured = times([answer_of(1, 1.5, 1.6, 1.7), answer_of(2, 2.1, 2.4)])
    assert measured == pytest.approx(
        {
            "first_token_p50_ms": 100,
            "first_token_p99_ms": 500,
            "between_tokens_p50_ms": 100,
            "between_tokens_p99_ms": 300,
        }
    )


@pytest.mark.parametrize(("share", "value"), [(0.5, 50), (0.99, 99), (1, 100), (0.001, 1)])
def test_percentiles_are_values(share, value):
    assert percentile(list(range(100, 0, -1)), share) == value


def test_clients_ask_one_request_at_a_time_and_all_requests_once():
    asked, at_once, most = [], [0], [0]
    lock = threading.Lock()

    def ask(number):
        answer = Answer(time.perf_counter())
        with lock:
            asked.append(number)
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        for _ in range(4):
            time.sleep(0.005)
            answer.arrived.append(time.perf_counter())
        with lock:
            at_once[0] -= 1
        return answer

    measured = closed(ask, clients=3, count=24)
    assert sorted(asked) == list(range(24))
    assert most == [3]
    assert 100 < measured["tokens_per_s"] <= 3 / 0.005
    asked.clear()
    measured = open_loop(ask, rate=500, count=20)
    assert sorted(asked) == list(range(20))
    assert most[0] > 3
    assert measured["first_token_p50_ms"] >= 5


def test_images_and_questions_differ_and_repeat():
    assert bench_serve.body_of(3) == bench_serve.body_of(3) != bench_serve.body_of(4)
    assert bench_serve.image(3) != bench_serve.image(4)
