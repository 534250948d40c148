"""Full and read-only disks: one line that names the disk, nothing lost, done once there is room."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from faults.processes import Finished, fork_command
from faults.recipes import (
    LORA,
    SHORTER,
    TRAIN,
    answers,
    assert_same_run,
    file_names,
    load,
)
from faults.small_disk import can_mount, small_disk
from faults.tally import sizes, tallied

RUN = ["train", *TRAIN, *SHORTER]
ROWS = ["data=jsonl", "data.train=cache/demo/train.jsonl", "data.validation=4", "metrics=exact"]
ON_FULL_DISKS = {  # what lies on the small disk `disk`, in `HOME`
    "run folder of train": [*RUN, "hydra.run.dir=disk/run", "resume=auto"],
    "cache of train": [*RUN, "hydra.run.dir=run", "resume=auto"],
    "vision cache": [
        *(*RUN, *LORA, "adapter.targets=attention", "speed.vision_cache=true"),
        *("hydra.run.dir=run", "resume=auto"),
    ],
    "run folder of predict": [
        *("predict", "ckpt=trained", "data.test=train.jsonl", "hydra.run.dir=disk/answers"),
    ],
    "run folder of test": ["test", "ckpt=trained", "hydra.run.dir=disk/scores"],
    "out of export": ["export", "ckpt=trained", "out=disk/exported"],
}
CACHE_ON_DISK = ("cache of train", "vision cache")
KILOBYTES = (8, 40, 200, 600, 1500, 3000)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with the demo's data in its cache and a run, `trained`."""
    folder = tmp_path_factory.mktemp("home")
    finished = fork_command(folder, *RUN, "hydra.run.dir=trained")
    assert finished.status == 0, finished.output
    return folder


@pytest.fixture
def copied(home, tmp_path):
    """Returns a function that makes a copy of `home`."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(home, tmp_path / name))

    return copy


def refuses_for_the_disk(finished: Finished, folder: Path) -> None:
    finished.refuses()
    [error] = finished.errors
    is_named = folder.name in error or "the run folder" in error
    assert is_named, f"it does not name {folder}: {error}"


def test_a_limit_on_file_sizes_is_one_line_and_leaves_whole_files(copied):
    """For everybody, also where no disk can be mounted."""
    with tallied("full disks", "largest file limited") as tally:
        for name, limit in (("export", 100_000), ("train", 200_000)):
            folder = copied(name)
            out = {"export": "exported", "train": "run"}[name]
            line = {
                "export": ["export", "ckpt=trained", "out=exported", "compare=none"],
                "train": [*RUN, "hydra.run.dir=run"],
            }[name]
            with tally.attempt(f"{name} with files of at most {limit} bytes"):
                refuses_for_the_disk(fork_command(folder, *line, file_limit=limit), folder / out)
                for file in folder.glob("run/checkpoints/*.ckpt"):
                    load(file)
                assert not (folder / "exported").exists(), "half an export"


@sizes(short=None, full=KILOBYTES)
@pytest.mark.parametrize("kind", ON_FULL_DISKS)
def test_a_full_disk_is_one_line_and_the_command_succeeds_once_there_is_room(
    kind, copied, tmp_path, size
):
    if not can_mount(tmp_path):
        pytest.skip("no disk can be mounted")
    line = ON_FULL_DISKS[kind]
    whole = copied("whole")
    (whole / "disk").mkdir()
    expected = fork_command(whole, *line)
    assert expected.status == 0, expected.output
    with tallied("full disks", kind) as tally:
        for kilobytes in size:
            folder = copied(f"home_{kilobytes}")
            with tally.attempt(f"{kilobytes} kB"), small_disk(folder / "disk", kilobytes) as disk:
                variables = {}
                if kind in CACHE_ON_DISK:
                    variables["QWENVL_LIT_CACHE"] = str(disk.folder)
                finished = fork_command(folder, *line, **variables)
                if finished.status != 0:
                    refuses_for_the_disk(finished, disk.folder)
                    assert whole_checkpoints(folder), "half a checkpoint"
                    disk.remount("size=200m")
                    repeated = fork_command(folder, *repeated_line(line, folder), **variables)
                    assert repeated.status == 0, f"with room: {repeated.output[-300:]}"
                compare(kind, folder, whole)
            shutil.rmtree(folder)


def repeated_line(line: list[str], folder: Path) -> list[str]:
    """The command again. A prediction takes another folder, and the answers there are."""
    if line[0] != "predict":
        return line
    again = [*line[:-1], "hydra.run.dir=disk/again"]
    answered = [file for file in folder.glob("disk/answers/predictions*") if file.stat().st_size]
    return [*again, "answered=disk/answers"] if answered else again


def whole_checkpoints(folder: Path) -> bool:
    for file in folder.rglob("*.ckpt"):
        with suppress(RuntimeError, EOFError):
            load(file)
            continue
        return False
    return True


def compare(kind: str, folder: Path, whole: Path) -> None:
    match kind:
        case "run folder of train":
            assert_same_run(folder / "disk/run", whole / "disk/run")
        case "cache of train" | "vision cache":
            assert_same_run(folder / "run", whole / "run")
        case "out of export":
            names = file_names(whole / "disk/exported")
            assert file_names(folder / "disk/exported") == names, "files of the export differ"
        case _:
            made, expected = (predicted(home / "disk") for home in (folder, whole))
            assert made == expected, "the answers differ"


def predicted(disk: Path) -> list[str]:
    newest = max(disk.glob("*/predictions.jsonl"), key=lambda file: file.stat().st_mtime)
    return [row["prediction"] for row in answers(newest.parent)]


@sizes(short=None, full=1)
def test_a_read_only_disk_is_one_line_or_no_hindrance(copied, tmp_path, size):
    if not can_mount(tmp_path):
        pytest.skip("no disk can be mounted")
    with tallied("read-only disks", "run folder, out, cache, data and model") as tally:
        folder = copied("home")
        with small_disk(folder / "disk", 50_000) as disk:
            shutil.copytree(folder / "cache", disk.folder / "cache")
            shutil.copytree(folder / "trained", disk.folder / "trained")
            disk.remount("ro")
            refused = {
                "run folder of train": [*RUN, "hydra.run.dir=disk/run"],
                "resumed run": ["train", "resume=disk/trained", "trainer.max_steps=6"],
                "run folder of predict": [
                    *("predict", "ckpt=trained", "hydra.run.dir=disk/answers"),
                ],
                "run folder of test": ["test", "ckpt=trained", "hydra.run.dir=disk/scores"],
                "out of export": ["export", "ckpt=trained", "out=disk/exported"],
                "run folder of check": ["check", *ROWS, "hydra.run.dir=disk/checked"],
            }
            for kind, line in refused.items():
                with tally.attempt(kind):
                    refuses_for_the_disk(fork_command(folder, *line), disk.folder)
            empty = {"QWENVL_LIT_CACHE": str(disk.folder / "none")}
            filled = {"QWENVL_LIT_CACHE": str(disk.folder / "cache")}
            rows = ["train", *ROWS, "trainer=smoke", "data.num_workers=0"]
            worked = {
                "cache that holds the data": ([*RUN, "hydra.run.dir=run_1"], filled),
                "empty cache, data=jsonl": ([*rows, "hydra.run.dir=run_2"], empty),
                "model on the disk": (["predict", "ckpt=disk/trained"], {}),
            }
            for kind, (line, variables) in worked.items():
                with tally.attempt(kind):
                    finished = fork_command(folder, *line, **variables)
                    finished.has_no_traceback()
                    assert finished.status == 0, finished.output.strip().splitlines()[-1]
            with tally.attempt("empty cache, data=demo"):
                line = [*RUN, "hydra.run.dir=run_3"]
                refuses_for_the_disk(fork_command(folder, *line, **empty), disk.folder)
