import multiprocessing
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from multiprocessing.resource_sharer import DupFd
from types import SimpleNamespace

import pytest
from PIL import Image

from qwenvl_lit.data.loading import EncodedDataset, ignore_cluster_signals
from qwenvl_lit.types import BadImage, Conversation, DataError, Dropped, ImageSource


class Refuses:
    """A processor that cannot encode any row."""

    def __init__(self, error: DataError):
        self.error = error

    def encode(self, conversation, *, prompt):
        raise self.error


def dataset(error: DataError, *, drop_bad: bool) -> EncodedDataset:
    rows = [Conversation(id="a", turns=())]
    return EncodedDataset(rows, Refuses(error), prompt=False, renumber=False, drop_bad=drop_bad)


@pytest.mark.parametrize(
    ("error", "drop_bad"),
    [(Dropped("a is too long"), False), (BadImage("a.png is broken"), True)],
    ids=["dropped", "bad image"],
)
def test_a_row_that_is_left_out_becomes_its_reason(error, drop_bad):
    sample = dataset(error, drop_bad=drop_bad)[0]
    assert isinstance(sample, Dropped)
    assert str(sample) == str(error)


@pytest.mark.parametrize(
    ("error", "drop_bad"),
    [(DataError("no answer"), True), (BadImage("a.png is broken"), False)],
    ids=["another error", "bad image"],
)
def test_other_errors_are_raised(error, drop_bad):
    with pytest.raises(type(error), match=str(error)):
        dataset(error, drop_bad=drop_bad)[0]


def test_a_bad_image_says_how_to_leave_out_its_row():
    with pytest.raises(BadImage, match=r"is broken; .*data\.on_bad_image=drop"):
        dataset(BadImage("a.png is broken"), drop_bad=False)[0]


@pytest.mark.parametrize("prompt", [True, False])
def test_workers_compute_the_keys_of_images_of_prompts(tmp_path, prompt):
    image = ImageSource(tmp_path / "a.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")

    class Encodes:
        def encode(self, conversation, *, prompt):
            return SimpleNamespace(images=(image,))

    rows = [Conversation(id="a", turns=())]
    options = {"prompt": prompt, "renumber": False, "drop_bad": False}
    _ = EncodedDataset(rows, Encodes(), **options)[0]
    assert (image._key is not None) == prompt


def wait_as_worker(is_ready: Callable[[], None], stop) -> None:
    ignore_cluster_signals(0)
    is_ready()
    stop.wait(60)
    os._exit(3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_worker_stops_at_a_signal_of_its_parent_only(number):
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Event(), context.Event()
    worker = context.Process(target=wait_as_worker, args=(ready.set, stop))
    worker.start()
    assert ready.wait(60)
    subprocess.run(["kill", f"-{number.name[3:]}", str(worker.pid)], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    os.kill(worker.pid, number)
    worker.join(60)
    assert worker.exitcode == 0


def offer_a_file(connection) -> None:
    """Does what a worker does for a batch: its parent connects to receive the open file."""
    ignore_cluster_signals(0)
    connection.send(DupFd(1)._id[0])
    time.sleep(60)


def test_a_parent_that_breaks_off_while_it_receives_a_batch_leaves_no_traceback(capfd):
    parent, child = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=offer_a_file, args=(child,))
    worker.start()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(parent.recv())
    time.sleep(0.5)
    assert worker.is_alive()
    worker.kill()
    worker.join()
    assert capfd.readouterr().err == ""
