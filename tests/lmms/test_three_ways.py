"""The same questions get the same answers from `predict`, from lmms-eval, and over HTTP."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from commands import environment, output_of, read_json_lines, start_command

pytestmark = pytest.mark.lmms

MODELS = ("qwen_vl_tiny", "qwen2_5_vl_tiny", "qwen3_vl_tiny", "full", "adapter")
TASKS = ["mme_local", "pope_local"]
FLOAT32 = "dtype=float32,device=cpu"


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Keeps `datasets` and lmms-eval off the network, and their caches in a folder of the test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        yield


def evaluate(kit, model: str, arguments: str, **options) -> dict:
    """Evaluates a model of lmms-eval on both tasks, in this process."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(kit.tasks), include_defaults=False, model_name=model)
    return simple_evaluate(
        model=model, model_args=arguments, tasks=TASKS, task_manager=manager, **options
    )


def answers_of(results: dict) -> dict[str, str]:
    """The answers by TASK/NUMBER of the row."""
    answers = {}
    for task, samples in results["samples"].items():
        for sample in samples:
            answers[f"{task}/{sample['doc_id']}"] = sample["filtered_resps"][0]
    return answers


@pytest.fixture(scope="module")
def predicted(kit, models, tmp_path_factory):
    """Returns a function that answers all rows with `predict`: answers by id."""
    home = tmp_path_factory.mktemp("predicted")
    known: dict[str, dict[str, str]] = {}

    def predict(name: str) -> dict[str, str]:
        if name not in known:
            rows = ["data=jsonl", f"data.test={kit.rows}", "data.prompt='{image}{question}'"]
            settings = ["generation.max_new_tokens=8", "model.dtype=float32", "data.num_workers=0"]
            output_of(
                home, "predict", f"ckpt={models[name]}", *rows, *settings, f"hydra.run.dir={name}"
            )
            found = read_json_lines(home / name / "predictions.jsonl")
            known[name] = {row["id"]: row["prediction"] for row in found}
            assert len(known[name]) == 24
            assert len(set(known[name].values())) > 1, "the answers do not differ"
        return known[name]

    return predict


@pytest.mark.parametrize("name", MODELS)
def test_lmms_eval_gets_the_answers_of_predict(name, kit, models, predicted):
    arguments = f"pretrained={models[name]},batch_size=5,{FLOAT32}"
    assert answers_of(evaluate(kit, "qwenvl_lit", arguments)) == predicted(name)


def address_of(process: subprocess.Popen[str]) -> str:
    """Waits until a server prints its address; returns it."""
    printed = []
    for line in process.stdout:
        if found := re.match(r"(\S+) in a browser", line):
            return found[1]
        printed.append(line)
    raise AssertionError("".join(printed))


@pytest.mark.parametrize("name", MODELS)
def test_the_server_gives_lmms_eval_the_answers_of_predict(name, kit, models, predicted, tmp_path):
    model = [f"ckpt={models[name]}", "model.dtype=float32", "serve.name=ours"]
    process = start_command(tmp_path, "serve", *model, "serve.port=0")
    try:
        url = address_of(process)
        arguments = f"model_version=ours,base_url={url}/v1,api_key=none,num_cpus=6,max_retries=1"
        assert answers_of(evaluate(kit, "async_openai", arguments)) == predicted(name)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)


def test_the_command_of_lmms_eval_scores_as_our_benchmarks_do(kit, models, predicted, tmp_path):
    name = "qwen_vl_tiny"
    command = [sys.executable, "-m", "lmms_eval", "--model", "qwenvl_lit", "--log_samples"]
    command += ["--model_args", f"pretrained={models[name]},batch_size=16,{FLOAT32}"]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(kit.tasks)]
    subprocess.run(
        [*command, "--output_path", "kit"], cwd=tmp_path, env=environment(tmp_path), check=True
    )
    [file] = (tmp_path / "kit").rglob("*_results.json")
    theirs = json.loads(file.read_text())["results"]

    sets = "benchmarks=[pope/random,mme/existence,mme/OCR]"
    places = [f"paths.cache={kit.root}", "data.num_workers=0", "hydra.run.dir=ours"]
    settings = ["generation.max_new_tokens=8"]
    output_of(tmp_path, "test", f"ckpt={models[name]}", sets, *places, *settings)
    ours = json.loads((tmp_path / "ours/metrics.json").read_text())["test"]
    perception = sum(ours[f"mme/{subtask}/mme_score_official"] for subtask in ("existence", "OCR"))
    assert perception > 0
    score = theirs["mme_local"]["mme_perception_score,none"]
    assert 100 * perception == pytest.approx(score)
    # lmms-eval wants POPE's answers to be yes or no and nothing else.
    right = 0
    for number, row in enumerate(read_json_lines(kit.root / "pope.jsonl")):
        answer = predicted(name)[f"pope_local/{number}"]
        right += answer.lower() == row["answer"]
    assert theirs["pope_local"]["pope_accuracy,none"] == right / 8
    assert ours["pope/random/yes_no_accuracy_official"] >= right / 8

    numbers = {"pope/random": ("pope_local", 0), "mme/existence": ("mme_local", 0)}
    numbers["mme/OCR"] = ("mme_local", 8)
    for folder, (task, first) in numbers.items():
        for row in read_json_lines(tmp_path / "ours" / folder / "predictions.jsonl"):
            assert row["prediction"] == predicted(name)[f"{task}/{first + row['index']}"]


def test_settings_of_a_task_decide_over_those_of_the_model(kit, models):
    from lmms_eval.api.model import lmms

    from qwenvl_lit.evaluation.lmms.model import EvaluatedModel

    arguments = f"pretrained={models['full']},batch_size=3,max_new_tokens=2,{FLOAT32}"
    options = {"batch_size": 1, "device": None, "max_batch_size": None}
    model = EvaluatedModel.create_from_arg_string(arguments, options)
    assert isinstance(model, lmms)
    assert model.batch_size == 3
    cut = evaluate(kit, model, "", gen_kwargs="until=e")
    full = evaluate(kit, "qwenvl_lit", arguments)
    for row, answer in answers_of(full).items():
        assert answers_of(cut)[row] == answer.split("e")[0].strip()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("image_aspect_ratio=pad", r"task \w+_local: .*image_aspect_ratio='pad' is not supported"),
        ("num_samples=4", "num_samples=4 is not supported; there are until, max_new_tokens"),
    ],
)
def test_settings_that_are_not_supported_end_the_evaluation(settings, message, kit, models):
    arguments = f"pretrained={models['full']},{FLOAT32}"
    with pytest.raises(ValueError, match=message):
        evaluate(kit, "qwenvl_lit", arguments, gen_kwargs=settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrained=nowhere", "nowhere is no folder"),
        ("pretrained={full},batch_size=auto", "batch_size=auto: give a number of questions"),
        ("pretrained={full},batchsize=4", "batchsize"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_named(arguments, message, kit, models):
    with pytest.raises((ValueError, TypeError), match=message):
        evaluate(kit, "qwenvl_lit", arguments.format(full=models["full"]))


def test_other_types_of_tasks_are_refused(models):
    from qwenvl_lit.evaluation.lmms.model import EvaluatedModel

    model = EvaluatedModel(str(models["full"]), device="cpu", dtype="float32")
    for method, what in (
        (model.loglikelihood, "tasks that compare likelihoods"),
        (model.generate_until_multi_round, "tasks of several rounds"),
        (model.generate_visual_cot, "tasks whose answers are images"),
    ):
        with pytest.raises(ValueError, match=what):
            method([])


def test_lmms_eval_lists_the_model_without_loading_it():
    code = (
        "import sys; from lmms_eval.models import get_model_manifest; "
        "print(get_model_manifest('qwenvl_lit').chat_class_path); "
        "assert 'qwenvl_lit.api' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "qwenvl_lit.evaluation.lmms.model.EvaluatedModel"
    assert os.environ["HF_HUB_OFFLINE"] == "1"
