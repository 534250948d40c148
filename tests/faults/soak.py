"""Long work in one process, whose memory and open files are sampled.

    python tests/faults/soak.py train 3000

prints the samples as JSON: [units of work done, resident memory in MB, open file descriptors].
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
Samples = list[tuple[int, float, int]]
MB = 1e6
WARM_UP = 0.3  # the share of the samples before memory is expected to be level


def sample(done: int) -> tuple[int, float, int]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return done, pages * os.sysconf("SC_PAGE_SIZE") / MB, len(os.listdir("/proc/self/fd"))


def train(count: int, folder: Path) -> Samples:
    """Optimizer steps of a tiny model, with a checkpoint after every 200th."""
    import lightning
    from small_run import run

    samples: Samples = []

    class Sampler(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step % (count // 50) == 0 and trainer.global_step:
                samples.append(sample(trainer.global_step))

    options = {"max_epochs": -1, "max_steps": count, "check_val_every_n_epoch": 50}
    run(folder, Sampler(), every=200, val_check_interval=1.0, **options)
    return samples


def predict(count: int, folder: Path) -> Samples:
    """Answers of a tiny model, written to a file."""
    import lightning
    from tiny import read_letters, tiny_task
    from toy_task import trainer

    from qwenvl_lit.callbacks.predictions import PredictionWriter
    from qwenvl_lit.data.datamodule import DataModule
    from qwenvl_lit.training.adapters.methods import Full

    samples: Samples = []
    batch_size = 5

    class Sampler(lightning.Callback):
        def on_predict_batch_end(self, trainer, module, outputs, batch, index, *_):
            done = batch_size * (index + 1)
            if done % (count // 50) == 0:
                samples.append(sample(done))

    module = tiny_task(Full())
    data = DataModule(
        processor=module.processor,
        read=read_letters,
        test={"letters": "abcdefghij" * (count // 10)},
        eval_batch_size=batch_size,
    )
    loop = trainer(folder, PredictionWriter(), Sampler())
    loop.predict(module, data, return_predictions=False)
    return samples


def chat(count: int, folder: Path, *, keep: int | None = None, rounds: int = 1) -> Samples:
    """Turns of a chat.

    Args:
        keep: how many turns of the history are given to the next one; None: all.
        rounds: how often the chat starts again with an empty history.
    """
    from scripted import tiny_checkpoint

    from qwenvl_lit import QwenVL

    config = tiny_checkpoint(folder / "model") / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 2**15})
    )
    model = QwenVL.load(folder / "model", dtype="float32", device="cpu")
    samples: Samples = []
    for round_number in range(rounds):
        history: list = []
        for turn in range(1, count + 1):
            question = f"What is number {turn}?"
            _, history = model.chat(question, history, max_new_tokens=8, min_new_tokens=8)
            if keep is not None:
                history = history[len(history) - keep :]
            if turn % max(1, count // 50) == 0:
                samples.append(sample(round_number * count + turn))
    return samples


WORK: dict[str, Callable[[int, Path], Samples]] = {
    "train": train,
    "predict": predict,
    "chat": chat,
    "chat that forgets": lambda count, folder: chat(count, folder, keep=1),
    "chat twice": lambda count, folder: chat(count, folder, rounds=2),
}


def measured(work: str, count: int) -> Samples:
    """Does the work in a process of its own."""
    paths = [ROOT, ROOT / "tests", ROOT / "scripts"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    process = subprocess.run(
        [sys.executable, __file__, work, str(count)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def slope(samples: Samples) -> float:
    """MB of memory per 1,000 units of work after the warm-up: a least-squares line."""
    level = samples[int(len(samples) * WARM_UP) :]
    mean_done = sum(done for done, *_ in level) / len(level)
    mean_memory = sum(memory for _, memory, _ in level) / len(level)
    product = sum((done - mean_done) * (memory - mean_memory) for done, memory, _ in level)
    return 1000 * product / sum((done - mean_done) ** 2 for done, *_ in level)


def main(work: str, count: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        samples = WORK[work](int(count), Path(folder))
    print(json.dumps(samples))


if __name__ == "__main__":
    main(*sys.argv[1:])
