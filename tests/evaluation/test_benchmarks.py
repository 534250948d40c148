"""Published test sets: every file composes, states its protocol, and runs on files in the formats of the originals."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import OmegaConf

from qwenvl_lit.cli.command import config_folder
from qwenvl_lit.data.demo.dataset import write_demo
from qwenvl_lit.data.mixture import DatasetSpec
from qwenvl_lit.evaluation.benchmarks import (
    Benchmark,
    compared,
    files_learned_from,
    named_benchmarks,
    published_model,
)
from qwenvl_lit.types import DataError

NAMES = sorted(path.stem for path in (config_folder() / "benchmark").glob("*.yaml"))
TOKENS = {  # least and most that are generated, as published
    **dict.fromkeys(["flickr30k", "nocaps", "coco"], (8, 30)),
    **dict.fromkeys(
        ["refcoco", "refcoco_plus", "refcocog"], (10 + 1, 28 + 1)
    ),  # one more: the published prompt ends in <box>
    **dict.fromkeys(["vqav2", "okvqa", "textvqa", "vizwiz", "gqa", "ai2d"], (1, 10)),
    **dict.fromkeys(["docvqa", "infovqa", "chartqa", "ocrvqa"], (1, 100)),
}


@pytest.fixture(scope="module")
def composed():
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        nodes = {name: compose(f"benchmark/{name}", ["data.root=/somewhere"]) for name in NAMES}
    for node in nodes.values():
        OmegaConf.set_struct(node, False)
        node.paths, node.seed = {"run": "run", "cache": "cache"}, 1
    return nodes


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_says_how_it_is_asked_and_scored(composed, name):
    node = composed[name]
    assert node.metric in node.metrics
    assert node.data.root == "/somewhere"
    assert set(node.published) <= {*node.data.test, "mean"}
    assert not node.generation.do_sample
    assert (node.generation.min_new_tokens, node.generation.max_new_tokens) == TOKENS.get(
        name, (0, 512)
    )
    source = DatasetSpec(
        **{
            key: value
            for key, value in instantiate(node.data, _convert_="all").keywords.items()
            if key in DatasetSpec.__annotations__
        }
    )
    assert "{image}" in source.prompt
    assert all(
        isinstance(metric.higher_is_better, bool)
        for metric in instantiate(node.metrics, _convert_="all").values()
    )


def test_every_published_protocol_is_there():
    assert set(TOKENS) | {"scienceqa"} == set(NAMES)


def benchmark(name: str, **options) -> Benchmark:
    return Benchmark(name=name, config=OmegaConf.create({}), metric="right", **options)


def test_scores_stand_beside_the_published_ones():
    some = [
        benchmark("chart/human", mean={"Qwen-VL": 65.7}),
        benchmark("chart/augmented", mean={"Qwen-VL": 65.7}),
        benchmark("doc/val", published={"Qwen-VL": 65.1}, published_of="test"),
    ]
    results = {
        f"{one.name}/{what}": value
        for one in some
        for what, value in (("rows", 1250), ("seconds", 2.5), ("images_per_second", 500))
    }
    results |= {"chart/human/right": 0.5, "chart/augmented/right": 0.75, "doc/val/right": 0.66}
    rows = compared(some, results, "Qwen-VL")
    assert [list(row.values()) for row in rows] == [
        ["chart/human", "right", "50.00", "", "", "1,250", "2.5", "500.0"],
        ["chart/augmented", "right", "75.00", "", "", "1,250", "2.5", "500.0"],
        ["chart, mean", "right", "62.50", "65.70", "-3.20", "", "", ""],
        ["doc/val", "right", "66.00", "65.10 (test)", "+0.90", "1,250", "2.5", "500.0"],
    ]
    assert compared(some, results, "Qwen-VL-Chat")[3]["difference"] == ""


def test_a_model_that_learned_from_the_same_images_is_told(composed):
    data = {
        "train": "annotations/captions_val2014.json#2000",
        "datasets": {"a": {"train": ["x.jsonl"]}, "b": 3},
    }
    learned = files_learned_from(data)
    assert learned == ["annotations/captions_val2014.json#2000", "x.jsonl"]
    told = {
        name: list(
            benchmark(f"{name}/val", seen_with=composed[name].get("seen_with", {})).warnings(
                learned
            )
        )
        for name in NAMES
    }
    assert {name for name, said in told.items() if said} == {"coco", "okvqa", "vqav2"}, (
        "RefCOCO's images are those of train2014"
    )
    assert "its images are those of val2014" in told["okvqa"][0]


def test_the_name_of_the_base_tells_whose_scores_are_compared():
    paths = ("Qwen/Qwen-VL-Chat", "/models/qwen-vl", None)
    assert [published_model(OmegaConf.create({"model": {"path": path}})) for path in paths] == [
        "Qwen-VL-Chat",
        "Qwen-VL",
        "Qwen-VL",
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The demo's images in the formats of COCO, RefCOCO, VQA, DocVQA and ScienceQA, in the places that the yaml files name."""
    root = tmp_path_factory.mktemp("root")
    write_demo(
        root / "demo", train=1, single=1, validation=1, test=4, unseen_pairs=1, new_classes=8
    )
    for folder in (
        "flickr30k",
        "refcoco",
        "okvqa",
        "docvqa",
        "scienceqa",
        "coco/train2014",
        "coco/val2014",
    ):
        (root / folder).mkdir(parents=True)
    captions = json.loads((root / "demo/coco/annotations/captions_test.json").read_text())
    for image in captions["images"]:
        shutil.copy(
            root / "demo/images" / image["file_name"],
            root / f"coco/val2014/COCO_val2014_{image['id']:012d}.jpg",
        )
        image["file_name"] = f"data/demo/images/{image['file_name']}"
    (root / "flickr30k/flickr30k_karpathy_test.json").write_text(json.dumps(captions))
    names = [image["file_name"] for image in captions["images"]]
    ids = [image["id"] for image in captions["images"]]

    def lines(file: str, rows: list[dict]) -> None:
        (root / file).write_text("".join(json.dumps(row) + "\n" for row in rows))

    box = {"bbox": [0, 0, 32, 32], "height": 64, "width": 64}
    lines(
        "refcoco/refcoco_val.jsonl", [{"image": name, "sent": "the thing", **box} for name in names]
    )
    lines(
        "docvqa/val.jsonl",
        [
            {"image": name, "question": "What?", "question_id": 9, "answer": ["a", "b"]}
            for name in names[:1]
        ],
    )
    choice = {"question": "Which?", "hint": "", "answer": 1}
    lines(
        "scienceqa/scienceqa_test_img.jsonl",
        [
            {"image": n, "choices": ["a", "b", "c"][: 2 + k % 2], **choice}
            for k, n in enumerate(names)
        ],
    )
    questions = [
        {"question_id": k, "image_id": id, "question": "What is it?"} for k, id in enumerate(ids)
    ]
    answers = [{"question_id": k, "answers": [{"answer": "a cat"}] * 10} for k in range(len(ids))]
    (root / "okvqa/OpenEnded_mscoco_val2014_questions.json").write_text(
        json.dumps({"data_subtype": "val2014", "questions": questions})
    )
    (root / "okvqa/mscoco_val2014_annotations.json").write_text(
        json.dumps({"annotations": answers})
    )
    return root


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "qwenvl_lit.test",
        *arguments,
        "data.num_workers=0",
        f"paths.cache={root}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def test_several_benchmarks_run_with_one_model(root):
    asked = "benchmarks=[flickr30k/test,refcoco/val,okvqa/val#3,docvqa/val,scienceqa]"
    done = run(root, "model=qwen_vl_tiny", asked, "data.eval_batch_size=4", "hydra.run.dir=all")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:]]
        for line in done.stdout.splitlines()
        if "│" in line
    }
    assert {name: (cells[0], cells[2], cells[4]) for name, cells in rows.items()} == {
        "flickr30k/test": ("cider", "85.80", "4"),
        "refcoco/val": ("acc_at_50", "89.36", "4"),
        "okvqa/val": ("vqa_accuracy_official", "58.60", "3"),
        "docvqa/val": ("anls_official", "65.10 (test)", "1"),
        "scienceqa/test": ("choice_accuracy", "67.10", "4"),
    }
    assert "model.template=raw" in done.stdout, "the tiny model is asked in chat markup"
    scores = json.loads((root / "all/metrics.json").read_text())["test"]
    assert {
        "flickr30k/test/bleu_4",
        "refcoco/val/mean_iou",
        "scienceqa/test/choice_accuracy",
    } <= set(scores)
    chosen = [
        json.loads(line)
        for line in (root / "all/scienceqa/test/predictions.jsonl").read_text().splitlines()
    ]
    assert (
        sum(row["prediction"] == "B" for row in chosen) / 4
        == scores["scienceqa/test/choice_accuracy"]
    )
    page = (root / "all/report.html").read_text()
    assert "refcoco/val" in page
    assert re.search(r"<td>89\.36</td>", page)

    again = run(
        root, "predictions=all/refcoco/val", "compare=[all/refcoco/val]", "hydra.run.dir=again"
    )
    assert again.returncode == 0, again.stdout + again.stderr
    rescored = json.loads((root / "again/metrics.json").read_text())["test"]
    assert rescored == {
        f"val/{name.rpartition('/')[2]}": value
        for name, value in scores.items()
        if name.startswith("refcoco/val")
    }
    assert "Against all/refcoco/val" in (root / "again/report.html").read_text()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("nothing/val", "there is no nothing; known are ai2d, chartqa"),
        ("refcoco/testC", "refcoco has no set testC; it has val, testA, testB"),
    ],
)
def test_a_benchmark_that_is_not_there_is_named(asked, says, monkeypatch):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", return_hydra_config=True)
        monkeypatch.setattr(HydraConfig.instance(), "cfg", config)
        with pytest.raises(DataError, match=says):
            named_benchmarks(OmegaConf.create({"benchmarks": [asked], "paths": {"run": "run"}}))
