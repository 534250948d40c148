import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from qwenvl_lit.cli.overrides import paths_of, quote_free_text, unquote, value_of


def parsed(argument: str):
    """The value of an argument as Hydra reads it."""
    [override] = OverridesParser.create().parse_overrides([argument])
    return override.value()


TEXT_KEYS = ("prompt", "system", "model.system", "data.prompt", "data.user_agent")


@pytest.mark.parametrize(
    "text",
    [
        "What's in it?",
        "a, b (c) x=3",
        "这是什么？",
        "back\\slash",
        "ends in \\",
        "quote at end'",
        "\\'",
        "${paths.run}",
        'Find <ref>the "man"</ref>',
        "two\nlines",
        "  spaces  ",
        "outputs/epoch=1-step=3.ckpt",
        "null and void",
        "3 cats",
        "42",
        "3.5",
        "-1",
        "1e5",
        "true",
        "{x}",
        "{image}{question} Answer:",
        "[1,2,3]",
        "[a, b",
        "'Hello' and 'goodbye'",
        '"quoted"',
        "",
    ],
)
@pytest.mark.parametrize("key", [*TEXT_KEYS, "data.datasets.a.prompt"])
def test_text_is_read_as_typed(text, key):
    quoted = quote_free_text(f"{key}={text}")
    assert OmegaConf.create({"text": parsed(quoted)}).text == text
    assert quote_free_text(quoted) == quoted  # other ranks of a run get the quoted arguments


def test_text_in_single_quotes_is_read_without_them_as_hydra_does():
    assert parsed(quote_free_text("prompt='null'")) == "null"
    assert parsed(quote_free_text("prompt=null")) is None


def test_a_regular_expression_is_read_as_typed():
    targets = r"transformer\.h\.[01]\.(attn\.c_attn|mlp\.w1)"
    assert parsed(quote_free_text(f"adapter.targets={targets}")) == targets


def test_lists_of_files_are_read_as_typed():
    quoted = quote_free_text("data.train=[one.jsonl#200, it's (two).jsonl,'a,b.jsonl']")
    assert parsed(quoted) == ["one.jsonl#200", "it's (two).jsonl", "a,b.jsonl"]
    assert quote_free_text(quoted) == quoted


def test_names_in_lists_may_have_quotes():
    for key, name in (("data.special_tokens", "<|extra_0|>"), ("adapter.targets", "mlp.w1")):
        for typed in (f"[{name}]", f"['{name}']", f'["{name}"]'):
            assert parsed(quote_free_text(f"{key}={typed}")) == [name]


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("benchmarks=null", None),
        ("benchmarks=refcoco/val#50", ["refcoco/val#50"]),
        ("adapter.freeze=vision", ["vision"]),
        ("serve.allowed_hosts=images.example.com:8080", ["images.example.com:8080"]),
        ("vllm.arguments=--seed=7", ["--seed=7"]),
        ("vllm.arguments=[--seed,7]", ["--seed", 7]),
        ("adapter.train=[vision,head]", ["vision", "head"]),
    ],
)
def test_a_single_value_of_a_list_needs_no_brackets(argument, values):
    quoted = quote_free_text(argument)
    assert parsed(quoted) == values
    assert quote_free_text(quoted) == quoted


def test_model_keys_that_the_config_of_a_run_may_lack_are_added():
    quoted = quote_free_text("model.load_in_4bit=true")
    assert quoted == quote_free_text(quoted) == "++model.load_in_4bit=true"


@pytest.mark.parametrize(
    "argument",
    [
        "adapter.options={init_lora_weights: pissa}",
        "adapter.options.init_lora_weights=pissa",
        "optim.component_lr={vision: 1e-5}",
        "optim.component_lr.vision=1e-5",
    ],
)
def test_keys_of_mappings_whose_keys_the_user_chooses_are_added(argument):
    quoted = quote_free_text(argument)
    assert quoted == quote_free_text(quoted) == f"++{argument}"


def test_other_keys_are_left_to_hydra():
    for argument in (
        "optim.lr=1e-4,5e-5",
        "prompt=null",
        "data.test={easy: {nested: a.jsonl}}",
        "data.validation=0.01",
        "--help",
        "~callbacks.samples",
    ):
        assert quote_free_text(argument) == argument


def test_the_last_value_of_a_key_counts():
    arguments = ["ckpt=a", "ckpt='b c'", "resume=null", "seed=1"]
    assert value_of(arguments, "ckpt") == "b c"
    assert value_of(arguments, "resume") is None
    assert value_of(arguments, "out") is None


PATHS = [
    "~/x",
    "/models/a=b,c (d) [e]",
    "[v1]",
    "{v1}",
    "2024",
    "epoch=1-step=3.ckpt",
    "it's",
    "ends in \\",
    "\\'",
    "${HOME}/x",
    'the "new" one',
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "key",
    [
        "model.path",
        "model.vocabulary",
        "data.root",
        "data.cache",
        "data.datasets.mine.root",
        "hydra.run.dir",
        "hydra.sweep.dir",
        "paths.cache",
        "ckpt",
        "answered",
        "predictions",
        "resume",
        "out",
    ],
)
def test_every_path_is_free_text_in_which_the_home_folder_is_expanded(key, path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    quoted = quote_free_text(f"{key}={path}")
    expected = path.replace("~", "/home/me")
    assert OmegaConf.create({"path": parsed(quoted)}).path == expected
    assert value_of([quoted], key) == unquote(quoted.partition("=")[2]) == expected
    assert quote_free_text(quoted) == quoted


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("data.train=[~/a.jsonl#3,b=1.jsonl]", ["/home/me/a.jsonl#3", "b=1.jsonl"]),
        ("image=[~/a.png,'b, c.png']", ["/home/me/a.png", "b, c.png"]),
        ("compare=[~/a,~/b]", ["/home/me/a", "/home/me/b"]),
        ("data.test={x: ~/a=1.jsonl, y: [~/b,(c)]}", ["/home/me/a=1.jsonl", "/home/me/b", "(c)"]),
        ("data.test.x=~/a=1.jsonl", ["/home/me/a=1.jsonl"]),
        ("data.validation=~/a.jsonl", ["/home/me/a.jsonl"]),
        ("data.validation=1e-2", []),
        ("data.train=null", []),
    ],
)
def test_paths_in_lists_and_named_sets_are_free_text_too(argument, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    quoted = quote_free_text(argument)
    assert paths_of([quoted], argument.partition("=")[0]) == expected
    assert quote_free_text(quoted) == quoted
    paths = str(OmegaConf.create({"value": parsed(quoted)}).value)
    assert all(path in paths for path in expected)


def test_a_folder_of_configs_may_be_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert quote_free_text("--config-dir=~/conf") == "--config-dir=/home/me/conf"


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        (r"{C:\data: /mnt/data}", {r"C:\data": "/mnt/data"}),
        (r"{C:/data: ~/data}", {"C:/data": "/home/me/data"}),
        (r"{\\server\share (1): /mnt/a=b}", {r"\\server\share (1)": "/mnt/a=b"}),
        (r"{sub\: sub, D:\x:/y}", {"sub\\": "sub", r"D:\x": "/y"}),
        ("{http://host/a: /mnt, /data/coco:/mnt/coco}", {"http://host/a": "/mnt"}),
        ("{data: ''}", {"data": ""}),
        ("{data: .}", {"data": "."}),
    ],
)
def test_beginnings_of_paths_are_read_as_typed_drives_and_backslashes_too(
    mapping, expected, monkeypatch
):
    monkeypatch.setenv("HOME", "/home/me")
    quoted = quote_free_text(f"data.path_map={mapping}")
    assert parsed(quoted).items() >= expected.items()
    assert quote_free_text(quoted) == quoted
