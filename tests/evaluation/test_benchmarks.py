"""Published test sets: every file composes, states its protocol, and reads the original formats."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from commands import run_command
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import OmegaConf

from qwenvl_lit.data.demo.dataset import write_demo
from qwenvl_lit.data.mixture import DatasetSpec
from qwenvl_lit.evaluation.benchmarks import (
    Benchmark,
    Sum,
    benchmark_table,
    published_model_name,
    read_benchmarks,
    training_files,
)
from qwenvl_lit.runs.run import config_folder
from qwenvl_lit.test import _notes
from qwenvl_lit.types import DataError

NAMES = sorted(path.stem for path in (config_folder() / "benchmark").glob("*.yaml"))
GENERATED_TOKENS = {  # minimum and maximum, as published
    **dict.fromkeys(["flickr30k", "nocaps", "coco"], (8, 30)),
    # One more than published: the published prompt includes <box>.
    **dict.fromkeys(["refcoco", "refcoco_plus", "refcocog"], (10 + 1, 28 + 1)),
    **dict.fromkeys(["vqav2", "okvqa", "textvqa", "vizwiz", "gqa", "ai2d", "pope"], (1, 10)),
    **dict.fromkeys(["docvqa", "infovqa", "chartqa", "ocrvqa"], (1, 100)),
    "screenspot": (0, 512),
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
def test_a_benchmark_states_its_protocol(composed, name):
    node = composed[name]
    assert node.metric in node.metrics
    assert node.data.root == "/somewhere"
    assert set(node.published) <= {*node.data.test, *node.get("sums", ()), "mean"}
    for summed in node.get("sums", {}).values():
        assert set(summed) <= set(node.data.test)
    assert node.get("published_template", "raw") in ("raw", "chatml")
    assert not node.generation.do_sample
    limits = (node.generation.min_new_tokens, node.generation.max_new_tokens)
    assert limits == GENERATED_TOKENS.get(name, (0, 512))
    arguments = instantiate(node.data, _convert_="all").keywords
    known = arguments.keys() & DatasetSpec.__annotations__.keys()
    dataset = DatasetSpec(**{key: arguments[key] for key in known})
    assert "{image}" in dataset.prompt
    for metric in instantiate(node.metrics, _convert_="all").values():
        assert isinstance(metric.higher_is_better, bool)


def test_every_benchmark_has_a_published_protocol():
    assert set(GENERATED_TOKENS) | {"scienceqa", "mme"} == set(NAMES)


def benchmark(name: str, **options) -> Benchmark:
    return Benchmark(name=name, config=OmegaConf.create({}), metric="right", **options)


def test_scores_stand_beside_the_published_ones():
    benchmarks = [
        benchmark("chart/human", published_mean={"Qwen-VL": 65.7}),
        benchmark("chart/augmented", published_mean={"Qwen-VL": 65.7}),
        benchmark("doc/val", published={"Qwen-VL": 65.1}, published_split="test"),
    ]
    results = {"chart/human/right": 0.5, "chart/augmented/right": 0.75, "doc/val/right": 0.66}
    for one in benchmarks:
        results[f"{one.name}/rows"] = 1250
        results[f"{one.name}/seconds"] = 2.5
        results[f"{one.name}/images_per_second"] = 500
    rows = benchmark_table(benchmarks, results, "Qwen-VL")
    assert [list(row.values()) for row in rows] == [
        ["chart/human", "right", "50.00", "", "", "1,250", "2.5", "500.0"],
        ["chart/augmented", "right", "75.00", "", "", "1,250", "2.5", "500.0"],
        ["chart, mean", "right", "62.50", "65.70", "-3.20", "", "", ""],
        ["doc/val", "right", "66.00", "65.10 (test)", "+0.90", "1,250", "2.5", "500.0"],
    ]
    columns = ["benchmark", "metric", "score", "rows", "seconds", "images/s"]
    for model in (None, "Qwen-VL-Chat"):
        for row in benchmark_table(benchmarks, results, model):
            assert list(row) == columns


def test_sums_of_a_file_follow_its_last_test_set():
    sums = [
        Sum(name="first", sets=["a", "b"], published={"Qwen-VL-Chat": 250.0}),
        Sum(name="second", sets=["c"]),
        Sum(name="absent", sets=["a", "d"]),
    ]
    benchmarks = [benchmark(f"mme/{name}", sums=sums) for name in "abc"]
    results = {"mme/a/right": 1.25, "mme/b/right": 0.75, "mme/c/right": 2.0}
    results |= {f"mme/{name}/rows": 4 for name in "abc"}
    rows = benchmark_table(benchmarks, results, "Qwen-VL-Chat")
    assert [list(row.values())[:5] for row in rows[3:]] == [
        ["mme, first", "right", "200.00", "250.00", "-50.00"],
        ["mme, second", "right", "200.00", "", ""],
    ]
    del results["mme/b/right"]
    assert benchmark_table(benchmarks, results, None)[3]["score"] == ""


def test_published_subtasks_of_mme_add_up_to_its_published_sums(composed):
    published = composed["mme"].published
    for name, summed in composed["mme"].sums.items():
        total = sum(published[subtask]["Qwen-VL-Chat"] for subtask in summed)
        assert total == pytest.approx(published[name]["Qwen-VL-Chat"], abs=0.01 * len(summed))
    assert published.perception["Qwen-VL-Chat"] == 1487.58


def test_a_template_other_than_the_published_one_is_named_with_its_benchmarks():
    scores = {"Qwen-VL-Chat": 1.0}
    benchmarks = [
        benchmark("doc/val", published=scores),
        benchmark("mme/a", published=scores, published_template="chatml"),
    ]
    for template, note in (
        ("chatml", "doc: questions were asked with chat markup"),
        ("raw", r"mme: questions were asked without .* model\.template=chatml"),
    ):
        config = OmegaConf.create({"model": {"path": "Qwen/Qwen-VL-Chat", "template": template}})
        [text] = _notes(config, benchmarks, None)
        assert re.match(note, text)
        [other] = [each for each in benchmarks if each.published_template == template]
        assert _notes(config, [other], None) == []


def test_training_files_include_those_of_every_mixed_dataset():
    datasets = {"a": {"train": ["x.jsonl"]}, "b": 3}
    data = {"train": "annotations/captions_val2014.json#2000", "datasets": datasets}
    assert training_files(data) == ["annotations/captions_val2014.json#2000", "x.jsonl"]


def test_a_model_trained_on_the_images_of_a_benchmark_gives_a_warning(composed):
    trained_on = ["annotations/captions_val2014.json#2000", "x.jsonl"]
    warnings = {}
    for name in NAMES:
        seen_with = composed[name].get("seen_with", {})
        warnings[name] = list(benchmark(f"{name}/val", seen_with=seen_with).warnings(trained_on))
    # RefCOCO has images of train2014.
    assert {name for name in NAMES if warnings[name]} == {"coco", "okvqa", "pope", "vqav2"}
    assert "it shares images of val2014 with OK-VQA" in warnings["okvqa"][0]


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("Qwen/Qwen-VL-Chat", "Qwen-VL-Chat"),
        ("/models/qwen-vl", "Qwen-VL"),
        ("cckevinn/SeeClick", "SeeClick"),
        (None, "Qwen-VL"),
        ("Qwen/Qwen3-VL-8B-Instruct", None),
        ("Qwen/Qwen2.5-VL-7B-Instruct", None),
    ],
)
def test_the_name_of_the_base_model_decides_whose_scores_are_compared(path, model):
    assert published_model_name(OmegaConf.create({"model": {"path": path}})) == model


def test_another_model_is_not_compared_with_qwen_vl_and_not_asked_for_its_template():
    scores = {"Qwen-VL-Chat": 1.0, "Qwen-VL": 2.0}
    benchmarks = [benchmark("doc/val", published=scores)]
    for model, note in (
        ({"path": "Qwen/Qwen3-VL-8B-Instruct", "system": None}, "are of Qwen-VL, so they are not"),
        ({"path": "Qwen/Qwen-VL-Chat", "template": "chatml"}, r"without: model\.template=raw"),
    ):
        [text] = _notes(OmegaConf.create({"model": model}), benchmarks, None)
        assert re.search(note, text)
    assert _notes(OmegaConf.create({"model": {"path": "Qwen/Qwen-VL"}}), benchmarks, None) == []
    name = "screenspot/web_text"
    in_chat = [benchmark(name, published=scores, published_template="chatml")]
    assert _notes(OmegaConf.create({"model": model}), in_chat, None) == []
    [text] = _notes(OmegaConf.create({"model": {"path": "Qwen/Qwen-VL"}}), in_chat, None)
    assert "screenspot: questions were asked without chat markup" in text
    assert _notes(OmegaConf.create({"model": model}), [], None) == []


def test_a_benchmark_without_published_scores_of_the_model_shows_no_columns_for_them():
    config = OmegaConf.create({"model": {"path": "Qwen/Qwen-VL", "template": "chatml"}})
    unpublished = [benchmark("pope/random")]
    assert _notes(config, unpublished, None) == []
    in_chat = [benchmark("mme/a", published={"Qwen-VL-Chat": 1.0}, published_template="chatml")]
    [text] = _notes(config, in_chat, None)
    assert text.startswith("mme: the published scores are of Qwen-VL-Chat, not of Qwen-VL")
    results = {"pope/random/rows": 1, "mme/a/rows": 1}
    for row in benchmark_table([*unpublished, *in_chat], results, "Qwen-VL"):
        assert "difference" not in row


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The demo's images in the formats and at the paths of the published datasets."""
    root = tmp_path_factory.mktemp("root")
    sizes = {"train": 1, "single": 1, "validation": 1, "test": 4}
    write_demo(root / "demo", **sizes, unseen_pairs=1, new_classes=8)
    for folder in ("flickr30k", "refcoco", "okvqa", "docvqa", "scienceqa", "pope"):
        (root / folder).mkdir()
    for folder in ("coco/train2014", "coco/val2014"):
        (root / folder).mkdir(parents=True)
    captions = json.loads((root / "demo/coco/annotations/captions_test.json").read_text())
    for image in captions["images"]:
        demo_image = root / "demo/images" / image["file_name"]
        shutil.copy(demo_image, root / f"coco/val2014/COCO_val2014_{image['id']:012d}.jpg")
        image["file_name"] = f"data/demo/images/{image['file_name']}"
    names = [image["file_name"] for image in captions["images"]]
    image_ids = [image["id"] for image in captions["images"]]

    def write_lines(file: str, rows: list[dict]) -> None:
        (root / file).write_text("".join(json.dumps(row) + "\n" for row in rows))

    (root / "flickr30k/flickr30k_karpathy_test.json").write_text(json.dumps(captions))

    box = {"bbox": [0, 0, 32, 32], "height": 64, "width": 64}
    phrases = [{"image": name, "sent": "the thing", **box} for name in names]
    write_lines("refcoco/refcoco_val.jsonl", phrases)

    question = {"question": "What?", "question_id": 9, "answer": ["a", "b"]}
    write_lines("docvqa/val.jsonl", [{"image": names[0], **question}])

    choices = []
    for number, name in enumerate(names):
        options = ["a", "b", "c"][: 2 + number % 2]
        row = {"image": name, "choices": options, "question": "Which?", "hint": "", "answer": 1}
        choices.append(row)
    write_lines("scienceqa/scienceqa_test_img.jsonl", choices)

    objects = []
    for number, image_id in enumerate(image_ids):
        row = {"question_id": number, "image": f"COCO_val2014_{image_id:012d}.jpg"}
        objects.append({**row, "text": "Is there a car?", "label": ("yes", "no")[number % 2]})
    write_lines("pope/coco_pope_random.json", objects)

    for subtask in ("existence", "OCR"):
        folder = root / "MME_Benchmark_release_version" / subtask
        folder.mkdir(parents=True)
        for name in names[:2]:
            image = shutil.copy(root / name.removeprefix("data/"), folder)
            Path(image).with_suffix(".txt").write_text("Is it a car?\tYes\nIs it a cat?\tNo\n")

    questions, annotations = [], []
    for number, image_id in enumerate(image_ids):
        questions.append({"question_id": number, "image_id": image_id, "question": "What is it?"})
        annotations.append({"question_id": number, "answers": [{"answer": "a cat"}] * 10})
    file = root / "okvqa/OpenEnded_mscoco_val2014_questions.json"
    file.write_text(json.dumps({"data_subtype": "val2014", "questions": questions}))
    file = root / "okvqa/mscoco_val2014_annotations.json"
    file.write_text(json.dumps({"annotations": annotations}))
    return root


def run_test_command(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    places = ["data.num_workers=0", f"paths.cache={root}"]
    return run_command(root, "test", *arguments, *places, COLUMNS="160")


def table_cells(printed: str) -> dict[str, list[str]]:
    """The cells of the printed table by the first cell of their row."""
    cells_by_name = {}
    for line in printed.splitlines():
        if "│" in line:
            name, *cells = [cell.strip() for cell in line.split("│")[1:]]
            cells_by_name[name] = cells
    return cells_by_name


def test_several_benchmarks_run_with_one_model(root):
    names = "flickr30k/test,refcoco/val,okvqa/val#3,docvqa/val,scienceqa"
    names += ",pope/random,mme/existence,mme/OCR"
    arguments = [f"benchmarks=[{names}]", "data.eval_batch_size=4", "hydra.run.dir=all"]
    done = run_test_command(root, "model=qwen_vl_tiny", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table_cells(done.stdout)
    assert {name: (cells[0], cells[2], cells[4]) for name, cells in rows.items()} == {
        "flickr30k/test": ("cider", "85.80", "4"),
        "refcoco/val": ("acc_at_50", "89.36", "4"),
        "okvqa/val": ("vqa_accuracy_official", "58.60", "3"),
        "docvqa/val": ("anls_official", "65.10 (test)", "1"),
        "scienceqa/test": ("choice_accuracy", "67.10", "4"),
        "pope/random": ("yes_f1_official", "", "4"),
        "mme/existence": ("mme_score_official", "", "4"),
        "mme/OCR": ("mme_score_official", "", "4"),
    }
    assert "scienceqa: questions were asked with chat markup" in done.stdout
    scores = json.loads((root / "all/metrics.json").read_text())["test"]
    assert "flickr30k/test/bleu_4" in scores
    assert "refcoco/val/mean_iou" in scores
    assert scores["pope/random/yes_ratio_official"] == 1, "the tiny model does not say no"
    assert scores["mme/existence/mme_score_official"] == 0
    predictions = (root / "all/scienceqa/test/predictions.jsonl").read_text().splitlines()
    letters = [json.loads(line)["prediction"] for line in predictions]
    assert letters.count("B") / 4 == scores["scienceqa/test/choice_accuracy"]
    page = (root / "all/report.html").read_text()
    assert "refcoco/val" in page
    assert re.search(r"<td>89\.36</td>", page)

    earlier = "all/refcoco/val"
    again = run_test_command(
        root, f"predictions={earlier}", f"compare=[{earlier}]", "hydra.run.dir=again"
    )
    assert again.returncode == 0, again.stdout + again.stderr
    refcoco = {}
    for name, value in scores.items():
        if name.startswith("refcoco/val/"):
            refcoco[name.removeprefix("refcoco/")] = value
    assert json.loads((root / "again/metrics.json").read_text())["test"] == refcoco
    assert f"Against {earlier}" in (root / "again/report.html").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing/val", "there is no nothing; known are ai2d, chartqa"),
        ("refcoco/testC", "refcoco has no set testC; it has val, testA, testB"),
    ],
)
def test_an_unknown_benchmark_is_refused_with_the_known_ones(name, message, monkeypatch):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("train", return_hydra_config=True)
        monkeypatch.setattr(HydraConfig.instance(), "cfg", config)
        with pytest.raises(DataError, match=message):
            read_benchmarks(OmegaConf.create({"benchmarks": [name], "paths": {"run": "run"}}))
