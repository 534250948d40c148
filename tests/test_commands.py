"""The verbs as a person types them, one after the other, in a folder of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = [
    "+data.prepare.train=40",
    "+data.prepare.single=16",
    "+data.prepare.validation=4",
    "+data.prepare.test=4",
]
SMALL += [
    "+data.prepare.unseen_pairs=2",
    "+data.prepare.new_classes=8",
    "data.batch_size=8",
    "data.generated_validation_rows=8",
]
SMALL += ["data.train=[train_single.jsonl#16,train.jsonl#40]"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """An empty folder, and one trained run in it."""
    folder = tmp_path_factory.mktemp("home")
    run(folder, "train", "trainer=smoke", *SMALL)
    return folder


def run(folder: Path, verb: str, *arguments: str) -> str:
    """What the verb prints; its caches are inside `folder` too."""
    environment = {**os.environ, "QWENVL_LIT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"qwenvl_lit.{verb}", *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def newest(folder: Path, verb: str) -> Path:
    return max((folder / "outputs" / verb).iterdir(), key=lambda path: path.stat().st_mtime)


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_train_leaves_a_run_folder_a_person_can_read(home):
    folder = newest(home, "train")
    log = rows(folder / "logging.jsonl")
    training = [row for row in log if "loss" in row]
    assert [row["step"] for row in training] == [1, 2, 3, 4]
    assert {
        "grad_norm",
        "learning_rate",
        "samples_per_second",
        "mfu",
        "waiting_share",
        "remaining_s",
    } <= set(training[0])
    assert any("val/loss" in row and "val/caption" in row for row in log)
    assert json.loads((folder / "metrics.json").read_text())["fit"]["best"]["monitor"] == "val/loss"
    for name in (
        "config.yaml",
        "versions.json",
        "csv/version_0/metrics.csv",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "curves/loss.png",
        "samples/step_000004.png",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert "${" not in (folder / "config.yaml").read_text()


def test_test_scores_all_sets_and_writes_predictions_in_order(home):
    printed = run(home, "test", "ckpt=latest", "baseline=true")
    folder = newest(home, "test")
    predictions = rows(folder / "predictions.jsonl")
    expected = [
        json.loads(line)["id"]
        for name in ("test", "unseen_pairs")
        for line in (home / f"cache/demo/{name}.jsonl").open()
    ]
    assert [row["id"] for row in predictions] == expected
    scores = json.loads((folder / "metrics.json").read_text())
    assert scores["test"]["test/rows"] + scores["test"]["unseen_pairs/rows"] == len(expected)
    assert scores["baseline"].keys() == scores["test"].keys()
    for name in (
        "caption",
        "counting",
        "left_right",
        "grounded_caption",
        "name_to_box",
        "name_to_box_iou",
    ):
        assert f"test/{name}" in scores["test"]
        assert name in printed
    assert list(folder.glob("boxes/test/*.png"))
    page = (folder / "report.html").read_text()
    assert "Against the model before training" in page
    assert page.count("data:image/jpeg;base64,") >= 12  # worst and best of two sets


def test_predict_answers_a_question_and_draws_its_boxes(home):
    image = sorted((home / "cache/demo/images").glob("test_*.png"))[0]
    run(
        home, "predict", "ckpt=latest", f"image={image}", "prompt=Where's the car, (left) or right?"
    )
    folder = newest(home, "predict")
    [answer] = rows(folder / "predictions.jsonl")
    assert answer["prompt"] == f"<img>{image}</img>Where's the car, (left) or right?"
    assert answer["set"] == "question"
    assert len(list(folder.glob("boxes/question/*.png"))) == bool(answer["objects"])


def test_predict_takes_the_validation_rows_of_the_run_and_test_sets_of_other_data(home):
    printed = run(home, "predict", "ckpt=latest")
    answers = rows(newest(home, "predict") / "predictions.jsonl")
    assert [row["id"] for row in answers] == [
        json.loads(line)["id"] for line in (home / "cache/demo/validation.jsonl").open()
    ]
    assert "validation" in printed
    (home / "mine.jsonl").write_text('{"query": "How many objects?", "response": "2"}\n')
    run(home, "predict", "ckpt=latest", "data=jsonl", "data.num_workers=0", "data.test=mine.jsonl")
    assert [row["id"] for row in rows(newest(home, "predict") / "predictions.jsonl")] == [
        "mine.jsonl:1"
    ]
    run(home, "predict", "ckpt=latest", f"data.test={home / 'mine.jsonl'}")
    assert [row["id"] for row in rows(newest(home, "predict") / "predictions.jsonl")] == [
        "mine.jsonl:1"
    ]


def test_held_out_rows_are_those_of_the_run_and_test_falls_back_to_them(home):
    mine = [
        "data=jsonl",
        "metrics=exact",
        "data.num_workers=0",
        f"data.root={home / 'cache/demo'}",
        "data.train=train.jsonl",
    ]
    run(
        home,
        "train",
        "trainer=smoke",
        *mine,
        "data.validation=5",
        "data.seed=3",
        "data.batch_size=4",
    )
    trained = newest(home, "train")
    held = list(json.loads((trained / "split.json").read_text())["validation"].values())
    assert len(held) == 5
    printed = run(home, "test", f"ckpt={trained}")
    assert "validation" in printed
    assert [row["id"] for row in rows(newest(home, "test") / "predictions.jsonl")] == held


def test_answers_are_scored_without_a_model_and_as_with_one(home):
    tested = newest(home, "test")
    printed = run(
        home, "test", f"predictions={tested}", f"compare=[{tested}]", "hydra.run.dir=scored"
    )
    scores = [
        json.loads((folder / "metrics.json").read_text())["test"]
        for folder in (tested, home / "scored")
    ]
    assert scores[0] == scores[1]
    assert f"Scores of {tested}" in printed
    assert f"Against {tested}" in (home / "scored/report.html").read_text()


def test_a_set_of_ones_own_asks_how_it_is_scored(home):
    image = next((home / "cache/demo/images").iterdir())
    (home / "boxes.jsonl").write_text(
        json.dumps({"query": f"<img>{image}</img>Where?", "response": "<box>(1,2),(3,4)</box>"})
        + "\n"
    )
    command = [
        sys.executable,
        "-m",
        "qwenvl_lit.test",
        "ckpt=latest",
        "data=jsonl",
        "data.test=boxes.jsonl",
    ]
    result = subprocess.run(
        command,
        cwd=home,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "metrics=grounding  the answers are boxes" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_checkpoint_file_alone_is_enough(home, tmp_path):
    checkpoint = newest(home, "train") / "checkpoints/best.ckpt"
    copy = tmp_path / "model.ckpt"
    copy.write_bytes(checkpoint.read_bytes())
    image = sorted((home / "cache/demo/images").glob("test_*.png"))[0]
    question = [f"image={image}", "prompt=How many objects?"]
    assert (
        run(home, "predict", f"ckpt={copy}", *question).splitlines()[:2]
        == run(home, "predict", f"ckpt={checkpoint}", *question).splitlines()[:2]
    )


def test_the_same_seed_gives_the_same_run(home):
    for name in ("one", "two"):
        run(home, "train", "trainer=smoke", *SMALL, f"hydra.run.dir={home / name}")
    one, two = (rows(home / name / "logging.jsonl") for name in ("one", "two"))
    timed = {"elapsed_s", "remaining_s", "waiting_share", "samples_per_second", "tokens_per_second"}
    timed |= {"supervised_tokens_per_second", "tflop_per_second", "mfu"}
    assert [{k: v for k, v in row.items() if k not in timed} for row in one] == [
        {k: v for k, v in row.items() if k not in timed} for row in two
    ]


def test_broken_data_is_named_without_traceback(home):
    (home / "broken.jsonl").write_text(
        '{"query": "<img>nowhere.png</img>What?", "response": "x"}\n'
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for workers in (0, 1):
        command = [
            sys.executable,
            "-m",
            "qwenvl_lit.test",
            "ckpt=latest",
            "data=jsonl",
            "metrics=exact",
            "data.test=broken.jsonl",
            f"data.num_workers={workers}",
        ]
        result = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
        assert result.returncode == 1
        assert "nowhere.png does not exist" in result.stderr
        assert "Traceback" not in result.stderr
