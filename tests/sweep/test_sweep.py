"""Jobs of a sweep: how they are started, at the same time or not, and how failures are handled."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from commands import output_of, run_command
from hydra import compose, initialize_config_dir
from hydra.conf import ConfigSourceInfo
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict
from small_demo import small_demo

from qwenvl_lit.locks import ProcessLock, is_locked, lock_of
from qwenvl_lit.runs.run import config_folder
from qwenvl_lit.sweep import sweep as sweep_module
from qwenvl_lit.sweep.jobs import Job, job_slots, run_jobs
from qwenvl_lit.sweep.report import report
from qwenvl_lit.sweep.sweep import CaptureSweepConfig, JobError, Sweep
from qwenvl_lit.types import DataError

SLEEP = "import os, time; open('{started}', 'w').write(str(os.getpid())); time.sleep(60)"


def job(folder: Path, number: int, program: str) -> Job:
    """A job that runs a Python program in place of a training run."""
    return Job(
        folder=folder / str(number),
        overrides=(f"number={number}", "x=1"),
        command=(sys.executable, "-c", program),
    )


def write_scores(file: Path) -> str:
    """A program that writes a validation loss as a training run does."""
    scores = json.dumps({"fit": {"last": {"val/loss": 1.25}}})
    return f"open({str(file)!r}, 'w').write({scores!r})"


def saved_result(folder: Path, number: int) -> dict:
    return json.loads((folder / str(number) / "job.json").read_text())


def send_signal(number: signal.Signals, *, once: Path) -> None:
    """Sends this process a signal as soon as the file `once` has text."""

    def wait():
        while not (once.exists() and once.read_text()):
            threading.Event().wait(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


def test_a_failed_job_leaves_its_error_and_the_others_continue(tmp_path, capsys):
    programs = [
        "import sys; print('step 1'); print('error: data.train=x does not exist', "
        "file=sys.stderr); print('bye'); sys.exit(2)",
        "raise RuntimeError('CUDA out of memory')",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        f"{write_scores(tmp_path / '3/metrics.json')}; print('fine')",
    ]
    jobs = [job(tmp_path, number, program) for number, program in enumerate(programs)]
    run_jobs(jobs, [{}], metric="val/loss", keys=["number"])
    assert [saved_result(tmp_path, number)["error"] for number in range(4)] == [
        "data.train=x does not exist",
        "RuntimeError: CUDA out of memory",
        "killed by SIGKILL (out of memory?)",
        None,
    ]
    assert saved_result(tmp_path, 3)["overrides"] == ["number=3", "x=1"]
    assert (tmp_path / "3/output.log").read_text() == "fine\n"
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"job 0 number=0: starts, prints to {tmp_path}/0/output.log"
    assert printed[1].startswith("job 0 number=0: failed (data.train=x does not exist), ")
    assert printed[7].startswith("job 3 number=3: val/loss 1.25, ")


def test_as_many_jobs_run_at_the_same_time_as_there_are_slots(tmp_path):
    # Jobs 0 and 1 wait for each other; job 2 gets the slot of the first one that ends.
    meet = """
import os, time
from pathlib import Path
here, number, expected = Path({here!r}), {number}, {expected}
Path(here, f"with_{{os.environ['SLOT']}}_{{number}}").touch()
deadline = time.monotonic() + 30
while len(list(here.glob("with_*"))) < expected and time.monotonic() < deadline:
    time.sleep(0.01)
assert len(list(here.glob("with_*"))) == expected
"""
    jobs = []
    for number, expected in enumerate([2, 2, 3]):
        program = meet.format(here=str(tmp_path), number=number, expected=expected)
        jobs.append(job(tmp_path, number, program))
    run_jobs(jobs, [{"SLOT": "a"}, {"SLOT": "b"}], metric="val/loss")
    assert [saved_result(tmp_path, number)["error"] for number in range(3)] == [None] * 3
    files = {path.name for path in tmp_path.glob("with_*")}
    assert files - {"with_a_2", "with_b_2"} == {"with_a_0", "with_b_1"}


def test_a_stopped_sweep_stops_its_jobs_which_count_as_unfinished(tmp_path):
    started = tmp_path / "started"
    send_signal(signal.SIGTERM, once=started)
    before = signal.getsignal(signal.SIGTERM)
    jobs = [job(tmp_path, 0, SLEEP.format(started=started)), job(tmp_path, 1, "")]
    with pytest.raises(SystemExit) as stopped:
        run_jobs(jobs, [{}], metric="val/loss")
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert not list(tmp_path.glob("*/job.json"))


HOLD = """
import sys, time
from pathlib import Path
from qwenvl_lit.locks import ProcessLock, lock_of
lock = ProcessLock(lock_of(Path(sys.argv[1])))
assert lock.acquire()
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
lock.release()
"""


def start_orphan(folder: Path, seconds: float) -> subprocess.Popen:
    """A job that a killed sweep has left."""
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_job_that_still_runs_is_waited_for_and_then_started(tmp_path, capsys):
    orphan = start_orphan(tmp_path / "0", 1.5)
    threading.Thread(target=orphan.wait, daemon=True).start()
    program = f"import os, pathlib; assert not pathlib.Path('/proc/{orphan.pid}').exists()"
    run_jobs([job(tmp_path, 0, program)], [{}], metric="val/loss")
    assert saved_result(tmp_path, 0)["error"] is None
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"job 0: still runs as process {orphan.pid}, waiting for its end"
    assert printed[1].startswith("job 0: starts")
    assert len(printed) == 3


def test_a_job_that_was_refused_because_it_still_runs_is_started_later(tmp_path, capsys):
    program = f"""
import os, subprocess, sys, time
if not os.path.exists({str(tmp_path / "once")!r}):
    open({str(tmp_path / "once")!r}, "w").close()
    arguments = [sys.executable, "-c", {HOLD!r}, {str(tmp_path / "0")!r}, "1.5"]
    subprocess.Popen(arguments, stdout=subprocess.PIPE).stdout.readline()
    sys.exit(1)
"""
    run_jobs([job(tmp_path, 0, program)], [{}], metric="val/loss")
    assert saved_result(tmp_path, 0)["error"] is None
    events = [line.split(": ")[1].split()[0] for line in capsys.readouterr().out.splitlines()]
    assert events == ["starts,", "still", "starts,", "no"]


def test_a_stopped_sweep_also_stops_the_jobs_that_it_has_found(tmp_path):
    orphan = start_orphan(tmp_path / "0", 60)
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit):
        run_jobs([job(tmp_path, 0, "")], [{}], metric="val/loss")
    assert orphan.wait(timeout=5) == -signal.SIGTERM
    assert not (tmp_path / "0/job.json").exists()


def test_a_job_whose_output_is_gone_is_a_failed_job(tmp_path):
    program = f"import os, sys; os.remove({str(tmp_path / '0/output.log')!r}); sys.exit(3)"
    run_jobs([job(tmp_path, 0, program), job(tmp_path, 1, "")], [{}], metric="val/loss")
    assert [saved_result(tmp_path, number)["error"] for number in (0, 1)] == [
        "exit status 3",
        None,
    ]


def test_each_job_has_its_own_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,4,GPU-5")
    assert job_slots(1, accelerator="auto", devices=4) == [{}]
    assert job_slots(2, accelerator="gpu", devices=2) == [
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"CUDA_VISIBLE_DEVICES": "4,GPU-5"},
    ]
    assert job_slots(3, accelerator="auto", devices=1) == [
        {"CUDA_VISIBLE_DEVICES": gpu} for gpu in "014"
    ]
    message = r"sweep\.parallel=3: 3 jobs with 2 GPUs each, but there are 4"
    with pytest.raises(DataError, match=message):
        job_slots(3, accelerator="gpu", devices=2)
    with pytest.raises(DataError, match=r"sweep\.parallel=0"):
        job_slots(0, accelerator="gpu", devices=1)


def test_jobs_on_the_cpu_share_its_cores(monkeypatch):
    monkeypatch.setattr("qwenvl_lit.sweep.jobs.available_cores", lambda: 9)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert job_slots(2, accelerator="cpu", devices=2) == [{"OMP_NUM_THREADS": "4"}] * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert job_slots(2, accelerator="auto", devices=1) == [{"OMP_NUM_THREADS": "1"}] * 2


@pytest.fixture
def composed(tmp_path, monkeypatch):
    """Composes a job in the folder `tmp_path/0`, as Hydra does before it calls the program."""

    def compose_job(
        *overrides: str,
        hydra: tuple[str, ...] = (),
        launcher: str | None = None,
        sweeper: str | None = None,
    ):
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            config = compose("train", [*overrides, *hydra], return_hydra_config=True)
        source = ConfigSourceInfo(path="/mine", schema="file", provider="command-line")
        with open_dict(config):
            config.hydra.mode = RunMode.MULTIRUN
            config.hydra.runtime.output_dir = str(tmp_path / "0")
            config.hydra.runtime.config_sources = [source]
            config.hydra.job.config_name = "train"
            config.hydra.launcher._target_ = launcher or config.hydra.launcher._target_
            config.hydra.sweeper._target_ = sweeper or config.hydra.sweeper._target_
        HydraConfig.instance().set_config(config)
        return config

    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    return compose_job


def test_a_job_is_the_command_line_of_a_run_without_a_sweep(composed, tmp_path):
    sweep = Sweep("train")
    overrides = ("optim.lr=0.001", "data.train=['a.jsonl#20']")
    config = composed(*overrides, "sweep.parallel=2", hydra=("hydra.verbose=true",))
    assert sweep.take(config, pytest.fail) is None
    assert sweep.jobs[0].overrides == overrides
    python = (sys.executable, "-m", "qwenvl_lit.train")
    flags = ("--config-name=train", "--config-dir=/mine", "hydra.verbose=true")
    run = ("resume=auto", "hydra.mode=RUN", f"hydra.run.dir={tmp_path / '0'}")
    assert sweep.jobs[0].command == (*python, *flags, *overrides, *run)


def test_an_interrupted_sweep_shows_its_results_and_how_to_resume(
    composed, tmp_path, monkeypatch, capsys
):
    config = composed(hydra=(f"hydra.sweep.dir={tmp_path}",))
    monkeypatch.setattr(CaptureSweepConfig, "config", config)
    send_signal(signal.SIGINT, once=tmp_path / "started")
    sweep = Sweep("train")
    sweep.jobs.append(job(tmp_path, 0, write_scores(tmp_path / "0/metrics.json")))
    sweep.jobs.append(job(tmp_path, 1, SLEEP.format(started=tmp_path / "started")))
    with pytest.raises(SystemExit) as stopped, sweep.reported():
        pass  # Hydra would have composed the jobs here
    assert stopped.value.code == 130
    printed = capsys.readouterr().out
    assert f"Score the best:  python -m qwenvl_lit.test ckpt={tmp_path}/0" in printed
    assert (
        f"1 of 2 jobs did not end; to resume, repeat the command with hydra.sweep.dir={tmp_path}"
    ) in printed


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["data=jsonl", "data.validation=null"], r"data\.validation=null gives no rows"),
        (["data=jsonl", "data.validation=0"], r"data\.validation=0 gives no rows"),
        (["trainer.limit_val_batches=0"], r"trainer\.limit_val_batches=0 turns validation off"),
    ],
)
def test_a_sweep_without_validation_says_why_there_is_no_score(
    overrides, reason, composed, tmp_path, monkeypatch, capsys
):
    config = composed(*overrides, hydra=(f"hydra.sweep.dir={tmp_path}",))
    monkeypatch.setattr(CaptureSweepConfig, "config", config)
    sweep = Sweep("train")
    sweep.jobs += [job(tmp_path, 0, "pass"), job(tmp_path, 1, "pass")]
    with sweep.reported():
        pass  # Hydra would have composed the jobs here
    first, *_, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(f"warning: the jobs will have no score: {reason}.*", first)
    assert re.fullmatch(f"No job has a score: {reason}.*", last)


def test_a_metric_that_no_job_has_is_named_after_the_jobs_without_losing_them(tmp_path):
    run_jobs([job(tmp_path, 0, write_scores(tmp_path / "0/metrics.json"))], [{}], metric="val/los")
    message = r"they have val/loss\. Repeat the command .* hydra\.sweep\.dir=.*do not train again"
    with pytest.raises(DataError, match=message):
        report(tmp_path, metric="val/los", mode="min")


def test_a_job_that_removes_its_folder_is_a_failed_row_and_the_others_go_on(tmp_path):
    remove = f"import shutil, sys; shutil.rmtree({str(tmp_path / '0')!r}); sys.exit(2)"
    jobs = [job(tmp_path, 0, remove), job(tmp_path, 1, write_scores(tmp_path / "1/metrics.json"))]
    run_jobs(jobs, [{}], metric="val/loss")
    assert saved_result(tmp_path, 0)["error"] == "exit status 2"
    assert saved_result(tmp_path, 1)["error"] is None


def test_a_folder_with_other_jobs_is_refused_and_keeps_their_configs(composed, tmp_path):
    config = tmp_path / "0/.hydra/config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text("number: 0\n")
    run_jobs([job(tmp_path, 0, "")], [{}], metric="val/loss")
    config.write_text("seed: 1\n")  # as Hydra does before it calls the program
    message = r"/0 holds a job with other values \(number=0 x=1\); choose another hydra.sweep.dir"
    with pytest.raises(DataError, match=message):
        Sweep("train").take(composed("seed=1"), pytest.fail)
    assert config.read_text() == "number: 0\n"


def test_a_launcher_that_runs_jobs_in_one_process_is_refused(composed):
    joblib = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
    message = r"hydra/launcher=basic: on one machine use sweep\.parallel=N"
    with pytest.raises(DataError, match=message):
        Sweep("train").take(composed(launcher=joblib), pytest.fail)


def test_a_sweeper_that_waits_for_scores_runs_one_job_after_the_other(composed):
    optuna = "hydra_plugins.hydra_optuna_sweeper.OptunaSweeper"
    message = r"sweep\.parallel=2: this hydra/sweeper runs one job after the other"
    with pytest.raises(DataError, match=message):
        Sweep("train").take(composed("sweep.parallel=2", sweeper=optuna), pytest.fail)


@pytest.mark.parametrize("setting", ["sweep.parallel=0", "sweep.parallel=1.5", "sweep.mode=best"])
def test_a_setting_that_makes_no_sense_is_refused_before_a_job_starts(composed, setting):
    key = setting.partition("=")[0]
    with pytest.raises(DataError, match=f"^{key} must be "):
        Sweep("train").take(composed(setting), pytest.fail)


SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"


def test_on_a_cluster_the_job_runs_in_the_process_of_the_launcher(composed, tmp_path):
    def train(config):
        assert is_locked(lock_of(tmp_path / "0"))
        scores = {"fit": {"best": {"val/loss": 0.5 * config.seed}}}
        (tmp_path / "0/metrics.json").write_text(json.dumps(scores))

    assert Sweep("train").take(composed("seed=3", launcher=SUBMITIT), train) == 1.5
    assert saved_result(tmp_path, 0) == {
        "overrides": ["seed=3"],
        "seconds": pytest.approx(0, abs=5),
        "error": None,
        "config": None,
    }


def test_on_a_cluster_a_job_does_not_run_in_a_folder_that_another_process_uses(
    composed, tmp_path, monkeypatch
):
    monkeypatch.setattr(sweep_module, "WAIT_SECONDS", 0.0)
    (tmp_path / "0").mkdir()
    lock = ProcessLock(lock_of(tmp_path / "0"))
    assert lock.acquire()
    with pytest.raises(JobError, match=rf"0 is used by process {os.getpid()} on "):
        Sweep("train").take(composed(launcher=SUBMITIT), pytest.fail)
    assert not (tmp_path / "0/job.json").exists()
    lock.release()
    Sweep("train").take(composed(launcher=SUBMITIT), lambda config: None)
    assert not lock_of(tmp_path / "0").exists()


def test_on_a_cluster_a_failed_job_leaves_its_error_and_runs_again(composed, tmp_path):
    config = composed(launcher=SUBMITIT)
    with pytest.raises(JobError, match="SystemExit: 2"):
        Sweep("train").take(config, lambda config: sys.exit(2))
    assert saved_result(tmp_path, 0)["error"] == "SystemExit: 2"
    Sweep("train").take(config, lambda config: None)
    assert saved_result(tmp_path, 0)["error"] is None
    Sweep("train").take(config, pytest.fail)  # a finished job does not run again


def test_slurm_starts_a_task_for_each_device():
    keys = ("tasks_per_node", "gpus_per_node", "cpus_per_task", "timeout_min", "partition", "nodes")
    node = {"_target_": SUBMITIT, **dict.fromkeys(keys)}
    ConfigStore.instance().store(group="hydra/launcher", name="submitit_slurm", node=node)
    overrides = ["strategy=ddp", "hydra/launcher=slurm", "hydra.launcher.partition=a100"]
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        launcher = compose("train", overrides, return_hydra_config=True).hydra.launcher
    assert OmegaConf.to_container(launcher, resolve=True) == {
        "_target_": SUBMITIT,
        "tasks_per_node": 2,
        "gpus_per_node": 2,
        "cpus_per_task": 8,
        "timeout_min": 1440,
        "partition": "a100",
        "nodes": None,
    }


SWEEP_RANKS = [
    "sweep=lora_rank",
    "hydra.sweep.dir=ranks (2)",
    "trainer=smoke",
    *small_demo(train=24, single=8, validation=2, test=2, new_classes=2),
    "data.train=[train.jsonl#24]",
    "data.batch_size=4",
    "data.generated_validation_rows=2",
    "data.num_workers=0",
    "~callbacks.samples",
    "~callbacks.curves",
]


def test_lora_rank_is_swept_from_the_command_line(tmp_path):
    printed = output_of(tmp_path, "train", *SWEEP_RANKS, "adapter.rank=2,4", "sweep.parallel=2")
    folder = tmp_path / "ranks (2)"
    for number, rank in enumerate((2, 4)):
        adapter = OmegaConf.load(folder / str(number) / "config.yaml").adapter
        assert adapter._target_ == "qwenvl_lit.training.adapters.methods.LoRA"
        assert adapter.rank == rank
        assert (folder / str(number) / "checkpoints/best.ckpt").exists()
    assert "adapter.rank" in printed
    assert (folder / "sweep.csv").read_text().startswith("job,adapter.rank,val/loss,")
    assert (folder / "sweep.png").exists()

    (folder / "1/job.json").unlink()  # as if the sweep had been stopped in its second job
    printed = output_of(tmp_path, "train", *SWEEP_RANKS, "adapter.rank=2,4")
    assert "1 of 2 jobs finished already" in printed
    assert "job 0" not in printed
    assert saved_result(folder, 1)["error"] is None


def test_a_job_that_is_refused_early_is_a_row_and_the_other_jobs_run(tmp_path):
    arguments = [argument for argument in SWEEP_RANKS if argument != "sweep=lora_rank"]
    process = run_command(tmp_path, "train", "-m", *arguments, "optim.lr=oops,1e-3")
    assert process.returncode == 1
    folder = tmp_path / "ranks (2)"
    assert "oops" in saved_result(folder, 0)["error"]
    assert saved_result(folder, 1)["error"] is None
    assert "Traceback" not in process.stdout + process.stderr
    assert len((folder / "sweep.csv").read_text().splitlines()) == 3
