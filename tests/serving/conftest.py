from collections.abc import Iterator

import pytest
from serving.served import Served, serves


@pytest.fixture
def server() -> Iterator:
    """Returns a function that makes a server, as `serves`; they are closed after the test."""
    started = []

    def start(*arguments, **options) -> Served:
        started.append(serves(*arguments, **options))
        return started[-1]

    yield start
    for served in started:
        served.engine.close()
