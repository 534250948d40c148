"""Jobs of a sweep: what is started, at the same time or not, and what is left of those that fail."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.conf import ConfigSourceInfo
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

from qwenvl_lit.cli.command import config_folder
from qwenvl_lit.sweep.sweep import CaptureSweepConfig, Job, JobError, Sweep, job_slots, run_jobs
from qwenvl_lit.types import DataError


def job(folder: Path, number: int, program: str) -> Job:
    """A job that runs a Python program in place of a training run."""
    return Job(
        folder=folder / str(number),
        overrides=(f"number={number}", "x=1"),
        command=(sys.executable, "-c", program),
    )


def ended(folder: Path, number: int) -> dict:
    return json.loads((folder / str(number) / "job.json").read_text())


SLEEP = "import os, time; open('{started}', 'w').write(str(os.getpid())); time.sleep(60)"


def test_a_failed_job_leaves_its_error_and_does_not_lose_the_others(tmp_path, capsys):
    scores = json.dumps({"fit": {"last": {"val/loss": 1.25}}})
    programs = [
        "import sys; print('step 1'); print('error: data.train=x does not exist', file=sys.stderr); print('bye'); sys.exit(2)",
        "raise RuntimeError('CUDA out of memory')",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        f"open({str(tmp_path / '3/metrics.json')!r}, 'w').write({scores!r}); print('fine')",
    ]
    run_jobs(
        [job(tmp_path, number, program) for number, program in enumerate(programs)],
        [{}],
        metric="val/loss",
        keys=["number"],
    )
    assert [ended(tmp_path, number)["error"] for number in range(4)] == [
        "data.train=x does not exist",
        "RuntimeError: CUDA out of memory",
        "killed by SIGKILL (out of memory?)",
        None,
    ]
    assert ended(tmp_path, 3)["overrides"] == ["number=3", "x=1"]
    assert (tmp_path / "3/output.log").read_text() == "fine\n"
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"job 0 number=0: starts, prints to {tmp_path}/0/output.log"
    assert printed[1].startswith("job 0 number=0: failed (data.train=x does not exist), ")
    assert printed[7].startswith("job 3 number=3: val/loss 1.25, ")


def test_jobs_run_at_the_same_time_as_many_as_there_are_slots(tmp_path):
    meet = """
import os, time
from pathlib import Path
me = int(os.environ["ME"])
Path(HERE, f"with_{os.environ['CARD']}_{me}").touch()
deadline = time.monotonic() + 30
while len(list(Path(HERE).glob("with_*"))) < WAIT and time.monotonic() < deadline:
    time.sleep(0.01)
assert len(list(Path(HERE).glob("with_*"))) == WAIT
"""
    jobs = [
        job(
            tmp_path,
            number,
            meet.replace('os.environ["ME"]', str(number))
            .replace("HERE", repr(str(tmp_path)))
            .replace("WAIT", wait),
        )
        for number, wait in enumerate(
            ["2", "2", "3"]
        )  # the first two wait for each other, the third comes after
    ]
    run_jobs(jobs, [{"CARD": "a"}, {"CARD": "b"}], metric="val/loss")
    assert [ended(tmp_path, number)["error"] for number in range(3)] == [None] * 3
    assert {path.name for path in tmp_path.glob("with_*")} - {"with_a_2", "with_b_2"} == {
        "with_a_0",
        "with_b_1",
    }


def test_a_stopped_sweep_stops_its_jobs_and_counts_them_as_unfinished(tmp_path):
    started = tmp_path / "started"
    send(signal.SIGTERM, once=started)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        run_jobs(
            [job(tmp_path, 0, SLEEP.format(started=started)), job(tmp_path, 1, "")],
            [{}],
            metric="val/loss",
        )
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert not list(tmp_path.glob("*/job.json"))


def test_each_job_has_its_own_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,4,GPU-5")
    assert job_slots(1, accelerator="auto", devices=4) == [{}]
    assert job_slots(2, accelerator="gpu", devices=2) == [
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"CUDA_VISIBLE_DEVICES": "4,GPU-5"},
    ]
    assert job_slots(3, accelerator="auto", devices=1) == [
        {"CUDA_VISIBLE_DEVICES": card} for card in "014"
    ]
    with pytest.raises(
        DataError, match=r"sweep\.parallel=3: 3 jobs with 2 GPUs each, but there are 4"
    ):
        job_slots(3, accelerator="gpu", devices=2)
    with pytest.raises(DataError, match=r"sweep\.parallel=0"):
        job_slots(0, accelerator="gpu", devices=1)


def test_jobs_on_the_cpu_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert job_slots(2, accelerator="cpu", devices=2) == [{"OMP_NUM_THREADS": "4"}] * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert job_slots(2, accelerator="auto", devices=1) == [{"OMP_NUM_THREADS": "1"}] * 2


def send(number: signal.Signals, *, once: Path) -> None:
    """Send this process a signal as soon as a file has text."""

    def wait():
        while not (once.exists() and once.read_text()):
            threading.Event().wait(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


@pytest.fixture
def composed(tmp_path, monkeypatch):
    """Compose a job of a sweep as Hydra does before it calls the program, in the folder `tmp_path/0`."""

    def compose_job(
        *overrides: str,
        hydra: tuple[str, ...] = (),
        launcher: str | None = None,
        sweeper: str | None = None,
    ):
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            config = compose("train", [*overrides, *hydra], return_hydra_config=True)
        with open_dict(config):
            config.hydra.mode = RunMode.MULTIRUN
            config.hydra.runtime.output_dir = str(tmp_path / "0")
            config.hydra.runtime.config_sources = [
                ConfigSourceInfo(path="/mine", schema="file", provider="command-line")
            ]
            config.hydra.job.config_name = "train"
            config.hydra.launcher._target_ = launcher or config.hydra.launcher._target_
            config.hydra.sweeper._target_ = sweeper or config.hydra.sweeper._target_
        HydraConfig.instance().set_config(config)
        return config

    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    return compose_job


def test_a_job_is_the_command_line_of_a_run_that_knows_nothing_of_the_sweep(composed, tmp_path):
    sweep = Sweep("train")
    config = composed(
        "optim.lr=0.001",
        "sweep.parallel=2",
        "data.train=['a.jsonl#20']",
        hydra=("hydra.verbose=true",),
    )
    assert sweep.take(config, pytest.fail) is None
    assert sweep.jobs[0].overrides == ("optim.lr=0.001", "data.train=['a.jsonl#20']")
    assert sweep.jobs[0].command == (
        *(
            sys.executable,
            "-m",
            "qwenvl_lit.train",
            "--config-name=train",
            "--config-dir=/mine",
            "hydra.verbose=true",
        ),
        *(
            "optim.lr=0.001",
            "data.train=['a.jsonl#20']",
            "resume=auto",
            "hydra.mode=RUN",
            f"hydra.run.dir={tmp_path / '0'}",
        ),
    )


def test_an_interrupted_sweep_shows_what_it_has_and_how_to_go_on(
    composed, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        CaptureSweepConfig, "config", composed(hydra=(f"hydra.sweep.dir={tmp_path}",))
    )
    send(signal.SIGINT, once=tmp_path / "started")
    scores = json.dumps({"fit": {"last": {"val/loss": 1.25}}})
    sweep = Sweep("train")
    sweep.jobs.append(
        job(tmp_path, 0, f"open({str(tmp_path / '0/metrics.json')!r}, 'w').write({scores!r})")
    )
    sweep.jobs.append(job(tmp_path, 1, SLEEP.format(started=tmp_path / "started")))
    with pytest.raises(SystemExit) as stopped, sweep.reported():
        pass  # Hydra would have collected the jobs here
    assert stopped.value.code == 130
    printed = capsys.readouterr().out
    assert f"Score the best:  python -m qwenvl_lit.test ckpt={tmp_path}/0" in printed
    assert (
        f"1 of 2 jobs have not ended; to go on, the same command with hydra.sweep.dir={tmp_path}"
        in printed
    )


def test_a_folder_with_other_jobs_is_not_continued_and_keeps_their_configs(composed, tmp_path):
    config = tmp_path / "0/.hydra/config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text("number: 0\n")
    run_jobs([job(tmp_path, 0, "")], [{}], metric="val/loss")
    config.write_text("seed: 1\n")  # as Hydra does before it calls the program
    with pytest.raises(
        DataError,
        match=r"/0 holds a job with other values \(number=0 x=1\); choose another hydra.sweep.dir",
    ):
        Sweep("train").take(composed("seed=1"), pytest.fail)
    assert config.read_text() == "number: 0\n"


def test_jobs_that_would_share_a_process_are_refused(composed):
    with pytest.raises(
        DataError, match=r"hydra/launcher=basic: on one machine use sweep\.parallel=N"
    ):
        Sweep("train").take(
            composed(launcher="hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"),
            pytest.fail,
        )


def test_a_sweeper_that_waits_for_scores_runs_one_job_after_the_other(composed):
    with pytest.raises(
        DataError, match=r"sweep\.parallel=2: this hydra/sweeper runs one job after the other"
    ):
        Sweep("train").take(
            composed(
                "sweep.parallel=2", sweeper="hydra_plugins.hydra_optuna_sweeper.OptunaSweeper"
            ),
            pytest.fail,
        )


SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"


def test_on_a_cluster_the_job_runs_where_the_launcher_has_put_it(composed, tmp_path):
    def train(config):
        (tmp_path / "0").mkdir()
        (tmp_path / "0/metrics.json").write_text(
            json.dumps({"fit": {"best": {"val/loss": 0.5 * config.seed}}})
        )

    assert Sweep("train").take(composed("seed=3", launcher=SUBMITIT), train) == 1.5
    assert ended(tmp_path, 0) == {
        "overrides": ["seed=3"],
        "seconds": pytest.approx(0, abs=5),
        "error": None,
        "config": None,
    }


def test_on_a_cluster_a_failed_job_leaves_its_error(composed, tmp_path):
    config = composed(launcher=SUBMITIT)
    with pytest.raises(JobError, match="SystemExit: 2"):
        Sweep("train").take(config, lambda config: sys.exit(2))
    assert ended(tmp_path, 0)["error"] == "SystemExit: 2"
    Sweep("train").take(config, lambda config: None)
    assert ended(tmp_path, 0)["error"] is None
    Sweep("train").take(config, pytest.fail)  # a finished one does not run again


def test_slurm_starts_a_task_for_each_device():
    fields = dict.fromkeys(
        ("tasks_per_node", "gpus_per_node", "cpus_per_task", "timeout_min", "partition", "nodes")
    )
    ConfigStore.instance().store(
        group="hydra/launcher", name="submitit_slurm", node={"_target_": SUBMITIT, **fields}
    )
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


SMALL = [
    "+data.prepare.train=24",
    "+data.prepare.single=8",
    "+data.prepare.validation=2",
    "+data.prepare.test=2",
]
SMALL += [
    "+data.prepare.unseen_pairs=2",
    "+data.prepare.new_classes=2",
    "data.batch_size=4",
    "data.generated_validation_rows=2",
]
SMALL += [
    "data.num_workers=0",
    "data.train=[train.jsonl#24]",
    "trainer=smoke",
    "~callbacks.samples",
    "~callbacks.curves",
]


def test_lora_rank_is_swept_from_the_command_line(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        environment = {
            **os.environ,
            "QWENVL_LIT_CACHE": str(tmp_path / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        command = [
            sys.executable,
            "-m",
            "qwenvl_lit.train",
            "sweep=lora_rank",
            "hydra.sweep.dir=ranks (2)",
            *arguments,
            *SMALL,
        ]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    swept = run("adapter.rank=2,4", "sweep.parallel=2")
    assert swept.returncode == 0, swept.stdout + swept.stderr
    folder = tmp_path / "ranks (2)"
    for number, rank in enumerate((2, 4)):
        config = OmegaConf.load(folder / str(number) / "config.yaml")
        assert (config.adapter._target_, config.adapter.rank) == (
            "qwenvl_lit.training.adapters.methods.LoRA",
            rank,
        )
        assert (folder / str(number) / "checkpoints/best.ckpt").exists()
    assert "adapter.rank" in swept.stdout
    assert (folder / "sweep.csv").read_text().startswith("job,adapter.rank,val/loss,")
    assert (folder / "sweep.png").exists()

    (folder / "1/job.json").unlink()  # as if the sweep had been stopped in its second job
    again = run("adapter.rank=2,4")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "1 of 2 jobs are finished already" in again.stdout
    assert "job 0" not in again.stdout
    assert ended(folder, 1)["error"] is None
