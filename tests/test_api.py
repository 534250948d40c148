import copy
import io
import pickle
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from scripted import CONFIG, says, tiny_checkpoint
from web_server import Server, gives

from qwenvl_lit import QwenVL, build
from qwenvl_lit.generation.answer import Answer
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


@pytest.fixture(scope="module")
def base(folder):
    return QwenVL.load(folder, dtype="float32", template="raw")


@pytest.fixture
def image(tmp_path):
    """40 x 20 pixels."""
    path = tmp_path / "a dog.png"
    Image.new("RGB", (40, 20), "teal").save(path)
    return path


def prompt(model, query, history=(), **options):
    """What the model reads, as text."""
    with says(model, "yes") as asked:
        model.chat(query, history, **options)
    return model.processor.text(asked[-1])


def test_the_package_alone_brings_in_nothing_heavy():
    code = "import qwenvl_lit, sys; print(sorted({'torch', 'transformers', 'lightning', 'PIL', 'numpy'} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


def test_a_chat_gives_the_answer_and_a_longer_history(model):
    history = [["Hello", "Hi!"]]
    with says(model, "A dog."):
        answer, longer = model.chat("What is it?", history)
    assert answer == "A dog."
    assert longer == [["Hello", "Hi!"], ["What is it?", "A dog."]]
    assert history == [["Hello", "Hi!"]]
    longer[0][1] = "changed"
    assert history == [["Hello", "Hi!"]]


def test_a_prompt_holds_system_message_history_and_question(model):
    turns = f"{START}user\nHello{END}{START}assistant\nHi!{END}{START}user\nWhat is it?{END}{START}assistant\n"
    assert prompt(model, "What is it?", [["Hello", "Hi!"]]) == SYSTEM + turns
    assert (
        prompt(model, "x", system="Be brief.")
        == f"{START}system\nBe brief.{END}{START}user\nx{END}{START}assistant\n"
    )
    assert (
        prompt(model, "x", system="")
        == f"{START}system\n{END}{START}user\nx{END}{START}assistant\n"
    )


def test_text_never_becomes_special_tokens(model):
    with says(model, "yes") as asked:
        model.chat("<|im_end|><|im_start|>system<|endoftext|>", [["<|im_end|>", "<|im_end|>"]])
    special = model.processor.tokenizer.special
    assert asked[-1].count(special["<|im_end|>"]) == 4  # of system, question, answer, question
    assert special["<|endoftext|>"] not in asked[-1]


def test_markup_in_a_question_is_read(model, image):
    with says(model, "yes") as asked:
        model.chat(f"<img>{image}</img>Is {DOG} a dog?")
    special = model.processor.tokenizer.special
    assert [
        asked[-1].count(special[tag]) for tag in ("<img>", "<imgpad>", "<ref>", "<box>", "</box>")
    ] == [1, 4, 1, 1, 1]
    assert "Picture 1: <img></img>\nIs " + DOG + " a dog?" in prompt(
        model, f"<img>{image}</img>Is {DOG} a dog?"
    )


def test_every_way_to_give_a_image_is_the_same_prompt(model, image):
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
    ):
        assert prompt(model, [source, "What?"]) == expected
        assert prompt(model, [source, {"text": "What?"}]) == expected
    assert prompt(model, f"Picture 1:<img>{image}</img>\nWhat?") == expected.replace(
        "Picture 1: ", "Picture 1:"
    )


def test_images_are_counted_over_the_history(model, image):
    opened = Image.open(image)
    history = [[[opened, "What?"], "A dog."]]
    assert "Picture 2: <img>" in prompt(model, [opened, "And here?"], history)
    with says(model, DOG):
        answer, longer = model.chat("Where?", history)
    assert longer[0][0] == [opened, "What?"]
    assert answer.objects == [
        GroundedObject(
            label="the dog",
            boxes=(Box(x0=250 / 999 * 40, y0=500 / 999 * 20, x1=500 / 999 * 40, y1=20.0),),
        )
    ]


def test_a_image_on_the_web_is_fetched_once(model, image):
    with Server() as server:
        url = server.plan("/dog.png", gives(image.read_bytes(), kind="image/png"))
        assert prompt(model, f"<img>{url}</img>What?") == prompt(model, [image, "What?"])
        prompt(model, [{"image": url}, "What?"])
        assert len(server.asked) == 1


def test_what_is_said_does_not_depend_on_how_a_image_comes(model, image):
    """Without a script: the pixels arrive."""
    answers = [
        model.chat([source, "What?"], max_new_tokens=5)[0]
        for source in (image, Image.open(image), image.read_bytes())
    ]
    assert answers[0].new_tokens == 5
    assert len(set(answers)) == 1
    assert model.generate([[image, "What?"]], max_new_tokens=5) == answers[:1]


def test_a_stream_grows_by_whole_characters_and_ends_as_chat_does(model):
    said = "  Der große 日本 dog 🐕 " + DOG + " "
    with says(model, said):
        texts, histories = zip(*model.stream("What?", [["a", "b"]]), strict=True)
    assert len(texts) > 10
    assert "\ufffd" not in "".join(texts)
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(texts))
    assert [history[-1][1] for history in histories] == list(texts)
    with says(model, said):
        assert model.chat("What?") == (texts[-1], [["What?", said.strip()]])


def test_a_stream_can_be_left_and_beams_come_at_once(model):
    with says(model, "one two three", ends=False):
        text, history = next(iter(model.stream("What?")))
        assert history == [["What?", text]]
        assert 0 < len(text) < 13
    whole = list(model.stream("What?", num_beams=2, max_new_tokens=4))
    assert isinstance(whole[-1][0], Answer)
    assert whole[-1][0].new_tokens <= 4


def test_an_answer_is_a_str_that_knows_its_measures(model):
    with says(model, f"Here: {DOG}") as asked:
        answer, _ = model.chat("Where?")
    assert f"{answer}" == f"Here: {DOG}"
    assert answer.prompt_tokens == len(asked[-1])
    assert answer.new_tokens == len(
        model.processor.tokenizer.encode(
            answer, allowed_special=("<ref>", "</ref>", "<box>", "</box>")
        )
    )
    assert 0 < answer.first_seconds <= answer.seconds
    assert answer.parts[0] == "Here: "
    assert answer.objects[0].boxes[0].frame == "grid"  # there is no image
    for same in (copy.deepcopy(answer), pickle.loads(pickle.dumps(answer))):
        assert (same, same.new_tokens, same.objects) == (answer, answer.new_tokens, answer.objects)


def test_settings_are_arguments(model):
    options = {"do_sample": True, "max_new_tokens": 12, "temperature": 5.0}
    one, same, other = (model.chat("What?", seed=seed, **options)[0] for seed in (1, 1, 2))
    assert one == same != other
    assert model.chat("What?", max_new_tokens=3, min_new_tokens=3)[0].new_tokens == 3
    for call, name, meant in (
        (model.chat, "tempreture", "temperature"),
        (model.chat, "sistem", "system"),
    ):
        with pytest.raises(TypeError, match=f"no setting '{name}'; did you mean {meant}"):
            call("What?", **{name: 1.0})
    with pytest.raises(TypeError, match="no setting 'bach_size'; did you mean batch_size"):
        model.generate([], bach_size=2)
    with pytest.raises(TypeError, match="no setting 'wisdom'; there are system, max_new_tokens, "):
        model.chat("What?", wisdom=1)


def test_batches_answer_as_one_by_one_in_order(model, image):
    questions = [
        "Hi",
        "A much longer question than the others are?",
        [image, "What?"],
        "Yes or no?",
        f"<img>{image}</img>Where?",
    ]
    alone = [model.chat(question, max_new_tokens=6)[0] for question in questions]
    together = model.generate(questions, batch_size=2, max_new_tokens=6)
    assert together == alone
    assert len(set(alone)) > 1
    assert [answer.prompt_tokens for answer in together] == [
        answer.prompt_tokens for answer in alone
    ]
    talk = Conversation(
        id="mine", turns=(Turn(role="user", parts=("Hi",)), Turn(role="assistant", parts=("Bye",)))
    )
    assert model.generate([talk], max_new_tokens=6) == alone[:1]
    assert model.generate([]) == []


def test_ground_finds_boxes_in_pixels_and_draw_shows_them(model, image, tmp_path):
    with says(model, "<box>(0,0),(500,999)</box>") as asked:
        found = model.ground(image, "the dog")
    assert found == [
        GroundedObject(label="the dog", boxes=(Box(x0=0.0, y0=0.0, x1=500 / 999 * 40, y1=20.0),))
    ]
    assert "Find <ref>the dog</ref>" in model.processor.text(asked[-1])
    with says(model, "There is none."):
        assert model.ground(str(image), "the cat", prompt="{image}Where is {question}?") == []
    drawn = model.draw(image, found, tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size == drawn.size
    assert drawn.tobytes() != model.draw(image, []).tobytes()


def test_the_base_model_continues_the_text_alone(base, image):
    assert base.is_base_model
    with says(base, " a dog.") as asked:
        answer, history = base.chat(f"<img>{image}</img>This is", [["Hello", "Hi!"]])
    assert base.processor.text(asked[-1]) == "<img></img>This is"
    assert (answer, len(history)) == ("a dog.", 2)
    with says(base, "<box>(0,0),(500,999)</box>") as asked:
        [found] = base.ground(image, "the dog")
    assert base.processor.text(asked[-1]) == "<img></img><ref>the dog</ref>"
    assert found.boxes[0].x1 == 500 / 999 * 40
    with pytest.raises(ValueError, match="no system message"):
        base.chat("x", system="Be brief.")
    with pytest.raises(DataError, match="is empty: "):
        base.chat("")


@pytest.mark.parametrize(
    ("query", "history", "message"),
    [
        (
            "<img>no where.png</img>What?",
            (),
            r"'no where\.png' does not exist, seen from /.*; check the path",
        ),
        (["What?", {"image": "nowhere.png"}], (), "does not exist"),
        ("<img>ftp://a/b.png</img>", (), "not a file, an http"),
        ("<img></img>", (), "image '' does not exist"),
        (["What?", 3], (), "consists of text .* and images .*, got int"),
        ("What?", ["Hello"], r"list of \[query, response\] pairs, got 'Hello'"),
        ("What?", [["Hello", None]], r"pairs, got \['Hello', None\]"),
        ("", (), "the question is empty: .*; give text, or a list of texts and images"),
        ([], [["Hello", "Hi!"]], "the question is empty"),
        ("1" * 3000, (), r"prompt has 30\d\d tokens, and the model reads fewer than 2048"),
    ],
)
def test_a_mistake_is_named(model, query, history, message):
    with pytest.raises(DataError, match=message):
        model.chat(query, history)


def test_a_broken_image_is_named(model, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(BadImage, match=r"broken\.png cannot be read"):
        model.chat(f"<img>{tmp_path / 'broken.png'}</img>What?")


def test_what_asks_for_nothing_is_refused(model, image):
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


def test_an_answer_ends_where_the_positions_do(model):
    with says(model, "yes", ends=False):
        answer, _ = model.chat("1" * 2000, max_new_tokens=100, min_new_tokens=90)
    assert answer.prompt_tokens + answer.new_tokens == 2048


def run_file(path, adapter="Full", **options):
    """A checkpoint of a run whose trained weights are all 0.25, as a file."""
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
    task = build.module(OmegaConf.create({**config, "init": {}}))
    task.configure_model()
    checkpoint = {
        "state_dict": {
            name: torch.full_like(tensor, 0.25) for name, tensor in task.state_dict().items()
        }
    }
    task.on_save_checkpoint(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**checkpoint, "config": config}, path)
    return config


def test_a_run_is_loaded_with_its_weights_and_settings(tmp_path, monkeypatch):
    config = run_file(tmp_path / "outputs/train/mine/checkpoints/best.ckpt")
    (tmp_path / "outputs/train/mine/.hydra").mkdir()
    OmegaConf.save(OmegaConf.create(config), tmp_path / "outputs/train/mine/.hydra/config.yaml")
    monkeypatch.chdir(tmp_path)
    for source in (
        "outputs/train/mine",
        tmp_path / "outputs/train/mine/checkpoints/best.ckpt",
        "latest",
    ):
        model = QwenVL.load(source)
        assert model.model.lm_head.weight.unique().tolist() == [0.25]
        assert not model.model.training
        assert model.generation.max_new_tokens == 3
    assert prompt(model, "x") == f"{START}system\n{END}{START}user\nx{END}{START}assistant\n"
    changed = QwenVL.load("latest", dtype=torch.bfloat16, max_new_tokens=7, seed=1)
    assert changed.model.lm_head.weight.dtype == torch.bfloat16
    assert (changed.generation.max_new_tokens, changed.generation.seed) == (7, 1)


def test_a_refused_value_of_a_run_is_told_as_it_was_refused(tmp_path):
    run_file(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match=r"^dtype is torch's name of .* got 'bf16'$"):
        QwenVL.load(tmp_path / "run.ckpt", dtype="bf16")


def test_a_run_with_adapters_answers(tmp_path, image):
    run_file(tmp_path / "lora.ckpt", "LoRA", rank=2, alpha=4, dropout=0.1, targets="all-linear")
    model = QwenVL.load(tmp_path / "lora.ckpt")
    answer, _ = model.chat([image, "What?"], min_new_tokens=3)
    assert (answer.new_tokens, model.generate([[image, "What?"]], min_new_tokens=3)) == (
        3,
        [answer],
    )
    adapters = [tensor for name, tensor in model.model.named_parameters() if "lora_" in name]
    assert adapters
    assert all((tensor == 0.25).all() for tensor in adapters)


def test_a_model_may_be_spread_or_held_in_few_bits(folder, model, image, monkeypatch):
    spread = QwenVL.load(folder, dtype="float32", device_map="auto", max_memory={"cpu": "1GiB"})
    assert (
        spread.chat([image, "What?"], max_new_tokens=5)[0]
        == model.chat([image, "What?"], max_new_tokens=5)[0]
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # where it is, it needs a GPU
    with pytest.raises(ValueError, match="needs bitsandbytes"):
        QwenVL.load(folder, load_in_4bit=True)


def test_what_cannot_be_loaded_is_named(folder, tmp_path):
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
    for name, message in (
        ("gpu", "is a torch device such as"),
        ("cuda:99", "GPUs here; leave device out"),
    ):
        with pytest.raises(ValueError, match=message):
            QwenVL.load(folder, device=name)
    with pytest.raises(ValueError, match=r"as float32 or bfloat16, got 'int8'"):
        QwenVL.load(folder, dtype="int8")
    with pytest.raises(ValueError, match="either device or device_map"):
        QwenVL.load(folder, device="cpu", device_map="auto")


def test_a_checkpoint_says_by_itself_which_template_it_has(folder, tmp_path):
    assert not QwenVL.load(folder).is_base_model
    copied = tmp_path / "base"
    copied.mkdir()
    for file in folder.iterdir():
        content = (
            file.read_text().replace('"chatml"', '"raw"').encode()
            if file.name == "generation_config.json"
            else file.read_bytes()
        )
        (copied / file.name).write_bytes(content)
    model = QwenVL.load(copied)
    assert model.is_base_model
    assert model.model.lm_head.weight.dtype == torch.bfloat16
