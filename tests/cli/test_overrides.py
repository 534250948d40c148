import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from qwenvl_lit.cli.overrides import quote_free_text, value_of


def parsed(argument: str):
    """The value of an argument as Hydra reads it."""
    [override] = OverridesParser.create().parse_overrides([argument])
    return override.value()


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
    ],
)
def test_free_text_is_read_as_typed(text):
    quoted = quote_free_text(f"prompt={text}")
    assert OmegaConf.create({"prompt": parsed(quoted)}).prompt == text
    assert quote_free_text(quoted) == quoted  # other ranks of a run get the quoted arguments


def test_a_regular_expression_is_read_as_typed():
    targets = r"transformer\.h\.[01]\.(attn\.c_attn|mlp\.w1)"
    assert parsed(quote_free_text(f"adapter.targets={targets}")) == targets


def test_lists_of_files_are_read_as_typed():
    quoted = quote_free_text("data.train=[one.jsonl#200, it's (two).jsonl,'a,b.jsonl']")
    assert parsed(quoted) == ["one.jsonl#200", "it's (two).jsonl", "a,b.jsonl"]
    assert quote_free_text(quoted) == quoted


def test_model_keys_that_the_config_of_a_run_may_lack_are_added():
    quoted = quote_free_text("model.load_in_4bit=true")
    assert quoted == quote_free_text(quoted) == "++model.load_in_4bit=true"


def test_other_keys_are_left_to_hydra():
    for argument in (
        "optim.lr=1e-4,5e-5",
        "data.test={easy: a.jsonl}",
        "prompt=null",
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
