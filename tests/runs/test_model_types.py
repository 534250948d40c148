"""Which recipe a model has, by its config.json or its name. No weights, no network."""

import json

import pytest

from qwenvl_lit.cli.early_checks import check_values
from qwenvl_lit.runs.model_types import (
    check_model_path,
    model_arguments,
    model_name,
    model_type_of,
    published_name,
    recipe_of,
    recipe_settings,
)
from qwenvl_lit.runs.run import find_run
from qwenvl_lit.types import DataError


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def write_model(folder, **settings) -> str:
    """Writes a folder with config.json alone; returns its path."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "recipe"),
    [
        ({"model_type": "qwen", "visual": {}}, "qwen_vl_chat"),
        ({"visual": {}}, "qwen_vl_chat"),  # copies of Qwen-VL without model_type
        ({"model_type": "qwen", "hidden_size": 4096}, "qwen_7b_chat"),
        ({"model_type": "qwen", "hidden_size": 2048, "visual": None}, "qwen_1_8b_chat"),
        ({"model_type": "qwen", "hidden_size": 8192}, "qwen_14b_chat"),  # 72B
        ({}, "qwen_vl_chat"),
        ({"model_type": "qwen2_5_vl", "hidden_size": 2048}, "qwen2_5_vl_3b"),  # as published
        ({"model_type": "qwen2_5_vl", "text_config": {"hidden_size": 3584}}, "qwen2_5_vl_7b"),
        ({"model_type": "qwen2_5_vl", "hidden_size": 8192}, "qwen2_5_vl_7b"),  # 72B
        ({"model_type": "qwen3_vl", "text_config": {"hidden_size": 2048}}, "qwen3_vl_2b"),
        ({"model_type": "qwen3_vl", "text_config": {"hidden_size": 2560}}, "qwen3_vl_4b"),
        ({"model_type": "qwen3_vl", "text_config": {"hidden_size": 4096}}, "qwen3_vl_8b"),
        ({"model_type": "qwen3_vl", "text_config": {"hidden_size": 5120}}, "qwen3_vl_8b"),  # 32B
        ({"model_type": "qwen3_vl", "text_config": {"hidden_size": 64}}, "qwen3_vl_2b"),
        ({"model_type": "qwen3_vl", "text_config": {"hidden_size": "4096"}}, "qwen3_vl_8b"),
        ({"model_type": "qwen3_vl"}, "qwen3_vl_8b"),
    ],
)
def test_config_json_decides_whatever_the_folder_is_called(tmp_path, settings, recipe):
    assert recipe_of(write_model(tmp_path / "Qwen2.5-VL-3B-Instruct", **settings)) == recipe
    assert recipe_settings(recipe)["_target_"].startswith("qwenvl_lit.models.")


@pytest.mark.parametrize(("visual", "base"), [({}, "qwen_vl"), (None, "qwen_7b")])
def test_a_model_without_chat_markup_is_the_base_model(tmp_path, visual, base):
    folder = tmp_path / "mine"
    path = write_model(folder, model_type="qwen", visual=visual, hidden_size=4096)
    for chat_format, recipe in (("raw", base), ("chatml", f"{base}_chat")):
        (folder / "generation_config.json").write_text(json.dumps({"chat_format": chat_format}))
        assert recipe_of(path) == recipe


def test_seeclick_is_recognized_by_its_name(tmp_path):
    path = write_model(tmp_path / "SeeClick-aitw", model_type="qwen", visual={})
    for name in (path, "cckevinn/SeeClick"):
        assert model_arguments(name).startswith("model=seeclick")
    assert recipe_settings("seeclick")["boxes"] == "unit_points"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Qwen/Qwen-VL", "model=qwen_vl"),
        ("Qwen/Qwen-VL-Chat", "model=qwen_vl_chat"),
        ("Qwen/Qwen-7B", "model=qwen_7b"),
        ("Qwen/Qwen-1_8B-Chat", "model=qwen_1_8b_chat"),
        ("Qwen/Qwen-14B-Chat", "model=qwen_14b_chat"),
        ("Qwen/Qwen-72B", "model=qwen_14b model.path=Qwen/Qwen-72B"),
        ("me/qwen-7b-medical", "model=qwen_7b_chat model.path=me/qwen-7b-medical"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "model=qwen2_5_vl_3b"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "model=qwen2_5_vl_7b"),
        (
            "Qwen/Qwen2.5-VL-72B-Instruct",
            "model=qwen2_5_vl_7b model.path=Qwen/Qwen2.5-VL-72B-Instruct",
        ),
        ("Qwen/Qwen3-VL-2B-Instruct", "model=qwen3_vl_2b"),
        ("Qwen/Qwen3-VL-4B-Instruct", "model=qwen3_vl_4b"),
        ("Qwen/Qwen3-VL-8B-Instruct", "model=qwen3_vl_8b"),
        ("Qwen/Qwen3-VL-2B-Thinking", "model=qwen3_vl_2b model.path=Qwen/Qwen3-VL-2B-Thinking"),
        ("Qwen/Qwen3-VL-32B-Thinking", "model=qwen3_vl_8b model.path=Qwen/Qwen3-VL-32B-Thinking"),
        ("me/my_qwen3-vl-4b_ft", "model=qwen3_vl_4b model.path=me/my_qwen3-vl-4b_ft"),
        ("me/qwen3-vl-ft", "model=qwen3_vl_8b model.path=me/qwen3-vl-ft"),
        ("me/mine", "model=qwen_vl_chat model.path=me/mine"),
        ("/models/gone", "model=qwen_vl_chat model.path=/models/gone"),
    ],
)
def test_a_name_says_which_recipe_a_model_has(name, arguments):
    assert model_arguments(name) == arguments


def test_a_model_in_the_hub_cache_is_recognized_by_its_config(tmp_path):
    cached = tmp_path / "hub/models--me--mine"
    write_model(cached / "snapshots/abc", model_type="qwen3_vl", text_config={"hidden_size": 2560})
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    assert model_arguments("me/mine") == "model=qwen3_vl_4b model.path=me/mine"


LISTED = (
    r"those of Qwen-VL \(qwen\), Qwen \(qwen without `visual`\), Qwen2\.5-VL \(qwen2_5_vl\) and "
    r"Qwen3-VL \(qwen3_vl\) are$"
)


@pytest.mark.parametrize(
    ("model_type", "named"),
    [
        ("qwen2_vl", r"'qwen2_vl' \(Qwen2-VL\)"),
        ("qwen3_vl_moe", r"'qwen3_vl_moe' \(Qwen3-VL with experts \(MoE\)\)"),
        ("qwen3_5", r"'qwen3_5' \(Qwen3\.5\)"),
        ("qwen2_audio", r"'qwen2_audio' \(Qwen2-Audio\)"),
        ("qwen3", r"'qwen3' \(Qwen3, which has no vision tower\)"),
        ("monkey", r"'monkey' \(Monkey, whose vision tower has adapters for parts of an image\)"),
        ("qwen_audio", r"'qwen_audio' \(Qwen-Audio\)"),
        ("llava", r"'llava'"),
        (["qwen"], r"\['qwen'\]"),
        (None, "None"),
    ],
)
def test_a_model_that_is_not_read_is_named_with_those_that_are(tmp_path, model_type, named):
    path = write_model(tmp_path / "mine", model_type=model_type)
    message = rf"^{path}/config\.json: models of model_type {named} are not read; {LISTED}"
    for ask in (model_type_of, recipe_of, model_arguments):
        with pytest.raises(DataError, match=message):
            ask(path)


def test_qwen_audio_is_known_by_its_tower(tmp_path):
    path = write_model(tmp_path / "mine", model_type="qwen", audio={"n_ctx": 1500})
    message = (
        rf"^{path}/config\.json: models with `audio`, such as Qwen-Audio, are not read; {LISTED}"
    )
    with pytest.raises(DataError, match=message):
        recipe_of(path)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "Qwen3-VL-8B-Instruct-FP8",
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
            "FP8, which is not read; .* made from, Qwen/Qwen3-VL-8B-Instruct, with",
        ),
        (
            "Qwen2.5-VL-7B-Instruct-AWQ",
            {"quantization_config": {"quant_method": "awq", "bits": 4}, "model_type": "qwen2_5_vl"},
            r"AWQ \(4 bits\), which is not read; .* made from, Qwen/Qwen2\.5-VL-7B-Instruct, with",
        ),
        (
            "Qwen3-VL-2B-Instruct-unsloth-bnb-4bit",
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            r"bitsandbytes \(4 bits\), which .* made from, Qwen/Qwen3-VL-2B-Instruct, with",
        ),
        (
            "mine",
            {"quantization_config": {"load_in_8bit": True}},
            r"bitsandbytes \(8 bits\), which .* made from, such as Qwen/Qwen3-VL-8B-Instruct, with",
        ),
        ("mine", {"quantization": {"group_size": 64, "bits": 4}}, r"MLX \(4 bits\), which is not"),
        ("mine", {"quantization_config": {"quant_method": "new"}}, "with new, which is not read"),
        ("mine", {"quantization_config": {"what": 1}}, "quantized, which is not read"),
        (
            "Qwen-VL-Chat-Int3",
            {
                "model_type": "qwen",
                "visual": {},
                "quantization_config": {"quant_method": "gptq", "bits": 3, "group_size": 128},
            },
            "with GPTQ to 3 bits, which .* made from, Qwen/Qwen-VL-Chat, with",
        ),
    ],
)
def test_a_quantization_that_is_not_read_names_the_model_to_take(tmp_path, name, settings, message):
    path = write_model(tmp_path / name, **{"model_type": "qwen3_vl", **settings})
    for ask in (model_type_of, recipe_of, find_run):
        with pytest.raises(DataError, match=rf"^{path}/config\.json: the weights are .*{message}"):
            ask(path)


def test_weights_of_other_programs_are_named(tmp_path):
    path = write_model(tmp_path / "mine", model_type="qwen3_vl")
    (tmp_path / "mine/hf_quant_config.json").write_text("{}")
    with pytest.raises(DataError, match=r"hf_quant_config\.json: .* with TensorRT Model Optimizer"):
        recipe_of(path)
    folder = tmp_path / "Qwen3-VL-2B-Instruct-GGUF"
    folder.mkdir()
    file = folder / "Qwen3-VL-2B-Instruct-Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    for path in (file, folder):
        for ask in (recipe_of, find_run):
            message = rf"^{file}: .* with GGUF, .* made from, Qwen/Qwen3-VL-2B-Instruct, with"
            with pytest.raises(DataError, match=message):
                ask(str(path))


def test_gptq_weights_are_those_of_a_model_that_is_read(tmp_path):
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    path = write_model(tmp_path / "Int4", visual={}, quantization_config=settings)
    assert recipe_of(path) == "qwen_vl_chat"
    assert recipe_settings("qwen_vl_chat_int4")["path"] == "Qwen/Qwen-VL-Chat-Int4"
    check_model_path({**recipe_settings("qwen_vl_chat_int4"), "path": path}, "qwen_vl_chat_int4")


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen-Audio-Chat",
        "Qwen/Qwen1.5-7B-Chat",
        "Qwen/Qwen2-VL-7B-Instruct",
        "Qwen/Qwen3-VL-30B-A3B-Instruct",
        "qwen/Qwen3.5-4B",
    ],
)
def test_a_published_name_that_is_not_read_is_an_error(name):
    with pytest.raises(DataError, match=rf"^{name} is not read; {LISTED}"):
        recipe_of(name)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("~/.cache/modelscope/hub/qwen/Qwen-VL-Chat", "Qwen/Qwen-VL-Chat"),
        ("/models/Qwen-VL-Chat-Int4", "Qwen/Qwen-VL-Chat-Int4"),
        ("/mnt/Qwen/Qwen2___5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("unsloth/Qwen3-VL-8B-Instruct-unsloth-bnb-4bit", "Qwen/Qwen3-VL-8B-Instruct"),
        ("unsloth/qwen3-vl-2b-thinking-bnb-4bit", "Qwen/Qwen3-VL-2B-Thinking"),
        ("Qwen/Qwen3-VL-32B-Instruct", "Qwen/Qwen3-VL-32B-Instruct"),
        ("/gone/qwen/Qwen-7B-Chat", "Qwen/Qwen-7B-Chat"),
        ("qwen-1_8b", "Qwen/Qwen-1_8B"),
        ("me/Qwen3-VL-8B-Instruct-medical", None),
        ("Qwen/Qwen3-VL-8B-Instruct-FP8", None),
    ],
)
def test_a_copy_of_a_published_model_is_known_by_its_name(name, published):
    assert published_name(name) == published


@pytest.mark.parametrize(
    ("choice", "settings", "meant"),
    [
        ("qwen_vl_chat", {"model_type": "qwen3_vl"}, "qwen3_vl_8b"),
        ("qwen_vl_tiny", {"model_type": "qwen2_5_vl", "hidden_size": 2048}, "qwen2_5_vl_3b"),
        ("qwen3_vl_8b", {"model_type": "qwen", "visual": {}}, "qwen_vl_chat"),
        ("qwen3_vl_8b", {"model_type": "qwen2_5_vl"}, "qwen2_5_vl_7b"),
        ("qwen_vl_chat", {"model_type": "qwen", "hidden_size": 4096}, "qwen_7b_chat"),
        ("qwen_tiny", {"model_type": "qwen", "visual": {}}, "qwen_vl_chat"),
        (None, {"model_type": "qwen3_vl"}, "qwen3_vl_8b"),
    ],
)
def test_a_folder_of_another_model_names_the_model_to_choose(tmp_path, choice, settings, meant):
    path = write_model(tmp_path / "mine", **settings)
    model = {**recipe_settings(choice or "qwen_vl_chat"), "path": path}
    with pytest.raises(DataError) as raised:
        check_model_path(model, choice)
    assert str(raised.value).startswith(f"model.path={path} is of Qwen")
    assert f"for this path: model={meant} model.path={path}" in str(raised.value)


@pytest.mark.parametrize(
    ("choice", "path"),
    [
        ("qwen_vl_chat", "Qwen/Qwen-VL"),
        ("qwen_vl", "/models/gone"),
        ("qwen3_vl_2b", "Qwen/Qwen3-VL-8B-Thinking"),
        ("qwen_vl_tiny", None),
        ("qwen_tiny", None),
        ("qwen_14b", "Qwen/Qwen-72B-Chat"),
        (None, "Qwen/Qwen-VL-Chat"),
    ],
)
def test_a_path_that_fits_is_taken(choice, path):
    check_model_path({**recipe_settings(choice or "qwen_vl_chat"), "path": path}, choice)


def test_a_class_of_the_user_is_not_checked(tmp_path):
    path = write_model(tmp_path / "mine", model_type="llava")
    check_model_path({"_target_": "mine.LlavaFamily", "path": path})
    assert model_name({"_target_": "mine.LlavaFamily", "path": path}) == "Llava"


def test_commands_refuse_the_wrong_model_before_torch_is_imported(tmp_path):
    from commands import compose_config

    path = write_model(tmp_path / "mine", model_type="qwen3_vl")
    config = compose_config("train", "model=qwen_vl_chat", f"model.path={path}")
    with pytest.raises(DataError, match="for this path: model=qwen3_vl_8b"):
        check_values(config)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"path": "Qwen/Qwen-VL-Chat"}, "Qwen-VL"),
        ({"path": "Qwen/Qwen2.5-VL-7B-Instruct"}, "Qwen2.5-VL"),
        ({"path": None, "config": {"model_type": "qwen3_vl"}}, "Qwen3-VL"),
        ({"path": "/models/gone", "_target_": "qwen_vl"}, "Qwen-VL"),
        ({"path": "/models/gone", "_target_": "qwen3_vl_8b"}, "Qwen2.5-VL or Qwen3-VL"),
        ({"path": None, "_target_": "qwen_tiny", "config": {}}, "Qwen"),
        ({"path": "Qwen/Qwen-7B-Chat"}, "Qwen"),
        ({}, "Qwen-VL"),
    ],
)
def test_a_model_has_a_name_for_cards_and_reports(model, name):
    if "_target_" in model:
        model["_target_"] = recipe_settings(model["_target_"])["_target_"]
    assert model_name(model) == name
