"""A process ends at a signal with one line, also when its main thread is stuck."""

import os
import signal
import subprocess
import sys
import time

import pytest

from qwenvl_lit import stopping

START = """
import ctypes, os, signal, sys, threading, time
from qwenvl_lit import stopping
from qwenvl_lit.cli.signals import stops_reported
from qwenvl_lit.stopping import signals

stopping.GRACE_SECONDS = 1.0

def block():
    "Waits in C, where Python runs no signal handler, as a collective without peers does."
    mutex = ctypes.create_string_buffer(64)
    library = ctypes.CDLL(None)
    library.pthread_mutex_lock(mutex)
    threading.Timer(0.5, print, ["ready"], {"flush": True}).start()  # from within the wait
    library.pthread_mutex_lock(mutex)

def wait():
    print("ready", flush=True)
    time.sleep(30)

"""


def start(script: str, *arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [*prefix, sys.executable, "-c", START + script, *arguments]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=30)
    return process.returncode, output.strip()


@pytest.mark.parametrize(
    ("number", "status", "name"),
    [
        (signal.SIGTERM, 143, "SIGTERM"),
        (signal.SIGUSR1, 143, "SIGUSR1"),
        (signal.SIGHUP, 129, "SIGHUP"),
        (signal.SIGINT, 130, "Ctrl-C"),
    ],
)
def test_a_signal_ends_a_command_with_one_line(number, status, name):
    process = start("with stops_reported('train'): wait()")
    process.send_signal(number)
    assert ended(process) == (status, f"Stopped by {name}. Nothing was saved.")


def test_the_line_says_what_was_kept():
    process = start("with stops_reported('test'):\n  signals.kept = 'All is kept.'; wait()")
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, "Stopped by SIGTERM. All is kept.")


def test_ctrl_c_in_chat_stays_a_keyboard_interrupt_and_sigterm_ends_it():
    script = """
with stops_reported('chat'):
    try:
        wait()
    except KeyboardInterrupt:
        print('interrupted')
    wait()
"""
    process = start(script)
    process.send_signal(signal.SIGINT)
    assert [process.stdout.readline() for _ in range(2)] == ["interrupted\n", "ready\n"]
    time.sleep(1.5)  # longer than the grace
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, "Stopped by SIGTERM. Nothing was saved.")


@pytest.mark.parametrize("records", ["", "signals.record(); "])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_process_that_is_stuck_is_ended(records, number, status):
    process = start(
        f"with stops_reported('train'):\n  {records}signals.kept = 'Saved after step 5.'; block()"
    )
    began = time.monotonic()
    process.send_signal(number)
    code, output = ended(process)
    assert code == status
    assert output.endswith("; it did not end by itself within 1 s. Saved after step 5.")
    assert 0.9 < time.monotonic() - began < 10


def test_a_run_that_makes_progress_or_saves_is_not_ended():
    script = """
with stops_reported('train'):
    signals.record()
    print('ready', flush=True)
    while not signals.received:
        time.sleep(0.01)
    for _ in range(4):
        time.sleep(0.6)
        signals.progress()
    with signals.saving():
        time.sleep(2)
    print('saved after', signals.received)
"""
    process = start(script)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (0, "saved after 15")


def test_a_repeated_signal_does_not_interrupt_the_end():
    script = """
with stops_reported('train'):
    try:
        wait()
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        print('cleaned up')
"""
    process = start(script)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, "cleaned up\n\nStopped by SIGTERM. Nothing was saved.")


def test_an_error_that_a_signal_has_caused_is_one_line():
    script = """
with stops_reported('train'):
    try:
        wait()
    finally:
        raise RuntimeError('a worker\\nis dead')
"""
    process = start(script)
    process.send_signal(signal.SIGTERM)
    line = "Stopped by SIGTERM (RuntimeError: a worker). Nothing was saved."
    assert ended(process) == (143, line)


def test_nohup_protects_from_sighup():
    script = """
with stops_reported('train'):
    print('ready', flush=True)
    time.sleep(1)
    print('done')
"""
    process = start(script, prefix=("nohup",))
    process.send_signal(signal.SIGHUP)
    code, output = ended(process)
    assert (code, output.splitlines()[-1]) == (0, "done")


def test_forked_processes_leave_signals_of_the_group_to_their_parent():
    script = """
with stops_reported('train'):
    child = os.fork()
    if not child:
        time.sleep(1)
        print('child lives', flush=True)
        os._exit(0)
    try:
        wait()
    finally:
        os.waitpid(child, 0)
"""
    process = start(script)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    assert ended(process) == (130, "child lives\n\nStopped by Ctrl-C. Nothing was saved.")


def test_other_ranks_end_silently_and_with_status_0():
    script = "os.environ['LOCAL_RANK'] = '1'\nwith stops_reported('train'): {}()"
    for way in ("wait", "block"):
        process = start(script.format(way))
        process.send_signal(signal.SIGTERM)
        assert ended(process) == (0, "")


def test_a_rank_ends_when_the_process_that_started_it_is_lost():
    script = """
import subprocess
if len(sys.argv) > 1:
    with stops_reported('train'):
        block()
stopping.PARENT_SECONDS = 0
environment = {**os.environ, 'LOCAL_RANK': '1'}
source = 'import sys; sys.argv.append("rank")\\n' + sys.orig_argv[-1]
rank = subprocess.Popen([sys.executable, '-c', source], env=environment)
time.sleep(30)
"""
    process = start(script)
    process.kill()
    process.wait()
    began = time.monotonic()
    process.stdout.read()  # until the rank has closed it
    assert time.monotonic() - began < 10


def test_the_message_does_not_name_a_signal_that_only_another_rank_received():
    line = stopping.SignalListener().line(0)
    assert line == "Stopped by a signal to another rank. Nothing was saved."


def test_a_rank_that_has_ended_ignores_signals_until_its_process_is_gone():
    script = """
import atexit
class Late:
    def __del__(self):  # in the last moments of the interpreter
        os.kill(os.getpid(), signal.SIGTERM)
os.environ['LOCAL_RANK'] = '1'
print('ready', flush=True)
with stops_reported('train'):
    late = Late()
atexit.register(os.kill, os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)
print('done')
"""
    assert ended(start(script)) == (0, "done")


def test_a_signal_to_a_rank_that_starts_waits_until_the_rank_can_end_by_itself():
    script = """
import subprocess
with stops_reported('train'):
    signals.hold_back()
    source = 'import time; print("ready", flush=True); time.sleep(0.5)\\n'
    source += sys.orig_argv[-1].partition('import subprocess')[0]
    source += 'with stops_reported("train"): time.sleep(30)'
    environment = {**os.environ, 'LOCAL_RANK': '1'}
    rank = subprocess.Popen([sys.executable, '-c', source], env=environment)
    stopping.GRACE_SECONDS = 20.0
    try:
        while True:
            time.sleep(0.05)
    finally:
        print(rank.wait())
"""
    process = start(script)
    os.killpg(process.pid, signal.SIGTERM)
    assert ended(process) == (143, "0\n\nStopped by SIGTERM. Nothing was saved.")


def test_a_signal_that_the_main_thread_cannot_see_has_arrived():
    script = """
def report():
    while not signals.arrived:
        time.sleep(0.01)
    print(signals.received, signals.arrived, flush=True)
threading.Thread(target=report, daemon=True).start()
with stops_reported('train'):
    block()
"""
    process = start(script)
    process.send_signal(signal.SIGTERM)
    status, output = ended(process)
    assert (status, output.splitlines()[0]) == (143, "0 15")
