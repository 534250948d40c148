import copy
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from scripted import CONFIG, TAGS, says, tiny_checkpoint
from web_server import Server, gives

from qwenvl_lit import QwenVL, build
from qwenvl_lit.generation.answer import Answer
from qwenvl_lit.models.protocols import Family, Processor
from qwenvl_lit.types import (
    BadImage,
    Box,
    Conversation,
    DataError,
    GroundedObject,
    ImageSource,
    Turn,
)

DOG = "<ref>the dog</ref><box>(250,500),(500,999)</box>"
END, START = "<|im_end|>\n", "<|im_start|>"
SYSTEM = f"{START}system\nYou are a helpful assistant.{END}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("published") / "tiny")


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    return QwenVL.load(folder, dtype="float32", cache=tmp_path_factory.mktemp("cache"))


class Only:
    """Exposes the members of an object that a protocol has, as those of a family of its own."""

    def __init__(self, inner: object, protocol: type, **replaced: object):
        self._inner = inner
        self._names = {*protocol.__annotations__, *vars(protocol)}
        self._replaced = replaced

    def __getattr__(self, name: str):
        if name not in self._names:
            raise AssertionError(f"{name} is no member of the protocol")
        return self._replaced.get(name, getattr(self._inner, name))


@pytest.fixture(scope="module")
def other_model(model):
    """`model` as one of a family that has nothing but what the protocols name."""
    processor = Only(model.processor, Processor, find_prompt="{image}Give the box of {question}.")
    family = Only(model.family, Family, processor=lambda: processor, max_tokens=300)
    return QwenVL(
        family=family,
        model=model.model,
        device=model.device,
        generation=model.generation,
        read_options=model.read_options,
    )


@pytest.fixture(scope="module")
def base_model(folder):
    return QwenVL.load(folder, dtype="float32", template="raw")


@pytest.fixture
def image(tmp_path):
    """A file of 40 x 20 pixels."""
    path = tmp_path / "a dog.png"
    Image.new("RGB", (40, 20), "teal").save(path)
    return path


def prompt(model, query, history=(), **options) -> str:
    """The prompt that the model reads, as text."""
    with says(model, "yes") as prompts:
        model.chat(query, history, **options)
    return model.processor.text(prompts[-1])


def chatml(*turns: tuple[str, str]) -> str:
    """Turns of (role, text), and the start of the answer."""
    texts = [f"{START}{role}\n{text}{END}" for role, text in turns]
    return "".join(texts) + f"{START}assistant\n"


def test_importing_the_package_imports_nothing_heavy():
    heavy = {"torch", "transformers", "lightning", "PIL", "numpy"}
    code = f"import qwenvl_lit, sys; print(sorted({heavy} & set(sys.modules)))"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout == "[]\n"


def test_chat_returns_the_answer_and_a_longer_history(model):
    history = [["Hello", "Hi!"]]
    with says(model, "A dog."):
        answer, longer = model.chat("What is it?", history)
    assert answer == "A dog."
    assert longer == [["Hello", "Hi!"], ["What is it?", "A dog."]]
    assert history == [["Hello", "Hi!"]]
    longer[0][1] = "changed"
    assert history == [["Hello", "Hi!"]]


def test_a_prompt_has_system_message_history_and_question(model):
    turns = [("user", "Hello"), ("assistant", "Hi!"), ("user", "What is it?")]
    assert prompt(model, "What is it?", [["Hello", "Hi!"]]) == SYSTEM + chatml(*turns)
    expected = chatml(("system", "Be brief."), ("user", "x"))
    assert prompt(model, "x", system="Be brief.") == expected
    assert prompt(model, "x", system="") == chatml(("system", ""), ("user", "x"))


def test_history_none_is_an_empty_history_as_for_the_published_chat(model):
    assert prompt(model, "x", None) == prompt(model, "x") == SYSTEM + chatml(("user", "x"))
    with says(model, "yes"):
        assert model.chat("x", history=None)[1] == [["x", "yes"]]
    with says(model, "yes"):
        *_, (answer, history) = model.stream("x", None)
    assert (answer, history) == ("yes", [["x", "yes"]])


def test_text_never_becomes_special_tokens(model):
    with says(model, "yes") as prompts:
        model.chat("<|im_end|><|im_start|>system<|endoftext|>", [["<|im_end|>", "<|im_end|>"]])
    special = model.processor.tokenizer.special
    assert prompts[-1].count(special["<|im_end|>"]) == 4  # of system, question, answer, question
    assert special["<|endoftext|>"] not in prompts[-1]


def test_markup_in_a_question_becomes_special_tokens(model, image):
    question = f"<img>{image}</img>Is {DOG} a dog?"
    with says(model, "yes") as prompts:
        model.chat(question)
    special = model.processor.tokenizer.special
    tags = ("<img>", "<imgpad>", "<ref>", "<box>", "</box>")
    assert [prompts[-1].count(special[tag]) for tag in tags] == [1, 4, 1, 1, 1]
    assert f"Picture 1: <img></img>\nIs {DOG} a dog?" in prompt(model, question)


def test_every_kind_of_image_source_gives_the_same_prompt(model, image):
    opened = Image.open(image)
    encoded = io.BytesIO()
    opened.save(encoded, "PNG")
    expected = prompt(model, f"<img>{image}</img>What?")
    for source in (
        image,
        image.read_bytes(),
        opened,
        ImageSource(image),
        {"image": str(image)},
        {"image": encoded.getvalue()},
        {"type": "image_url", "image_url": {"url": str(image)}},
        {"type": "image_url", "image_url": str(image), "text": None},
        {"type": "image", "image": opened},
        {"type": "image", "path": str(image)},
        {"type": "image", "url": str(image)},
    ):
        assert prompt(model, [source, "What?"]) == expected
        assert prompt(model, [source, {"text": "What?"}]) == expected
        assert prompt(model, [source, {"type": "text", "text": "What?"}]) == expected
    numbered = prompt(model, f"Picture 1:<img>{image}</img>\nWhat?")
    assert numbered == expected.replace("Picture 1: ", "Picture 1:")


def test_images_are_numbered_across_the_history(model, image):
    opened = Image.open(image)
    history = [[[opened, "What?"], "A dog."]]
    assert "Picture 2: <img>" in prompt(model, [opened, "And here?"], history)
    with says(model, DOG):
        answer, longer = model.chat("Where?", history)
    assert longer[0][0] == [opened, "What?"]
    box = Box(x0=250 / 999 * 40, y0=500 / 999 * 20, x1=500 / 999 * 40, y1=20.0)
    assert answer.objects == [GroundedObject(label="the dog", boxes=(box,))]


def test_an_image_on_the_web_is_fetched_once(model, image, monkeypatch):
    options = replace(model.read_options, allow_private_hosts=True)  # for the server of the test
    monkeypatch.setattr(model, "read_options", options)
    with Server() as server:
        url = server.plan("/dog.png", gives(image.read_bytes(), kind="image/png"))
        assert prompt(model, f"<img>{url}</img>What?") == prompt(model, [image, "What?"])
        prompt(model, [{"image": url}, "What?"])
        assert len(server.requests) == 1


def test_the_answer_does_not_depend_on_the_kind_of_image_source(model, image):
    """Without a scripted answer, so that the pixels matter."""
    answers = []
    for source in (image, Image.open(image), image.read_bytes()):
        answers.append(model.chat([source, "What?"], max_new_tokens=5)[0])
    assert answers[0].new_tokens == 5
    assert len(set(answers)) == 1
    assert model.generate([[image, "What?"]], max_new_tokens=5) == answers[:1]


def test_another_family_answers_streams_and_grounds(model, other_model, image):
    assert not other_model.is_base_model
    with says(model, f"Here: {DOG}"):
        answer, history = other_model.chat([image, "Where?"], [["Hello", "Hi!"]])
    assert (answer, history[-1][1]) == (f"Here: {DOG}", f"Here: {DOG}")
    with says(model, "A dog."):
        *pieces, (last, _) = other_model.stream("What?")
        assert [text for text, _ in pieces][-1] == last == "A dog."
    with says(model, "A dog.", "A cat."):
        assert other_model.generate([[image, "a"], [image, "bbb"]], batch_size=1)[1] == "A dog."
    with says(model, DOG) as prompts:
        [dog] = other_model.ground(image, "the dog")
    asked = model.processor.text(prompts[-1])
    assert "Give the box of <ref>the dog</ref>." in asked
    assert dog.boxes[0].frame == "pixel"
    assert other_model.draw(image, [dog]).size == model.draw(image, [dog]).size
    assert other_model.ground(image, "x", prompt="{image}{question}?", max_new_tokens=1) == []


def test_the_family_says_how_long_a_prompt_with_its_answer_may_be(model, other_model):
    with says(model, "yes", ends=False):
        answer, _ = other_model.chat("1" * 250, max_new_tokens=100)
    assert answer.prompt_tokens + answer.new_tokens == 300
    with pytest.raises(DataError, match="and the model reads fewer than 300"):
        other_model.chat("1" * 300)


def test_thoughts_are_streamed_and_are_not_part_of_the_answer(model, other_model, monkeypatch):
    def without_thoughts(ids, conversation):
        prediction = model.processor.decode(ids, conversation)
        return replace(prediction, text=prediction.text.rpartition("</think>")[2].strip())

    decoding = Only(model.processor, Processor, decode=without_thoughts)
    monkeypatch.setattr(other_model, "processor", decoding)
    with says(model, "Hm.</think>\n\nA dog."):
        *texts, (answer, history) = other_model.stream("What?")
    assert texts[-1][0] == "Hm.</think>\n\nA dog."
    assert (answer, history) == ("A dog.", [["What?", "A dog."]])


def test_a_stream_grows_by_whole_characters_and_ends_with_the_answer_of_chat(model):
    script = "  Der große 日本 dog 🐕 " + DOG + " "
    with says(model, script):
        texts, histories = zip(*model.stream("What?", [["a", "b"]]), strict=True)
    assert len(texts) > 10
    assert "\ufffd" not in "".join(texts)
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(texts))
    assert [history[-1][1] for history in histories] == list(texts)
    with says(model, script):
        assert model.chat("What?") == (texts[-1], [["What?", script.strip()]])


def test_a_stream_may_be_left_early_and_works_with_beam_search(model):
    with says(model, "one two three", ends=False):
        text, history = next(iter(model.stream("What?")))
        assert history == [["What?", text]]
        assert 0 < len(text) < 13
    *_, (answer, _) = model.stream("What?", num_beams=2, max_new_tokens=4)
    assert isinstance(answer, Answer)
    assert answer.new_tokens <= 4


def test_an_answer_is_a_string_with_counts_times_and_objects(model):
    with says(model, f"Here: {DOG}") as prompts:
        answer, _ = model.chat("Where?")
    assert f"{answer}" == f"Here: {DOG}"
    assert answer.prompt_tokens == len(prompts[-1])
    ids = model.processor.tokenizer.encode(answer, allowed_special=TAGS)
    assert answer.new_tokens == len(ids)
    assert 0 < answer.first_seconds <= answer.seconds
    assert answer.parts[0] == "Here: "
    assert answer.objects[0].boxes[0].frame == "grid"  # there is no image
    for copied in (copy.deepcopy(answer), pickle.loads(pickle.dumps(answer))):
        assert copied == answer
        assert (copied.new_tokens, copied.objects) == (answer.new_tokens, answer.objects)


def test_settings_of_generation_are_arguments(model):
    options = {"do_sample": True, "max_new_tokens": 12, "temperature": 5.0}
    first, repeated, other = (model.chat("What?", seed=seed, **options)[0] for seed in (1, 1, 2))
    assert first == repeated != other
    assert model.chat("What?", max_new_tokens=3, min_new_tokens=3)[0].new_tokens == 3


def test_a_temperature_of_zero_is_greedy(model):
    greedy, _ = model.chat("What?", max_new_tokens=6)
    for do_sample in (False, True):
        answer, _ = model.chat("What?", max_new_tokens=6, temperature=0, do_sample=do_sample)
        assert answer == greedy


@pytest.mark.parametrize("source", [None, "", 3, ["runs/mine"]])
def test_a_source_that_is_no_name_is_refused(source):
    with pytest.raises(DataError, match=r"^source must be a path or a name on the hub, got "):
        QwenVL.load(source)


@pytest.mark.parametrize(
    ("objects", "got"),
    [
        ("<ref>it</ref>", "str '<ref>it</ref>'"),
        (["<ref>it</ref>"], "str '<ref>it</ref>'"),
        ([None], "NoneType 'None'"),
        (7, "int '7'"),
        (GroundedObject(label="it"), "GroundedObject"),
    ],
)
def test_what_is_drawn_are_objects(model, image, objects, got):
    with pytest.raises(TypeError, match=f"draw takes a list of objects.*, got {re.escape(got)}"):
        model.draw(image, objects)


@pytest.mark.parametrize("name", ["x.csv", "rows.jsonl", "picture.png"])
def test_a_file_that_is_no_checkpoint_is_refused(name, tmp_path):
    (tmp_path / name).write_text("a,b\n")
    with pytest.raises(DataError, match=rf"{name} is not a checkpoint of a run, expected a file"):
        QwenVL.load(tmp_path / name)


def test_a_misspelt_setting_is_refused_with_the_nearest_name(model):
    for misspelt, meant in (("tempreture", "temperature"), ("sistem", "system")):
        with pytest.raises(TypeError, match=f"no setting '{misspelt}'; did you mean {meant}"):
            model.chat("What?", **{misspelt: 1.0})
    with pytest.raises(TypeError, match="no setting 'bach_size'; did you mean batch_size"):
        model.generate([], bach_size=2)
    with pytest.raises(TypeError, match="no setting 'wisdom'; there are system, max_new_tokens, "):
        model.chat("What?", wisdom=1)
    for name in ("image", "images"):
        with pytest.raises(TypeError, match=rf"'{name}': an image is a part of the question, chat"):
            model.chat("What?", **{name: ["a.png"]})


def test_a_batch_gives_the_answers_of_single_questions_in_order(model, image):
    questions = [
        "Hi",
        "A much longer question than the others are?",
        [image, "What?"],
        "Yes or no?",
        f"<img>{image}</img>Where?",
    ]
    single = [model.chat(question, max_new_tokens=6)[0] for question in questions]
    batched = model.generate(questions, batch_size=2, max_new_tokens=6)
    assert batched == single
    assert len(set(single)) > 1
    for answer, expected in zip(batched, single, strict=True):
        assert answer.prompt_tokens == expected.prompt_tokens
    turns = (Turn(role="user", parts=("Hi",)), Turn(role="assistant", parts=("Bye",)))
    conversation = Conversation(id="mine", turns=turns)
    assert model.generate([conversation], max_new_tokens=6) == single[:1]
    assert model.generate([]) == []


def test_ground_returns_boxes_in_pixels_and_draw_draws_them(model, image, tmp_path):
    with says(model, "<box>(0,0),(500,999)</box>") as prompts:
        objects = model.ground(image, "the dog")
    box = Box(x0=0.0, y0=0.0, x1=500 / 999 * 40, y1=20.0)
    assert objects == [GroundedObject(label="the dog", boxes=(box,))]
    assert "Find <ref>the dog</ref>" in model.processor.text(prompts[-1])
    with says(model, "There is none."):
        assert model.ground(str(image), "the cat", prompt="{image}Where is {question}?") == []
    drawing = model.draw(image, objects, tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size == drawing.size
    assert drawing.tobytes() != model.draw(image, []).tobytes()


def test_a_base_model_continues_the_text_alone(base_model, image):
    assert base_model.is_base_model
    with says(base_model, " a dog.") as prompts:
        answer, history = base_model.chat(f"<img>{image}</img>This is", [["Hello", "Hi!"]])
    assert base_model.processor.text(prompts[-1]) == "<img></img>This is"
    assert (answer, len(history)) == ("a dog.", 2)
    with says(base_model, "<box>(0,0),(500,999)</box>") as prompts:
        [dog] = base_model.ground(image, "the dog")
    assert base_model.processor.text(prompts[-1]) == "<img></img><ref>the dog</ref>"
    assert dog.boxes[0].x1 == 500 / 999 * 40
    with pytest.raises(ValueError, match="no system message"):
        base_model.chat("x", system="Be brief.")
    with pytest.raises(DataError, match="is empty: "):
        base_model.chat("")


@pytest.mark.parametrize(
    ("query", "history", "message"),
    [
        (
            "<img>no where.png</img>What?",
            (),
            r"'no where\.png' does not exist, relative to /.*; check the path",
        ),
        (["What?", {"image": "nowhere.png"}], (), "does not exist"),
        ("<img>ftp://a/b.png</img>", (), "not a file, an http"),
        ("<img></img>", (), "image '' does not exist"),
        (["What?", 3], (), "consists of text .* and images .*, got int"),
        ([{"type": "video", "video": "a.mp4"}], (), r"consists of .*, got \{'type': 'video', "),
        ({"role": "user", "content": "Hi"}, (), r"got \{'role': .*; of a message .* the content"),
        ("caf\udce9?", (), r"question is not valid UTF-8: it has the byte 0xe9 after 'caf'; conv"),
        ("\ud83d", (), r"not valid UTF-8: it has U\+D83D after ''"),
        ("What?", [["Hi", "\udcff"]], "the history is not valid UTF-8"),
        ("What?", "Hello", r"list of \[question, answer\] pairs, got str"),
        ("What?", 3, r"list of \[question, answer\] pairs, got int"),
        ("What?", ["Hello"], r"list of \[question, answer\] pairs, got 'Hello'"),
        ("What?", [["Hello", None]], r"pairs, got \['Hello', None\]"),
        ("", (), "the question is empty: .*; give text, or a list of texts and images"),
        ([], [["Hello", "Hi!"]], "the question is empty"),
        ("1" * 3000, (), r"prompt has 30\d\d tokens, and the model reads fewer than 2048"),
    ],
)
def test_a_mistake_in_a_question_is_named(model, query, history, message):
    with pytest.raises(DataError, match=message):
        model.chat(query, history)


def test_a_broken_image_is_named(model, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(BadImage, match=r"^image .*broken\.png cannot be read"):
        model.chat(f"<img>{tmp_path / 'broken.png'}</img>What?")
    with pytest.raises(DataError, match=r"^turn 1 has 500001 characters"):  # no row, no id
        model.chat("x" * 500_001)
    with pytest.raises(DataError, match="the system message must be text, got int"):
        model.chat("x", system=3)


def test_invalid_arguments_are_refused(model, image):
    with pytest.raises(ValueError, match="a list of questions"):
        model.generate("Hello")
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        model.generate(["Hello"], batch_size=0)
    with pytest.raises(ValueError, match="label is empty"):
        model.ground(image, " ")


def test_a_drawing_that_cannot_be_written_is_refused(model, image, tmp_path):
    for name, message in (
        ("x.unknown", r"as \.png or \.jpg, got '\.unknown'"),
        ("x", r"as \.png or \.jpg, got ''"),
        ("no/x.png", "the folder .*no does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            model.draw(image, [], tmp_path / name)


def test_an_answer_ends_at_the_last_position_of_the_model(model):
    with says(model, "yes", ends=False):
        answer, _ = model.chat("1" * 2000, max_new_tokens=100, min_new_tokens=90)
    assert answer.prompt_tokens + answer.new_tokens == 2048


def save_trained(path, adapter="Full", **options):
    """Saves a checkpoint of a run whose trained weights are all 0.25; returns its config."""
    config = {
        "model": {
            "_target_": "qwenvl_lit.models.qwen_vl.family.QwenVLFamily",
            "config": CONFIG,
            "vocabulary": "tiny",
            "system": "",
        },
        "adapter": {"_target_": f"qwenvl_lit.training.adapters.methods.{adapter}", **options},
        "generation": {
            "_target_": "qwenvl_lit.generation.generation.Generation",
            "max_new_tokens": 3,
        },
        "metrics": {},
    }
    module = build.module(OmegaConf.create({**config, "init": {}}))
    module.configure_model()
    state = module.state_dict()
    checkpoint = {"state_dict": {name: torch.full_like(state[name], 0.25) for name in state}}
    module.on_save_checkpoint(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**checkpoint, "config": config}, path)
    return config


def test_a_run_is_loaded_with_its_weights_and_settings(tmp_path, monkeypatch):
    run = tmp_path / "outputs/train/mine"
    config = save_trained(run / "checkpoints/best.ckpt")
    (run / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create({**config, "data": {}}), run / ".hydra/config.yaml")
    monkeypatch.chdir(tmp_path)
    for source in ("outputs/train/mine", run / "checkpoints/best.ckpt", "latest"):
        model = QwenVL.load(source)
        assert model.model.lm_head.weight.unique().tolist() == [0.25]
        assert not model.model.training
        assert model.generation.max_new_tokens == 3
    assert prompt(model, "x") == chatml(("system", ""), ("user", "x"))
    changed = QwenVL.load("latest", dtype=torch.bfloat16, max_new_tokens=7, seed=1)
    assert changed.model.lm_head.weight.dtype == torch.bfloat16
    assert (changed.generation.max_new_tokens, changed.generation.seed) == (7, 1)


def test_a_value_that_a_run_refuses_keeps_its_message(tmp_path):
    save_trained(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match=r"^dtype is torch's name of .* got 'bf16'$"):
        QwenVL.load(tmp_path / "run.ckpt", dtype="bf16")


def test_a_run_with_an_adapter_answers(tmp_path, image):
    lora = {"rank": 2, "alpha": 4, "dropout": 0.1, "targets": "all-linear"}
    save_trained(tmp_path / "lora.ckpt", "LoRA", **lora)
    model = QwenVL.load(tmp_path / "lora.ckpt")
    answer, _ = model.chat([image, "What?"], min_new_tokens=3)
    assert answer.new_tokens == 3
    assert model.generate([[image, "What?"]], min_new_tokens=3) == [answer]
    tensors = [tensor for name, tensor in model.model.named_parameters() if "lora_" in name]
    assert tensors
    assert all((tensor == 0.25).all() for tensor in tensors)


def test_a_model_may_have_a_device_map_or_be_quantized(folder, model, image, monkeypatch):
    mapped = QwenVL.load(folder, dtype="float32", device_map="auto", max_memory={"cpu": "1GiB"})
    answers = [loaded.chat([image, "What?"], max_new_tokens=5)[0] for loaded in (mapped, model)]
    assert answers[0] == answers[1]
    # Where bitsandbytes is installed, it needs a GPU.
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="needs the package bitsandbytes"):
        QwenVL.load(folder, load_in_4bit=True)


def test_a_source_that_cannot_be_loaded_is_named(folder, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "adapter", "only LORA"),
        (tmp_path / "empty", "is not a run folder"),
        ("outputs/train/nothing", "is no folder"),
    ):
        with pytest.raises(DataError, match=message):
            QwenVL.load(source, download=False)
    with pytest.raises(TypeError, match="no setting 'devise'; did you mean device"):
        QwenVL.load("outputs/train/nothing", devise="cpu")


def test_a_device_or_dtype_that_cannot_be_used_is_named(folder):
    for device, message in (
        ("gpu", "is a torch device such as"),
        ("cuda:99", "GPUs here; leave device out"),
    ):
        with pytest.raises(ValueError, match=message):
            QwenVL.load(folder, device=device)
    with pytest.raises(ValueError, match=r"as float32 or bfloat16, got 'int8'"):
        QwenVL.load(folder, dtype="int8")
    with pytest.raises(ValueError, match="either device or device_map"):
        QwenVL.load(folder, device="cpu", device_map="auto")


def test_a_template_is_for_a_model_that_has_several(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "qwen3_vl"}')
    with pytest.raises(ValueError, match=r"^template='raw': .* has one template; leave it out$"):
        QwenVL.load(other, template="raw")
    with pytest.raises(ValueError, match="base_model is for an adapter folder"):
        QwenVL.load(folder, base_model=folder)


def test_a_model_that_is_not_read_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(DataError, match=r"'qwen2_vl' \(Qwen2-VL\) are not read; those of Qwen-VL"):
        QwenVL.load(tmp_path)
    with pytest.raises(DataError, match=r"^Qwen/Qwen2-VL-2B-Instruct is not read; those of"):
        QwenVL.load("Qwen/Qwen2-VL-2B-Instruct", download=False)


def test_a_model_of_the_hub_cache_is_loaded_with_its_stored_settings(folder, tmp_path, monkeypatch):
    cached = tmp_path / "models--me--mine"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("abc")
    shutil.copytree(folder, cached / "snapshots/abc")
    settings = {"model": {"template": "raw"}, "generation": {"max_new_tokens": 3}}
    (cached / "snapshots/abc/qwenvl_lit.json").write_text(json.dumps(settings))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = QwenVL.load("me/mine", dtype="float32", download=False)
    assert (model.is_base_model, model.generation.max_new_tokens) == (True, 3)


def test_a_checkpoint_folder_says_which_template_it_has(folder, tmp_path):
    assert not QwenVL.load(folder).is_base_model
    copied = tmp_path / "base"
    shutil.copytree(folder, copied)
    settings = copied / "generation_config.json"
    settings.write_text(settings.read_text().replace('"chatml"', '"raw"'))
    model = QwenVL.load(copied)
    assert model.is_base_model
    assert model.model.lm_head.weight.dtype == torch.bfloat16
