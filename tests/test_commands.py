"""Commands as a user types them, one after another in one folder: train, test, predict."""

import json
from pathlib import Path

import pytest
from commands import newest_run, output_of, read_json_lines, run_command, run_from_nothing
from small_demo import small_demo

TRAIN = [
    "trainer=smoke",
    *small_demo(train=40, single=16),
    "data.train=[train_single.jsonl#16,train.jsonl#40]",
    "data.batch_size=8",
    "data.generated_validation_rows=8",
]
# Columns of logging.jsonl that depend on the speed of the machine.
TIMED = {"elapsed_s", "remaining_s", "waiting_share", "samples_per_second", "tokens_per_second"}
TIMED |= {"supervised_tokens_per_second", "tflop_per_second", "mfu"}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with one trained run."""
    folder = tmp_path_factory.mktemp("home")
    output_of(folder, "train", *TRAIN)
    return folder


def ids(file: Path) -> list[str]:
    return [row["id"] for row in read_json_lines(file)]


def predicted_ids(folder: Path, command: str = "predict") -> list[str]:
    return ids(newest_run(folder, command) / "predictions.jsonl")


def first_test_image(home: Path) -> Path:
    return sorted((home / "cache/demo/images").glob("test_*.png"))[0]


def test_train_writes_a_run_folder_with_logs_plots_samples_and_checkpoints(home):
    folder = newest_run(home, "train")
    log = read_json_lines(folder / "logging.jsonl")
    steps = [row for row in log if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    logged = {"grad_norm", "learning_rate", "samples_per_second", "mfu", "waiting_share"}
    assert logged | {"remaining_s"} <= set(steps[0])
    [validation] = [row for row in log if "val/loss" in row]
    assert any(f"val/{name}" in validation for name in ("caption", "counting", "left_right"))
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
    printed = output_of(home, "test", "ckpt=latest", "baseline=true")
    folder = newest_run(home, "test")
    demo = home / "cache/demo"
    expected = ids(demo / "test.jsonl") + ids(demo / "unseen_pairs.jsonl")
    assert ids(folder / "predictions.jsonl") == expected
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
    image = first_test_image(home)
    question = "Where's the car, (left) or right?"
    output_of(home, "predict", "ckpt=latest", f"image={image}", f"prompt={question}")
    folder = newest_run(home, "predict")
    [answer] = read_json_lines(folder / "predictions.jsonl")
    assert answer["prompt"] == f"<img>{image}</img>{question}"
    assert answer["set"] == "question"
    assert len(list(folder.glob("boxes/question/*.png"))) == bool(answer["objects"])


def test_predict_answers_the_validation_rows_of_the_run_or_other_test_sets(home):
    printed = output_of(home, "predict", "ckpt=latest")
    assert predicted_ids(home) == ids(home / "cache/demo/validation.jsonl")
    assert "validation" in printed
    (home / "mine.jsonl").write_text('{"query": "How many objects?", "response": "2"}\n')
    other_data = ["data=jsonl", "data.num_workers=0", "data.test=mine.jsonl"]
    output_of(home, "predict", "ckpt=latest", *other_data)
    assert predicted_ids(home) == ["mine.jsonl:1"]
    output_of(home, "predict", "ckpt=latest", f"data.test={home / 'mine.jsonl'}")
    assert predicted_ids(home) == ["mine.jsonl:1"]


def test_without_a_test_set_test_scores_the_rows_that_the_run_held_out(home):
    data = ["data=jsonl", f"data.root={home / 'cache/demo'}", "data.train=train.jsonl"]
    data += ["data.validation=5", "data.seed=3", "data.batch_size=4", "data.num_workers=0"]
    output_of(home, "train", "trainer=smoke", "metrics=exact", *data)
    trained = newest_run(home, "train")
    split = json.loads((trained / "split.json").read_text())
    held_out = list(split["validation"].values())
    assert len(held_out) == 5
    printed = output_of(home, "test", f"ckpt={trained}")
    assert "validation" in printed
    assert predicted_ids(home, "test") == held_out


def test_stored_answers_get_the_same_scores_without_a_model(home):
    tested = newest_run(home, "test")
    arguments = [f"predictions={tested}", f"compare=[{tested}]", "hydra.run.dir=scored"]
    printed = output_of(home, "test", *arguments)
    metrics, scored = (
        json.loads((folder / "metrics.json").read_text()) for folder in (tested, home / "scored")
    )
    assert scored["test"] == metrics["test"]
    assert f"Scores of {tested}" in printed
    assert f"Against {tested}" in (home / "scored/report.html").read_text()


def test_a_test_set_without_metrics_is_refused_with_suggestions(home):
    image = next((home / "cache/demo/images").iterdir())
    row = {"query": f"<img>{image}</img>Where?", "response": "<box>(1,2),(3,4)</box>"}
    (home / "boxes.jsonl").write_text(json.dumps(row) + "\n")
    process = run_command(home, "test", "ckpt=latest", "data=jsonl", "data.test=boxes.jsonl")
    assert process.returncode == 1
    assert "metrics=grounding  the answers are boxes" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_checkpoint_file_is_enough_without_its_run_folder(home, tmp_path):
    checkpoint = newest_run(home, "train") / "checkpoints/best.ckpt"
    copied = tmp_path / "model.ckpt"
    copied.write_bytes(checkpoint.read_bytes())
    answers = []
    for file in (copied, checkpoint):
        question = [f"image={first_test_image(home)}", "prompt=How many objects?"]
        answers.append(output_of(home, "predict", f"ckpt={file}", *question).splitlines()[:2])
    assert answers[0] == answers[1]


def test_the_same_seed_gives_the_same_run(home):
    logs = []
    for name, run in (("first", run_from_nothing), ("second", run_command)):
        process = run(home, "train", *TRAIN, f"hydra.run.dir={home / name}")
        assert process.returncode == 0, process.stderr
        log = read_json_lines(home / name / "logging.jsonl")
        for row in log:
            for column in TIMED & row.keys():
                del row[column]
        logs.append(log)
    assert logs[0] == logs[1]


def test_broken_data_is_named_without_a_traceback(home):
    row = {"query": "<img>nowhere.png</img>What?", "response": "x"}
    (home / "broken.jsonl").write_text(json.dumps(row) + "\n")
    data = ["data=jsonl", "metrics=exact", "data.test=broken.jsonl"]
    for workers in (0, 1):
        process = run_command(home, "test", "ckpt=latest", *data, f"data.num_workers={workers}")
        assert process.returncode == 1
        assert "nowhere.png does not exist" in process.stderr
        assert "Traceback" not in process.stderr
