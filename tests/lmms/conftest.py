"""Questions of MME and POPE about generated images, as data of lmms-eval's tasks and as ours.

Models of all families are trained on them for half a minute, so that their answers differ.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import output_of
from PIL import Image, ImageDraw

COLORS = ("red", "blue", "green", "white")
MME_SUBTASKS = ("existence", "OCR")
# The functions of lmms-eval's own tasks; only the images come from files.
FUNCTIONS = """
from PIL import Image
from lmms_eval.tasks.mme.utils import *
from lmms_eval.tasks.pope.utils import *


def images(row):
    return [Image.open(row["image"])]
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.images
doc_to_text: !function functions.{kit}_doc_to_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 8, temperature: 0, top_p: 0, do_sample: false}}
process_results: !function functions.{kit}_process_results
lmms_eval_specific_kwargs: {{default: {{pre_prompt: "", post_prompt: "{after}"}}}}
metric_list: [{metrics}]
metadata: [{{version: 0.0}}]
"""
METRIC = "{{metric: {name}, aggregation: !function functions.{function}, higher_is_better: true}}"
POPE_SCORES = ("accuracy", "precision", "recall", "f1_score", "yes_ratio")


@dataclass(frozen=True)
class Kit:
    """The questions.

    Attributes:
        root: has MME and POPE in their published layouts.
        rows: a jsonl file of ours with all questions; a row's id is TASK/NUMBER.
        training: the same with answers to MME that differ, such as "Yes, red".
        tasks: the folder of lmms-eval's tasks `mme_local` and `pope_local`.
    """

    root: Path
    rows: Path
    training: Path
    tasks: Path


def metric(name: str, function: str) -> str:
    return METRIC.format(name=name, function=function)


def write_lines(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def kit(tmp_path_factory) -> Kit:
    root = tmp_path_factory.mktemp("kit")
    mme, pope, ours = [], [], []
    for subtask in MME_SUBTASKS:
        folder = root / "MME_Benchmark_release_version" / subtask
        folder.mkdir(parents=True)
        for number, color in enumerate(COLORS):
            image = folder / f"{number}.png"
            draw(image, color, size=64 + 8 * number)
            other = COLORS[number - 1]
            questions = [(f"Is it {color}? Please answer yes or no.", "Yes")]
            questions.append((f"Is it {other}? Please answer yes or no.", "No"))
            image.with_suffix(".txt").write_text(
                "".join(f"{question}\t{answer}\n" for question, answer in questions)
            )
            for question, answer in questions:
                row = {"image": str(image), "question": question, "answer": answer}
                place = {"question_id": f"{subtask}/{image.name}", "category": subtask}
                mme.append({**row, **place})
    for number in range(8):
        name = f"COCO_val2014_{number:012d}.jpg"
        image = root / "coco/val2014" / name
        image.parent.mkdir(parents=True, exist_ok=True)
        draw(image, COLORS[number % 4], size=72)
        question, answer = f"Is there a {COLORS[number // 2]} thing?", ("yes", "no")[number % 3 > 0]
        row = {"question_id": number, "image": name, "text": question, "label": answer}
        pope.append(row)
    write_lines(root / "pope/coco_pope_random.json", pope)
    of_pope = []
    for row in pope:
        image = str(root / "coco/val2014" / row["image"])
        question = {"question_id": str(row["question_id"]), "question": row["text"]}
        of_pope.append({**question, "image": image, "answer": row["label"]})
    for name, rows, after in (("mme_local", mme, ""), ("pope_local", of_pope, " Answer:")):
        for number, row in enumerate(rows):
            question = row["question"] + after
            ours.append({**row, "question": question, "question_id": f"{name}/{number}"})
    tasks = root / "tasks"
    files = {"mme_local": write_lines(root / "mme.jsonl", mme)}
    files["pope_local"] = write_lines(root / "pope.jsonl", of_pope)
    tasks.mkdir()
    (tasks / "functions.py").write_text(FUNCTIONS)
    metrics = {
        "mme_local": [metric("mme_perception_score", "mme_aggregate_results")],
        "pope_local": [metric(f"pope_{name}", f"pope_aggregate_{name}") for name in POPE_SCORES],
    }
    for name, file in files.items():
        after = " Answer:" if name == "pope_local" else ""
        values = {"name": name, "rows": file, "kit": name.split("_")[0], "after": after}
        text = TASK.format(**values, metrics=", ".join(metrics[name]))
        (tasks / f"{name}.yaml").write_text(text)
    training = []
    for row in ours:
        answer = row["answer"]
        if row["question_id"].startswith("mme"):
            [color] = [color for color in COLORS if color in row["question"]]
            answer += f", {color}"
        training.append({**row, "answer": answer})
    rows = write_lines(root / "ours.jsonl", ours)
    return Kit(
        root=root, rows=rows, training=write_lines(root / "training.jsonl", training), tasks=tasks
    )


def draw(file: Path, color: str, *, size: int) -> None:
    image = Image.new("RGB", (size, 64), "black")
    ImageDraw.Draw(image).rectangle((8, 8, 40, 56), fill=color)
    image.save(file, quality=95)


@pytest.fixture(scope="session")
def models(kit, tmp_path_factory) -> dict[str, Path]:
    """What `QwenVL.load` takes: runs of all families, a full model and an adapter folder."""
    home = tmp_path_factory.mktemp("models")
    rows = [f"data.train={kit.training}", "data.validation=null", "data.prompt='{image}{question}'"]
    train = ["data=jsonl", *rows, "data.num_workers=0", "logger=none"]
    for family in ("qwen_vl_tiny", "qwen2_5_vl_tiny", "qwen3_vl_tiny"):
        steps = "trainer.max_steps=100"
        output_of(home, "train", f"model={family}", *train, steps, f"hydra.run.dir={family}")
    output_of(home, "export", "ckpt=qwen_vl_tiny", "out=full", "compare=none", "dtype=float32")
    base = ["model=qwen_vl_chat", "model.path=full", "model.dtype=float32", "adapter=lora"]
    steps = ["trainer.max_steps=4", "optim.lr=0.01"]
    output_of(home, "train", *base, *train, *steps, "hydra.run.dir=lora")
    output_of(home, "export", "ckpt=lora", "out=adapter", "merge=false", "compare=none")
    names = ("qwen_vl_tiny", "qwen2_5_vl_tiny", "qwen3_vl_tiny", "full", "adapter")
    return {name: home / name for name in names}
