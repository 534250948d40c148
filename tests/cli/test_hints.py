"""Messages for keys and options that do not exist. No process is started."""

import re

import pytest
from commands import compose_config
from hydra.errors import ConfigCompositionException, OverrideParseException
from omegaconf import OmegaConf

from qwenvl_lit.cli import other_names
from qwenvl_lit.cli.command import prepare
from qwenvl_lit.cli.hints import explain, refuse_options, refuse_unread_keys
from qwenvl_lit.cli.other_names import translate
from qwenvl_lit.cli.overrides import quote_free_text
from qwenvl_lit.runs.run import config_folder
from qwenvl_lit.types import DataError


def message(*arguments: str, command: str = "train") -> str:
    """What a user reads who trains with these arguments."""
    with pytest.raises((ConfigCompositionException, OverrideParseException)) as raised:
        compose_config(command, *map(quote_free_text, arguments))
    return explain(command, arguments, raised.value)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["trainer.max_setps=3"], "; did you mean trainer.max_steps or trainer.max_epochs?"),
        (["data=jsonl", "data.batchsize=3"], "; did you mean data.batch_size or data.eval_batch"),
        (["modle=qwen_vl"], "; did you mean model?"),
        (["seed.x=3"], "; seed is a value and has no keys"),
        (["paths.folder=x"], "; paths has run, cache"),
        (["something=3"], "; see python -m qwenvl_lit.train --help"),
        (
            ["adapter.rank=4"],
            " with the choices made here; adapter=dora, adapter=lora, adapter=lora_all, "
            "adapter=lora_language, adapter=lora_official, adapter=lora_swift26, adapter=qlora, "
            "adapter=rslora have it",
        ),
        (
            ["model=qwen3_vl_tiny", "model.template=raw"],
            " with the choices made here; model=qwen_14b, model=qwen_14b_chat, model=qwen_1_8b, "
            "model=qwen_1_8b_chat, model=qwen_7b, model=qwen_7b_chat, model=qwen_tiny, "
            "model=qwen_vl, model=qwen_vl_chat, model=qwen_vl_chat_int4, model=qwen_vl_tiny, "
            "model=seeclick have it",
        ),
        (["model=qwen_vl_tiny", "model.max_pixels=9"], " with the choices made here; model=qwen2"),
        (["answered=x"], "; it is a key of predict"),
        (
            ["callbacks=[train,early_stopping]", "callbacks.early_stopping.verbose=true"],
            "; callbacks.early_stopping has monitor, mode, patience, min_delta, "
            "stopping_threshold, divergence_threshold, check_finite, check_on_train_epoch_end; "
            "+callbacks.early_stopping.verbose=... passes a further argument to "
            "lightning.pytorch.callbacks.EarlyStopping",
        ),
        (["learning_rate=1e-4"], "; here it is optim.lr=1e-4"),
        (["lr=1e-4"], "; here it is optim.lr=1e-4"),
        (["system=Be brief."], "; here it is model.system='Be brief.'"),
        (["optim.learning_rate=1e-4"], "; here it is optim.lr=1e-4"),
        (["optim.lr=1", "epochs=3"], "; here it is trainer.max_epochs=3"),
        (["batch_size=2"], "; here it is data.batch_size=2"),
        (["max_length=1024"], "; here it is model.max_length=1024"),
        (["dataset=coco-en-mini"], "; here it is data=coco_en_mini"),
        (["val_check_interval=0.5"], "; here it is trainer.validate_every=0.5"),
        (["trainer.check_val_every_n_epoch=2"], "; here it is trainer.validate_every=2.0"),
        (["adapters=out"], "; here it is ckpt=out"),
        (["limit_val_batches=2"], "; did you mean trainer.limit_val_batches?"),
    ],
)
def test_an_unknown_key_gets_the_key_that_was_meant(arguments, hint):
    *_, argument = arguments
    key = argument.partition("=")[0]
    assert message(*arguments).startswith(f"there is no key {key!r}{hint}")


def test_all_unknown_keys_of_a_command_line_are_named():
    assert message("lr=1e-4", "seed=2", "data.train=a", "epochs=3", "modle=x", "+a=1") == (
        "there is no key 'lr'; here it is optim.lr=1e-4; "
        "there is no key 'epochs'; here it is trainer.max_epochs=3; "
        "there is no key 'modle'; did you mean model?"
    )


@pytest.mark.parametrize(
    ("command", "typed", "meant"),
    [
        ("train", "--learning_rate 1e-4", "optim.lr=1e-4"),
        ("train", "--learning-rate=1e-4", "optim.lr=1e-4"),
        ("train", "-lr 1e-4 seed=1", "optim.lr=1e-4"),
        (
            "train",
            "--model_type qwen-vl-chat --dataset coco-en-mini#2000 --num_train_epochs 3",
            "model=qwen_vl_chat data=coco_en_mini trainer.max_epochs=3",
        ),
        ("train", "--dataset a.jsonl#9 b.jsonl", "data=jsonl data.train=[a.jsonl#9,b.jsonl]"),
        ("train", "--lora_target_modules ALL --lora_rank 4", "adapter=lora_all adapter.rank=4"),
        ("train", "--bf16 true --fp16 false --seed 3", "trainer.precision=bf16-mixed seed=3"),
        ("train", "--optim.lr 1e-4 --model qwen_vl", "optim.lr=1e-4 model=qwen_vl"),
        ("train", "--load_in_4bit", "adapter=qlora"),
        (
            "train",
            "--model Qwen/Qwen-VL-Chat --dataset a.tsv --eval_steps 50",
            "model=qwen_vl_chat data=jsonl data.train=a.tsv trainer.validate_every=50",
        ),
        (
            "train",
            "--stage sft --do_train --finetuning_type lora --cutoff_len 9 --num_train_epochs 3.0",
            "adapter=lora model.max_length=9 trainer.max_epochs=3 here; nothing is needed for "
            "--stage, --do_train;",
        ),
        (
            "train",
            "--model Qwen/Qwen2.5-VL-7B-Instruct --model_type qwen2_5_vl",
            "model=qwen2_5_vl_7b here",
        ),
        (
            "train",
            "--model_name_or_path Qwen/Qwen3-VL-8B-Thinking --template qwen3_vl --max_pixels 9",
            "model=qwen3_vl_8b model.path=Qwen/Qwen3-VL-8B-Thinking model.max_pixels=9 here",
        ),
        ("train", "--model_type qwen2_5-vl-3b-instruct --tuner_type lora", "model=qwen2_5_vl_3b "),
        ("train", "--adapters a --check_val_every_n_epoch 2", "ckpt=a trainer.validate_every=2.0"),
        ("chat", "--adapters a --model qwen-vl", "ckpt=a model=qwen_vl"),
        ("predict", "--load_in_4bit", "model.load_in_4bit=true"),
        (
            "predict",
            "--ckpt_dir out --val_dataset b.jsonl",
            "ckpt=out data=jsonl data.test=b.jsonl",
        ),
        ("test", "--resume_from_checkpoint out", "ckpt=out"),
        ("chat", "--temperature 0.3 --max_new_tokens", "generation.temperature=0.3 generation.max"),
        ("export", "--ckpt_dir a --output_dir b", "ckpt=a out=b"),
    ],
)
def test_options_of_other_programs_are_answered_with_the_arguments_here(command, typed, meant):
    with pytest.raises(DataError, match=r"^arguments are written as key=value") as raised:
        refuse_options(command, typed.split())
    text = str(raised.value)
    assert f" is {meant}" in text
    assert text.endswith(f" see python -m qwenvl_lit.{command} --help")
    assert "nothing here stands for" not in text


@pytest.mark.parametrize(
    ("command", "option", "value", "meant"),
    [
        ("train", "resume_from_checkpoint", "true", "resume=latest"),
        ("predict", "resume_from_checkpoint", "true", "ckpt=latest"),
        ("train", "num_train_epochs", "3.0", "trainer.max_epochs=3"),
        ("train", "num_train_epochs", "2.5", "trainer.max_epochs=3"),
        ("train", "dataset", "mllm_demo", "data=jsonl data.train=FILE"),
        ("test", "dataset", "mllm_demo", "data=jsonl data.test=FILE"),
        ("train", "template", "qwen_vl", "model.template=chatml"),
        ("train", "freeze_vision_tower", "true", "adapter=freeze_vision"),
        ("train", "freeze_vision_tower", "false", ""),
        ("train", "finetuning_type", "full", "adapter=full"),
        ("train", "max_samples", "500", "data.train=FILE#500"),
        ("train", "pissa_init", "true", "adapter.options.init_lora_weights=pissa"),
        ("train", "optim", "adamw_torch", ""),
        ("train", "dataset_dir", "data", "data.root=data"),
        ("chat", "adapter_name_or_path", "saves/x", "ckpt=saves/x"),
        ("export", "export_dir", "models/x", "out=models/x"),
    ],
)
def test_options_are_translated_to_arguments_that_work(command, option, value, meant):
    assert translate(command, option, [value]) == meant


@pytest.mark.parametrize(
    ("options", "combined"),
    [
        ("--finetuning_type lora --lora_target all", "adapter=lora_all"),
        ("--lora_target all --finetuning_type lora --use_dora true", "adapter=dora "),
        ("--quantization_bit 4 --lora_target all", "adapter=qlora adapter.targets=all-linear"),
        ("--lora_target all --freeze_vision_tower true", "adapter=lora_all adapter.targets=lang"),
        ("--finetuning_type lora --freeze_vision_tower true", "adapter=lora"),
        ("--finetuning_type full --freeze_vision_tower true", "adapter=freeze_vision"),
        ("--lora_target w1 w2 --use_dora true", "adapter.targets=[w1,w2] adapter=dora"),
    ],
)
def test_several_options_become_one_choice_of_an_adapter(options, combined):
    with pytest.raises(DataError) as raised:
        refuse_options("train", options.split())
    assert f" is {combined}" in str(raised.value)
    assert str(raised.value).count(" adapter=") == 1


def test_an_option_that_nothing_stands_for_is_named():
    with pytest.raises(
        DataError, match=r"--turbo 9 --lr 1 is optim\.lr=1 here; nothing here stand"
    ):
        refuse_options("train", ["--turbo", "9", "--lr", "1"])


def test_flags_of_hydra_are_no_options_of_other_programs():
    for arguments in (
        ["--help"],
        ["--cfg", "job", "--resolve"],
        ["-m", "seed=1,2"],
        ["--multi", "seed=1,2"],
        ["--config-dir=mine", "--info", "plugins"],
        ["-cd", "mine", "data.test=-x", "~callbacks.samples"],
    ):
        refuse_options("train", arguments)


@pytest.mark.parametrize(
    ("command", "argument", "text"),
    [
        (
            "train",
            "model=qwen-vl-chat",
            "there is no model=qwen-vl-chat; did you mean model=qwen_",
        ),
        (
            "train",
            "data=coco",
            "there is no data=coco; did you mean data=coco_en? the choices ",
        ),
        ("train", "metrics=[caption,foo]", "there is no metrics=foo; the choices are caption, c"),
        ("train", "adapter=", "there is no adapter=; the choices are dora, "),
        (
            "train",
            "model=Qwen/Qwen-VL",
            "there is no model=Qwen/Qwen-VL; a path is given as model=qwen_vl; the choices are ",
        ),
        (
            "train",
            "model=Qwen/Qwen3-VL-30B-A3B-Instruct",
            "Qwen/Qwen3-VL-30B-A3B-Instruct is not read",
        ),
        (
            "train",
            "model_name_or_path=Qwen/Qwen2-VL-7B-Instruct",
            "Qwen/Qwen2-VL-7B-Instruct is not",
        ),
        ("train", "+seed=3", "seed is a key already; to change it, leave out the + before it"),
        ("train", "+data=jsonl", "data has a choice already; to change it, leave out the +"),
        ("train", "adapter=lora,full", "adapter=lora,full has several values: adapter=[lora,full]"),
        ("train", "seed={", "seed={ cannot be read; in single quotes, a value is taken as text"),
    ],
)
def test_a_choice_that_does_not_exist_is_answered_in_a_line(command, argument, text):
    explained = message(argument, command=command)
    assert explained.startswith(text)
    assert "\n" not in explained


@pytest.mark.parametrize(
    ("command", "argument", "meant"),
    [
        ("train", "data=a.jsonl", "a path is given as data=jsonl data.train=a.jsonl"),
        ("test", "data=a.parquet", "a path is given as data=jsonl data.test=a.parquet"),
        ("train", "data=hf://a/b:c", "a path is given as data=jsonl data.train=hf://a/b:c"),
        ("check", "data=a.csv#5", "a path is given as data=jsonl data.train=a.csv#5"),
        ("test", "data=[a.jsonl,b.jsonl]", "data=jsonl data.test=[a.jsonl,b.jsonl]"),
        ("test", "model=~/full", "a path is given as model=qwen_vl_chat model.path=~/full"),
        ("predict", "model=./mine", "a path is given as ckpt=./mine"),
        ("chat", "adapter=/out/adapter", "a path is given as ckpt=/out/adapter"),
        ("train", "metrics=null", "metrics=null is no choice; the choices are caption, "),
    ],
)
def test_a_path_instead_of_a_choice_gets_the_arguments_for_it(
    command, argument, meant, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/.hydra").mkdir(parents=True)
    (tmp_path / "mine/.hydra/config.yaml").touch()
    with pytest.raises(DataError) as raised:
        prepare(command, [argument])
    assert meant in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["+lr=3"], "there is no key 'lr'; here it is optim.lr=3"),
        (["++epochs=3"], "there is no key 'epochs'; here it is trainer.max_epochs=3"),
        (["+sed=3"], "there is no key 'sed'; did you mean seed or speed?"),
        (["+memory.token=3"], "there is no key 'memory.token'; did you mean memory.tokens"),
        (["+paths.mine=x"], "there is no key 'paths.mine'; paths has run, cache"),
    ],
)
def test_an_added_key_that_nothing_reads_is_refused(arguments, text):
    with pytest.raises(DataError, match=re.escape(text)):
        refuse_unread_keys("train", arguments)


def test_an_added_key_that_something_reads_is_taken(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file.yaml").write_text("path: ${corpus}/x")
    folder = f"--config-dir={tmp_path}"
    for arguments in (
        ["+peak=3", "optim.lr=${peak}"],
        ["+corpus=/data", folder],
        ["+mine=file", folder],
        ["++seed=3"],
        ["+data.prepare.train=5", "+metrics.own._target_=x.Y", "+hydra.job.env_set.A=1"],
        ["+experiment=swift_lora"],
    ):
        refuse_unread_keys("train", arguments)


def all_arguments() -> list[str]:
    """Each key or choice that a message may name."""
    templates = [
        *other_names.ARGUMENTS.values(),
        *other_names.ARGUMENTS_WITH_RUN.values(),
        *other_names.EXPORT_ARGUMENTS.values(),
        *other_names.VALUES.values(),
    ]
    return sorted({argument for template in templates for argument in template.split()})


def test_every_argument_that_a_message_names_exists():
    folder = config_folder()
    # Chat and export have few keys of their own; the others are in one of these configs.
    configs = [
        compose_config("train", "model=qwen_vl_chat", "data=jsonl", "strategy=multi_node"),
        compose_config("train", "model=qwen3_vl_8b"),
        OmegaConf.load(folder / "predict.yaml"),
        OmegaConf.load(folder / "export.yaml"),
    ]
    for argument in all_arguments():
        key, _, value = argument.partition("=")
        if (folder / key).is_dir():
            assert value == "{}" or (folder / key / f"{value}.yaml").exists(), argument
            continue
        found = [OmegaConf.select(config, key, default="absent") for config in configs]
        in_mapping = key.startswith(("optim.component_lr.", "adapter.options.", "hydra."))
        assert in_mapping or set(map(str, found)) != {"absent"}, argument


def test_a_name_without_a_counterpart_is_not_translated():
    assert translate("train", "turbo", ["3"]) is None
    assert translate("train", "lr") == "optim.lr=..."
    assert translate("predict", "query", ["What is it?"]) == "prompt='What is it?'"
