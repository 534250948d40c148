"""conf/metrics: names say which protocol is computed, and named datasets have their metrics."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from qwenvl_lit.metrics.per_sample import PerSampleMetric
from qwenvl_lit.runs.run import config_folder

FILES = sorted((config_folder() / "metrics").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_names_of_official_scores_end_in_official(file):
    for name, node in OmegaConf.to_container(OmegaConf.load(file)).items():
        metric = instantiate(node)
        assert isinstance(metric, PerSampleMetric)
        assert name.endswith("_official") == (getattr(metric, "protocol", "correct") == "official")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_official_score_follows_the_correct_one(file):
    names = list(OmegaConf.to_container(OmegaConf.load(file)))
    for index, name in enumerate(names):
        if name.endswith("_official"):
            assert names[index - 1] == name.removesuffix("_official")


CAPTION = ("cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l")
VQA = ("vqa_accuracy", "vqa_accuracy_official")


@pytest.mark.parametrize(
    ("data", "metrics"),
    [
        ("coco_en_mini", CAPTION),
        ("coco_en", CAPTION),
        ("flickr30k", CAPTION),
        ("nocaps", CAPTION),
        ("vqav2", VQA),
        ("textvqa", VQA),
        ("docvqa", ("anls", "anls_official")),
        ("chartqa", ("relaxed_accuracy", "relaxed_accuracy_official")),
        ("refcoco", ("acc_at_50", "mean_iou")),
    ],
)
def test_a_named_dataset_has_its_published_metrics(data, metrics):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        assert tuple(compose("train", [f"data={data}"]).metrics) == metrics
