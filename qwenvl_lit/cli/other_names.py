"""Translates options of ms-swift, LLaMA-Factory, transformers, Lightning and Qwen-VL's scripts.

Error messages suggest the translation. Commands do not accept the foreign names.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from qwenvl_lit.runs.config_folder import config_folder
from qwenvl_lit.runs.model_types import model_arguments, recipe_named

# Commands of ms-swift, LLaMA-Factory and others -> the command here
OTHER_COMMANDS = {
    **dict.fromkeys(("sft", "pt", "pretrain", "finetune", "fine-tune", "fit", "tune"), "train"),
    **dict.fromkeys(("eval", "evaluate", "score", "benchmark"), "test"),
    **dict.fromkeys(("infer", "inference", "generate", "batch-infer"), "predict"),
    **dict.fromkeys(("cli", "talk"), "chat"),
    **dict.fromkeys(("deploy", "api", "server", "webchat", "web-ui", "webui"), "serve"),
    **dict.fromkeys(("app", "app-ui"), "serve"),
    **dict.fromkeys(("merge", "merge-lora", "merge_lora", "convert", "save"), "export"),
    **dict.fromkeys(("validate", "inspect", "lint", "dataset", "data"), "check"),
}
MODEL_PATH = "model.path={}"  # `translate` adds the recipe of the model

WEIGHTS_ALONE = "ckpt=CHECKPOINT"  # `combine` takes the checkpoint of `resume=`
REPOSITORY = "push=OWNER/NAME"  # `combine` takes that of another option

# Foreign option -> argument here. {} stands for the value. An argument without {} is suggested
# unless the value of the option is false.
ARGUMENTS = {
    # optimizer
    "learning_rate": "optim.lr={}",
    "lr": "optim.lr={}",
    "peak_lr": "optim.lr={}",
    "max_lr": "optim.lr={}",
    "vit_lr": "optim.component_lr.vision={}",
    "vision_tower_lr": "optim.component_lr.vision={}",
    "aligner_lr": "optim.component_lr.resampler={}",
    "mm_projector_lr": "optim.component_lr.resampler={}",
    "weight_decay": "optim.weight_decay={}",
    "warmup_ratio": "optim.warmup={}",
    "warmup_steps": "optim.warmup={}",
    "lr_scheduler_type": "optim.schedule={}",
    "lr_scheduler": "optim.schedule={}",
    "scheduler": "optim.schedule={}",
    "adam_beta1": "optim.betas=[{},0.95]",
    "adam_beta2": "optim.betas=[0.9,{}]",
    "adam_epsilon": "optim.eps={}",
    # loop
    "epochs": "trainer.max_epochs={}",
    "num_epochs": "trainer.max_epochs={}",
    "num_train_epochs": "trainer.max_epochs={}",
    "max_epochs": "trainer.max_epochs={}",
    "max_steps": "trainer.max_steps={}",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches={}",
    "accumulate_grad_batches": "trainer.accumulate_grad_batches={}",
    "grad_accum": "trainer.accumulate_grad_batches={}",
    "max_grad_norm": "trainer.gradient_clip_val={}",
    "logging_steps": "trainer.log_every_n_steps={}",
    "eval_steps": "trainer.validate_every={}",
    "val_check_interval": "trainer.validate_every={}",
    "val_interval": "trainer.validate_every={}",
    "eval_interval": "trainer.validate_every={}",
    "check_val_every_n_epoch": "trainer.validate_every={}.0",
    "metric_for_best_model": "callbacks.checkpoint.monitor={}",
    "save_steps": "callbacks.checkpoint.every={}",
    "save_total_limit": "callbacks.checkpoint.keep={}",
    "bf16": "trainer.precision=bf16-mixed",
    "fp16": "trainer.precision=16-mixed model.dtype=float16",
    "precision": "trainer.precision={}",
    "devices": "trainer.devices={}",
    "gpus": "trainer.devices={}",
    "nproc_per_node": "strategy=ddp trainer.devices={}",
    "num_nodes": "strategy=multi_node trainer.num_nodes={}",
    "nnodes": "strategy=multi_node trainer.num_nodes={}",
    "deepspeed": "strategy=fsdp",
    "fsdp": "strategy=fsdp",
    "gradient_checkpointing": "speed.checkpointing=full",
    "disable_gradient_checkpointing": "speed.checkpointing=none",
    "torch_compile": "speed=compiled",
    "report_to": "logger={}",
    "output_dir": "hydra.run.dir={}",
    "logging_dir": "hydra.run.dir={}",
    "result_dir": "hydra.run.dir={}",
    "run_dir": "hydra.run.dir={}",
    "resume_from_checkpoint": "resume={}",
    "resume_only_model": WEIGHTS_ALONE,
    "random_seed": "seed={}",
    # data
    "batch_size": "data.batch_size={}",
    "micro_batch_size": "data.batch_size={}",
    "train_batch_size": "data.batch_size={}",
    "per_device_train_batch_size": "data.batch_size={}",
    "eval_batch_size": "data.eval_batch_size={}",
    "per_device_eval_batch_size": "data.eval_batch_size={}",
    "num_workers": "data.num_workers={}",
    "dataloader_num_workers": "data.num_workers={}",
    "group_by_length": "data.group_by_length=true",
    "packing": "data.packing=true",
    "neat_packing": "data.packing=true",
    "preprocessing_num_workers": "data.num_workers={}",
    "dataset_num_proc": "data.num_workers={}",
    "dataset_dir": "data.root={}",
    "media_dir": "data.root={}",
    "image_dir": "data.root={}",
    "image_folder": "data.root={}",
    "image_root": "data.root={}",
    "data_root": "data.root={}",
    "dataset": "data={}",
    "train_dataset": "data={}",
    "train_data": "data={}",
    "dataset_name": "data={}",
    "dataset_path": "data=jsonl data.train={}",
    "train_file": "data=jsonl data.train={}",
    "data_path": "data=jsonl data.train={}",
    "custom_train_dataset_path": "data=jsonl data.train={}",
    "val_dataset": "data.validation={}",
    "eval_dataset": "data.validation={}",
    "val_size": "data.validation={}",
    "test_dataset": "data.test={}",
    "validation_file": "data.validation={}",
    "eval_data_path": "data.validation={}",
    "custom_val_dataset_path": "data.validation={}",
    "dataset_test_ratio": "data.validation={}",
    "split_dataset_ratio": "data.validation={}",
    "max_samples": "data.train=FILE#{}",
    "dataset_seed": "data.seed={}",
    "data_seed": "data.seed={}",
    # model and adapter
    "min_pixels": "model.min_pixels={}",
    "max_pixels": "model.max_pixels={}",
    "image_min_pixels": "model.min_pixels={}",
    "image_max_pixels": "model.max_pixels={}",
    "model_type": "model={}",
    "model_id_or_path": MODEL_PATH,
    "model_name_or_path": MODEL_PATH,
    "model_path": MODEL_PATH,
    "checkpoint_path": MODEL_PATH,
    "model_name": "model={}",
    "model": "model={}",
    "system": "model.system={}",
    "default_system": "model.system={}",
    "template": "model.template={}",
    "template_type": "model.template={}",
    "max_length": "model.max_length={}",
    "max_seq_length": "model.max_length={}",
    "max_seq_len": "model.max_length={}",
    "cutoff_len": "model.max_length={}",
    "cutoff_length": "model.max_length={}",
    "model_max_length": "model.max_length={}",
    "torch_dtype": "model.dtype={}",
    "dtype": "model.dtype={}",
    "device_map": "model.device_map={}",
    "truncation_strategy": "model.too_long={}",
    "sft_type": "adapter={}",
    "train_type": "adapter={}",
    "tuner_type": "adapter={}",
    "finetuning_type": "adapter={}",
    "adapters": "ckpt={}",
    "adapter_name_or_path": "ckpt={}",
    "resume_from_adapter": "ckpt={}",
    "use_lora": "adapter=lora",
    "lora_enable": "adapter=lora",
    "q_lora": "adapter=qlora",
    "use_dora": "adapter=dora",
    "use_rslora": "adapter=rslora",
    "quantization_bit": "adapter=qlora",
    "quant_bits": "adapter=qlora",
    "load_in_4bit": "adapter=qlora",
    "freeze_vision_tower": "adapter=freeze_vision",
    "freeze_vit": "adapter=freeze_vision",
    "fix_vit": "adapter=freeze_vision",
    "lora_rank": "adapter.rank={}",
    "lora_r": "adapter.rank={}",
    "lora_alpha": "adapter.alpha={}",
    "lora_dropout": "adapter.dropout={}",
    "lora_dropout_p": "adapter.dropout={}",
    "lora_target_modules": "adapter.targets={}",
    "lora_target": "adapter.targets={}",
    "target_regex": "adapter.targets={}",
    "pissa_init": "adapter.options.init_lora_weights=pissa",
    "init_lora_weights": "adapter.options.init_lora_weights={}",
    "target_modules": "adapter.targets={}",
    # answers
    "max_new_tokens": "generation.max_new_tokens={}",
    "min_new_tokens": "generation.min_new_tokens={}",
    "do_sample": "generation.do_sample=true",
    "temperature": "generation.temperature={}",
    "top_p": "generation.top_p={}",
    "top_k": "generation.top_k={}",
    "num_beams": "generation.num_beams={}",
    "repetition_penalty": "generation.repetition_penalty={}",
    "length_penalty": "generation.length_penalty={}",
}
# Options for what happens here by default.
NEEDLESS = (
    *("do_train", "do_eval", "do_predict", "plot_loss", "load_best_model_at_end"),
    *("trust_remote_code", "use_fast_tokenizer", "lazy_tokenize", "lazy_preprocess"),
    *("remove_unused_columns", "overwrite_output_dir", "overwrite_cache", "use_hf"),
    *("attn_impl", "flash_attn", "use_flash_attn", "eval_strategy", "save_strategy"),
    *("ddp_timeout", "save_only_model", "compute_accuracy", "logging_strategy", "infer_backend"),
    *("export_size", "export_device", "export_legacy_format", "freeze_multi_modal_projector"),
    *("create_new_adapter", "tokenized_path", "cache_dir", "predict_with_generate"),
)
# Entries that replace or extend `ARGUMENTS` for test, predict, chat, serve and export.
ARGUMENTS_WITH_RUN = {
    "ckpt_dir": "ckpt={}",
    "ckpt_path": "ckpt={}",
    "checkpoint": "ckpt={}",
    "checkpoint_path": "ckpt={}",
    "resume_from_checkpoint": "ckpt={}",
    "query": "prompt={}",
    "question": "prompt={}",
    "images": "image={}",
    "load_in_4bit": "model.load_in_4bit=true",
    "quantization_bit": "model.load_in_4bit=true",
    "dataset": "data={}",
    "val_dataset": "data=jsonl data.test={}",
    "test_file": "data=jsonl data.test={}",
    "eval_dataset": "data=jsonl data.test={}",
    "test_dataset": "data=jsonl data.test={}",
    "dataset_path": "data=jsonl data.test={}",
    "data_path": "data=jsonl data.test={}",
    "input_file": "data=jsonl data.test={}",
    "eval_batch_size": "data.eval_batch_size={}",
    "custom_val_dataset_path": "data=jsonl data.test={}",
    "batch_size": "data.eval_batch_size={}",
}
EXPORT_ARGUMENTS = {
    "output_dir": "out={}",
    "save_path": "out={}",
    "torch_dtype": "dtype={}",
    "export_dir": "out={}",
    "merge_lora": "merge=true",
    "hub_model_id": "push={}",
    "push_to_hub": REPOSITORY,
}
OF_COMMANDS = {  # further entries, by command
    "export": EXPORT_ARGUMENTS,
    "chat": {"system": "system={}"},
    "serve": {
        "host": "serve.host={}",
        "server_name": "serve.host={}",
        "port": "serve.port={}",
        "server_port": "serve.port={}",
        "served_model_name": "serve.name={}",
        "max_model_len": "serve.context={}",
        "max_num_seqs": "serve.rows={}",
        "allowed_media_domains": "serve.allowed_hosts={}",
        "api_key": "serve.keys=FILE",
        "tensor_parallel_size": "engine=vllm vllm.tensor_parallel_size={}",
        "pipeline_parallel_size": "engine=vllm vllm.pipeline_parallel_size={}",
        "data_parallel_size": "engine=vllm vllm.data_parallel_size={}",
        "gpu_memory_utilization": "engine=vllm vllm.gpu_memory_utilization={}",
        "lora_modules": "adapters='{{NAME: FOLDER}}' engine=vllm",
    },
}
# Templates of models that have one alone
OTHER_TEMPLATES = ("template=qwen2_vl", "template=qwen2_5_vl", "template=qwen3_vl")
OTHER_TEMPLATES += ("template=qwen3_vl_nothink",)
# Options whose value needs a translation, too: NAME=VALUE -> argument. These come first.
VALUES = {
    "lora_target_modules=ALL": "adapter=lora_all",
    "target_modules=ALL": "adapter=lora_all",
    "lora_target_modules=DEFAULT": "adapter=lora",
    "lora_target=all": "adapter=lora_all",
    "target_modules=all-linear": "adapter=lora_all",
    "lora_target_modules=all-linear": "adapter=lora_all",
    "stage=sft": "",
    "eval_strategy=no": "trainer.limit_val_batches=0",
    "template=qwen": "model.template=chatml",
    "template=qwen_vl": "model.template=chatml",
    "template=qwen-vl": "model.template=chatml",
    **dict.fromkeys(OTHER_TEMPLATES, ""),
    **dict.fromkeys(("model_type=qwen2_5_vl", "model_type=qwen3_vl"), ""),  # config.json says it
    "template=default-generation": "model.template=raw",
    "resume_from_checkpoint=true": "resume=latest",
    "resume_from_checkpoint=false": "",
    "resume_from_checkpoint=null": "",
    "truncation_strategy=delete": "model.too_long=drop",
    "truncation_strategy=left": "model.too_long=truncate_left",
    "truncation_strategy=raise": "model.too_long=error",
    "report_to=none": "logger=none",
    "optim=adamw_torch": "",
    "optim=adamw_torch_fused": "",
    "optim=adamw_hf": "",
}
FALSE = ("false", "no", "0")


def translate(command: str, name: str, values: Sequence[str] = ()) -> str | None:
    """Returns the arguments here that correspond to an option of another program.

    Returns None if the option is unknown, and "" if no argument is needed, since it is switched off
    or the default here.

    Raises:
        DataError: the option names a model that is not read.

    >>> translate("train", "num_train_epochs", ["3"])
    'trainer.max_epochs=3'
    """
    trains = command in ("train", "check")
    name, value = name.replace("-", "_"), value_from(values)
    arguments = ARGUMENTS if trains else ARGUMENTS | ARGUMENTS_WITH_RUN
    arguments = arguments | OF_COMMANDS.get(command, {})
    if f"{name}={value}" in VALUES:
        meant = VALUES[f"{name}={value}"]
        return meant if trains else meant.replace("resume=", "ckpt=")
    if name == "resume_from_checkpoint" and (Path(value) / "adapter_config.json").is_file():
        return f"ckpt={value}"  # an adapter alone has no state of an optimizer to resume
    if name in NEEDLESS:
        return ""
    template = arguments.get(name)
    if template is None:
        return None
    if "{}" not in template and value.lower() in FALSE:
        return ""
    if template == "data={}" and value != "..." and not _is_choice("data", value):
        template = "data=jsonl data.train={}" if trains else "data=jsonl data.test={}"
        value = value if re.search(r"\.(jsonl?|csv|tsv)\b", value) else "FILE"
    elif template == MODEL_PATH or (template == "model={}" and "/" in value):
        return model_arguments(value)
    elif template == "model={}" and not _is_choice("model", value):
        return f"model={recipe_named(value) or value.replace('-', '_')}"
    elif template == "trainer.max_epochs={}":
        value = _whole(value)
    elif template in ("model={}", "data={}", "adapter={}"):
        value = value.partition("#")[0].replace("-", "_")
    return template.format(value)


def _is_choice(group: str, name: str) -> bool:
    """Whether `name`, perhaps with a number of rows, is a file of a group of conf/."""
    choice = name.partition("#")[0].replace("-", "_")
    return (config_folder() / group / f"{choice}.yaml").exists()


def _whole(number: str) -> str:
    """Rounds a number of epochs up, since trainer.max_epochs is a whole number."""
    return str(math.ceil(float(number))) if re.fullmatch(r"\d+\.\d*", number) else number


def combine(translations: Iterable[str]) -> list[str]:
    """Combines options that were translated one by one: each key and each choice occurs once.

    Other programs choose an adapter by several options, of which the most specific one counts.

    >>> combine(["adapter=lora", "optim.lr=1", "adapter=lora_all", "adapter=qlora"])
    ['adapter=qlora', 'optim.lr=1', 'adapter.targets=all-linear']
    """
    values: dict[str, str] = {}
    adapters: list[str] = []
    for translation in translations:
        for argument in re.split(r" (?=[\w.]+=)", translation):
            key, _, value = argument.partition("=")
            if argument in (WEIGHTS_ALONE, REPOSITORY) and key in values:
                continue
            values[key] = value
            if key == "adapter":
                adapters.append(value)
    if f"ckpt={values.get('ckpt')}" == WEIGHTS_ALONE and "resume" in values:
        values["ckpt"] = values.pop("resume")
    if adapters:
        values["adapter"] = _combine_adapters(adapters)
    if "lora_all" in adapters and "freeze_vision" in adapters:
        values.setdefault("adapter.targets", "language")
    elif "lora_all" in adapters and values["adapter"] != "lora_all":
        values.setdefault("adapter.targets", "all-linear")
    return [f"{key}={value}" for key, value in values.items()]


def _combine_adapters(adapters: Sequence[str]) -> str:
    """Returns the most specific one of several adapters; LoRA freezes the vision tower too."""
    general = ["lora_all", "lora", "freeze_vision", "full"]
    special = [name for name in adapters if name not in general]
    return [*special, *(name for name in general if name in adapters)][0]


def value_from(values: Sequence[str]) -> str:
    """Formats the values of an option as that of a key: `a`, `[a,b]`, or `...` for none."""
    if not values:
        return "..."
    value = values[0] if len(values) == 1 else f"[{','.join(values)}]"
    return shlex.quote(value) if " " in value else value
