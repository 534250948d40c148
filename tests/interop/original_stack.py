"""Runs jobs in the environment of the original stack, where this package cannot be imported.

The arguments are a JSON file with a list of jobs, which are done in turn, and the program that
handles adapters: peft or swift. A job has

    model     the folder of a full model, with the Python code that it names
    ids       the tokens of a row
    logits    the file for its logits
    adapter   an adapter folder to load, if any
    lora      settings of a new adapter, if any: arguments of `LoraConfig`, or those of swift sft
    steps     the number of AdamW steps to train the adapter
    save      the folder to write it to
"""

import json
import sys
import warnings

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

LEARNING_RATE = 1e-3


def load_with_peft(model, adapter):
    model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    stored = load_file(f"{adapter}/adapter_model.safetensors").keys()
    here = peft.get_peft_model_state_dict(model).keys()
    assert stored == here, f"not of both: {sorted(stored ^ here)}"
    return model


def add_with_peft(model, job):
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **job["lora"]))


def load_with_swift(model, adapter):
    from swift.tuners import Swift

    return Swift.from_pretrained(model, adapter, is_trainable=True)


def add_with_swift(model, job):
    """Adds an adapter as `swift sft` does."""
    from swift.llm import SftArguments
    from swift.llm.tuner import prepare_model

    arguments = {"model_type": "qwen-vl-chat", "model_id_or_path": job["model"], "dtype": "fp32"}
    arguments |= {"dataset": ["rows.jsonl"], "output_dir": f"{job['save']}-output", **job["lora"]}
    model, _ = prepare_model(model, SftArguments(**arguments))
    return model


PROGRAMS = {"peft": (load_with_peft, add_with_peft), "swift": (load_with_swift, add_with_swift)}


def run(job, load, add):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], trust_remote_code=True, torch_dtype=torch.float32
    )
    if "adapter" in job:
        model = load(model, job["adapter"])
    elif "lora" in job:
        model = add(model, job)
    ids = torch.tensor([job["ids"]])
    train(model.train(), ids, job.get("steps", 0))
    with torch.no_grad():
        save_file({"logits": model.eval()(input_ids=ids).logits}, job["logits"])
    if "save" in job:
        model.save_pretrained(job["save"])


def train(model, ids, steps):
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    for model in sorted({job["model"] for job in jobs}):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
        assert type(tokenizer).__name__ == "QWenTokenizer"
        assert tokenizer("hi")["input_ids"]
    for job in jobs:
        run(job, *PROGRAMS[sys.argv[2]])
