"""Figures of the server for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
STEP_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
FIRST_MEAN = 1.0  # seconds of an answer, before there is one
WEIGHT = 0.1  # of the newest answer in the moving mean


class Metrics:
    """Counters and histograms of one server.

    Attributes:
        answer_seconds: moving mean of the seconds that an answer took, from request to end.
    """

    def __init__(self, *, running: Callable[[], float], waiting: Callable[[], float]):
        self.registry = CollectorRegistry()
        self.answer_seconds = FIRST_MEAN
        add = {"registry": self.registry, "namespace": "qwenvl"}
        self.responses = Counter(
            "responses", "Responses by path and status", ["path", "status"], **add
        )
        self.answers = Counter("answers", "Answers by what ended them", ["reason"], **add)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of answered prompts", **add)
        self.new_tokens = Counter("new_tokens", "Generated tokens", **add)
        self.first_token = Histogram(
            "first_token_seconds", "Time from a request to its first token", buckets=SECONDS, **add
        )
        self.between_tokens = Histogram(
            "between_tokens_seconds",
            "Time between tokens of an answer",
            buckets=STEP_SECONDS,
            **add,
        )
        self.answer_time = Histogram(
            "answer_seconds", "Time from a request to the end of its answer", buckets=SECONDS, **add
        )
        Gauge("rows_running", "Rows that are decoded", **add).set_function(running)
        Gauge("rows_waiting", "Rows that wait to be decoded", **add).set_function(waiting)

    def answered(self, reason: str, seconds: float, new_tokens: int) -> None:
        """Counts an answer that has ended."""
        self.answers.labels(reason).inc()
        self.new_tokens.inc(new_tokens)
        if reason in ("stop", "length"):
            self.answer_time.observe(seconds)
            self.answer_seconds += WEIGHT * (seconds - self.answer_seconds)

    def text(self) -> bytes:
        """Returns all figures in Prometheus' text format."""
        return generate_latest(self.registry)
