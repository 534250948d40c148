"""A run that was killed and resumed ends exactly as one that was never interrupted."""

import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import lightning
import pytest
import torch
import torch.multiprocessing
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.plugins.environments import SLURMEnvironment
from safetensors.torch import load_file
from small_run import DROPOUT, At, Killed, history, kills_at, run, same
from tiny import tiny_family
from toy_task import ToyData, ToyTask, conversation, trainer
from warm import run_processes

from qwenvl_lit.callbacks.checkpoint import AtomicCheckpointIO, RunCheckpoint, save_adapter
from qwenvl_lit.callbacks.run_log import RunLog
from qwenvl_lit.runs.run import config_folder
from qwenvl_lit.stopping import INTERRUPTED, STOPPED
from qwenvl_lit.training.adapters.methods import Full
from qwenvl_lit.types import DataError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


def load(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / f"checkpoints/{name}.ckpt", weights_only=True)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A disk without room for larger files, as far as a process can tell."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """An uninterrupted run: its folder and the trained tensors."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


@pytest.mark.parametrize(
    ("hook", "nth"),
    [
        ("on_train_batch_start", 6),  # in the middle of an optimizer step
        ("on_before_optimizer_step", 4),
        ("on_train_batch_end", 6),
        ("on_validation_batch_start", 8),
        ("on_validation_end", 3),
        ("on_train_epoch_end", 1),
        ("on_train_batch_start", 9),  # in the second epoch
        ("on_train_batch_end", 14),
        ("on_train_end", 1),
    ],
)
def test_a_killed_and_resumed_run_ends_as_an_uninterrupted_one(whole, tmp_path, hook, nth):
    with pytest.raises(Killed):
        run(tmp_path, kills_at(hook, nth))
    assert same(run(tmp_path, resume=True), whole[1])
    assert history(tmp_path) == history(whole[0])
    best, expected = load(tmp_path, "best"), load(whole[0], "best")
    assert best["global_step"] == expected["global_step"]
    assert same(best["state_dict"], expected["state_dict"])


def test_a_checkpoint_that_is_due_with_a_validation_is_written_after_it(tmp_path):
    whole = run(tmp_path / "whole", val_check_interval=4)
    with pytest.raises(Killed):
        run(tmp_path / "killed", kills_at("on_train_batch_start", 6), val_check_interval=4)
    assert same(run(tmp_path / "killed", resume=True, val_check_interval=4), whole)
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    steps = [record["step"] for record in history(tmp_path / "whole") if "val/loss" in record]
    assert steps == [2, 6], "no validation was skipped or repeated"


@pytest.mark.parametrize(
    ("every", "options"),
    [
        (1, {"max_epochs": -1, "max_steps": 11}),
        (4, {"max_epochs": -1, "max_steps": 11, "val_check_interval": 1.0}),
        (4, {"max_epochs": 3, "limit_val_batches": 0}),
        (1, {"max_epochs": 3, "limit_train_batches": 4}),  # validations in the middle of a step
        (
            4,
            {
                "max_epochs": -1,
                "max_steps": 11,
                "val_check_interval": 5,
                "check_val_every_n_epoch": None,
            },
        ),
    ],
    ids=str,
)
def test_a_run_that_is_killed_several_times_ends_as_an_uninterrupted_one(tmp_path, every, options):
    """Checkpoints are in the middle and at the end of epochs, with different ends of the run."""
    whole = run(tmp_path / "whole", every=every, **options)
    for batches in (3, 6, 5, None):
        deaths = [kills_at("on_train_batch_start", batches)] if batches else []
        with pytest.raises(Killed) if batches else nullcontext():
            resume = (tmp_path / "killed/checkpoints/last.ckpt").exists()
            weights = run(tmp_path / "killed", *deaths, every=every, resume=resume, **options)
    assert same(weights, whole)
    assert history(tmp_path / "killed") == history(tmp_path / "whole")


@pytest.mark.parametrize(
    ("shorter", "longer"),
    [({"max_epochs": 1}, {"max_epochs": 2}), ({"max_steps": 2}, {"max_steps": 7})],
)
def test_a_longer_run_continues_after_the_end_of_a_shorter_one(tmp_path, shorter, longer):
    rows: list[str] = []

    class Rows(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rows.append("".join(conversation.id for conversation in batch.conversations))

    run(tmp_path / "whole", Rows(), **longer)
    whole, rows[:] = list(rows), []
    run(tmp_path / "parts", Rows(), **shorter)
    run(tmp_path / "parts", Rows(), resume=True, **longer)
    assert rows == whole
    parts_steps, whole_steps = (
        [record["step"] for record in history(tmp_path / name) if "loss" in record]
        for name in ("parts", "whole")
    )
    assert parts_steps == whole_steps


def killed_while_writing(rank: int, folder: Path, nth: int) -> None:
    """A run that kills itself when its `nth` file is written, but has no name yet."""
    files = 0
    fsync = os.fsync

    def fsync_or_die(handle: int) -> None:
        nonlocal files
        if os.readlink(f"/proc/self/fd/{handle}").endswith(".part"):
            files += 1
        if files == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)

    os.fsync = fsync_or_die
    torch.set_num_threads(1)
    run(folder)


def test_a_run_killed_while_it_writes_a_checkpoint_has_the_one_before(whole, tmp_path):
    """The run writes `best` after step 1, `last` after 2, `best` after 3, and `last` after 4."""
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        run_processes(killed_while_writing, tmp_path, 4)
    assert (tmp_path / "checkpoints/last.ckpt.part").exists()
    assert load(tmp_path)["global_step"] == 2
    assert same(run(tmp_path, resume=True), whole[1])
    assert not list(tmp_path.glob("checkpoints/*.part"))


def test_a_full_disk_is_reported_and_the_last_good_checkpoint_is_kept(tmp_path):
    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    full = r"last\.ckpt cannot be written: .*hydra\.run\.dir=.*resume=RUN"
    with file_size_limit(resource.RLIM_INFINITY), pytest.raises(DataError, match=full):
        run(tmp_path, At("on_train_batch_start", 7, fill), limit_val_batches=0)
    assert [path.name for path in (tmp_path / "checkpoints").glob("*.ckpt*")] == ["last.ckpt"]
    assert load(tmp_path)["global_step"] == 2


def test_a_full_disk_is_reported_for_an_adapter_too(tmp_path):
    family = tiny_family()
    model = DROPOUT.apply(family.load(), family)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_adapter(model, tensors, tmp_path / "adapter")
    before = load_file(tmp_path / "adapter/adapter_model.safetensors")
    with (
        file_size_limit(1000),
        pytest.raises(DataError, match=r"adapter cannot be written: .*hydra\.run\.dir="),
    ):
        save_adapter(model, tensors, tmp_path / "adapter")
    assert same(load_file(tmp_path / "adapter/adapter_model.safetensors"), before)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_that_cannot_be_written_is_reported_before_training(tmp_path):
    (tmp_path / "checkpoints").write_text("not a folder")
    with pytest.raises(DataError, match="checkpoints cannot be written"):
        run(tmp_path)


def test_a_checkpoint_holds_the_trained_tensors_and_states_and_is_read_without_code(whole):
    file = whole[0] / "checkpoints/last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    states = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "random", "config"}
    assert states <= checkpoint.keys()
    assert checkpoint["config"] == {"seed": 3}
    assert all("lora_" in name for name in checkpoint["state_dict"])
    parameters = sum(tensor.numel() for tensor in checkpoint["state_dict"].values())
    # float32 weights and two moments; 50 MB for the 4,194,304 parameters of adapter=lora
    assert file.stat().st_size < 3 * 4 * parameters + 200_000


def test_older_checkpoints_are_kept_if_asked_for(tmp_path):
    run(tmp_path, keep=2, every=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("*.ckpt")) == [
        "best.ckpt",
        "last.ckpt",
        "step_000006.ckpt",
        "step_000007.ckpt",
    ]
    for name, step in (("step_000006", 6), ("step_000007", 7), ("last", 8)):
        assert load(tmp_path, name)["global_step"] == step


def test_a_run_that_stops_early_keeps_its_best_and_its_last_checkpoint(tmp_path):
    """The loss is best after the first epoch of four steps, and two worse ones end the run."""

    class Worsens(ToyTask):
        def on_validation_epoch_end(self):
            self.log("val/loss", float(self.current_epoch))

    overrides = ["callbacks=[train,early_stopping]", "callbacks.early_stopping.patience=2"]
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        node = compose("train", overrides).callbacks.early_stopping
    callbacks = (instantiate(node), RunLog(), RunCheckpoint())
    rows = [conversation(index, says="yes") for index in range(8)]
    trainer(tmp_path, *callbacks, max_epochs=9, enable_checkpointing=True).fit(
        Worsens(), ToyData(rows)
    )
    assert load(tmp_path, "best")["global_step"] == 4
    assert load(tmp_path, "last")["global_step"] == 12
    best = json.loads((tmp_path / "metrics.json").read_text())["fit"]["best"]
    assert (best["step"], best["checkpoint"]) == (4, str(tmp_path / "checkpoints/best.ckpt"))


def test_the_adapter_of_a_checkpoint_is_also_a_folder_for_peft(whole):
    from peft import PeftModel

    for name in ("best", "last"):
        folder = whole[0] / "checkpoints" / f"{name}_adapter"
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
        weights = load_file(folder / "adapter_model.safetensors")
        assert "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight" in weights
        loaded = dict(PeftModel.from_pretrained(tiny_family().load(), folder).named_parameters())
        stored = load(whole[0], name)["state_dict"]
        assert len(weights) == len(stored)
        for key, tensor in stored.items():
            assert torch.equal(loaded[key.removeprefix("model.")], tensor), key


def test_full_fine_tuning_resumes_too_and_writes_no_adapter(tmp_path):
    whole = run(tmp_path / "whole", adapter=Full())
    with pytest.raises(Killed):
        run(tmp_path / "killed", kills_at("on_train_batch_start", 10), adapter=Full())
    assert same(run(tmp_path / "killed", resume=True, adapter=Full()), whole)
    assert not list(tmp_path.rglob("*adapter*"))


@pytest.mark.parametrize(
    ("hook", "number", "status"),
    [
        ("on_train_batch_start", signal.SIGTERM, STOPPED),
        ("on_train_batch_end", signal.SIGUSR1, STOPPED),
        ("on_validation_batch_start", signal.SIGINT, INTERRUPTED),
    ],
)
def test_a_signalled_run_finishes_its_step_and_saves(whole, tmp_path, hook, number, status, capsys):
    handlers = [signal.getsignal(stop) for stop in STOP_SIGNALS]
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, At(hook, 6, lambda: os.kill(os.getpid(), number)), every=1000)
    assert ended.value.code == status
    assert [signal.getsignal(stop) for stop in STOP_SIGNALS] == handlers
    command = f"python -m qwenvl_lit.train resume={tmp_path}"
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    line = f"Stopped by {name}. Saved after step 3. Resume:  {command}\n"
    assert capsys.readouterr().err.endswith(line)
    assert same(run(tmp_path, resume=True, every=1000), whole[1])
    assert history(tmp_path) == history(whole[0])


@pytest.mark.parametrize(("accumulated", "steps"), [(2, 1), (4, 0)])
def test_a_run_that_is_signalled_within_a_step_repeats_this_step(tmp_path, accumulated, steps):
    """The signal comes in the validation after the third batch, whose gradients are lost."""
    options = {"every": 1000, "accumulate_grad_batches": accumulated}
    whole = run(tmp_path / "whole", **options)
    signalled = At("on_validation_batch_start", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        run(tmp_path / "stopped", signalled, **options)
    assert load(tmp_path / "stopped")["global_step"] == steps
    assert same(run(tmp_path / "stopped", resume=True, **options), whole)
    assert history(tmp_path / "stopped") == history(tmp_path / "whole")


def test_a_second_ctrl_c_while_torch_writes_is_not_a_disk_error(tmp_path, monkeypatch):
    def interrupted(*_):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 0")

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_lightning_does_not_requeue_the_job_of_a_cluster(tmp_path, monkeypatch):
    """Its handler of SIGUSR1 would save a checkpoint of its own and call `scontrol`."""
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    for name, value in (("NTASKS", "1"), ("JOB_ID", "7"), ("JOB_NAME", "train")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    signalled = At("on_train_batch_start", 6, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    with pytest.raises(SystemExit):
        run(tmp_path, signalled, plugins=[SLURMEnvironment(auto_requeue=True)])
    assert not list(tmp_path.rglob("hpc_ckpt*"))
    assert load(tmp_path)["global_step"] == 3


def test_another_number_of_processes_is_refused(whole, tmp_path):
    checkpoint = load(whole[0])
    checkpoint["random"] *= 2
    (tmp_path / "checkpoints").mkdir()
    torch.save(checkpoint, tmp_path / "checkpoints/last.ckpt")
    with pytest.raises(DataError, match="had 2 processes, this one has 1"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize("options", [{"every": 0}, {"keep": -1}, {"mode": "lowest"}])
def test_wrong_settings_are_named(options):
    with pytest.raises(ValueError, match=r"callbacks\.checkpoint"):
        RunCheckpoint(**options)
