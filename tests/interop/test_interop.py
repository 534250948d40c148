"""Adapters and models are exchanged with transformers 4.37.2 and 4.44.2, peft and ms-swift 2.6.1.

`make test-interop` creates environments of these versions in `.venv-interop` and runs these tests.
The Python code of the published checkpoint is replaced by `remote_code`, which has its modules. If
QWEN_VL_CODE names a folder with the published files, they are used.
"""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from commands import output_of
from make_checkpoint import small_sizes, write_checkpoint
from PIL import Image
from safetensors.torch import load_file

from qwenvl_lit import QwenVL
from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.qwen_vl.image_processing import preprocess

pytestmark = pytest.mark.interop

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".venv-interop"
# Environments, and the versions of peft that each has in folders
STACKS = {
    "transformers-4.37.2": ("0.9.0", "0.10.0", "0.11.1", "0.12.0", "0.13.2"),
    "transformers-4.44.2": ("0.14.0", "0.15.2", "0.16.0", "0.17.1"),
}
VERSIONS = [(stack, peft) for stack, versions in STACKS.items() for peft in versions]
VERSIONS += [("ms-swift-2.6.1", None)]  # its environment has peft 0.12.0
CODE = ("configuration_qwen", "modeling_qwen", "tokenization_qwen", "visual")
CODE += ("qwen_generation_utils",)
# Float32 sums in another order. Logits go up to 11; the largest difference seen is 1.6e-5.
CLOSE = {"atol": 1e-4, "rtol": 0}
IMAGE_TOKENS = 256  # which the original tokenizer writes
STEPS = 10

ADAPTERS = {"swift26": ["adapter=lora_swift26"], "dora": ["adapter=dora"]}
ADAPTERS["resampler"] = ["adapter=lora_all"]
TRAIN = ["model=qwen_vl_chat", "model.path=base", "model.dtype=float32", "strategy=cpu"]
TRAIN += ["data=jsonl", "data.train=rows.jsonl", "data.validation=rows.jsonl", "logger=none"]
TRAIN += ["data.num_workers=0", "trainer.precision=32-true", "trainer.max_steps=3"]
TRAIN += ["trainer.rows_per_step=1", "adapter.rank=4", "adapter.dropout=0"]
TRAIN += ["optim.lr=0.01", "generation.max_new_tokens=2"]
PEFT = {  # arguments of `LoraConfig` in programs of that time
    "c_attn": {"target_modules": ["c_attn"]},
    "finetune.py": {"target_modules": ["c_attn", "attn.c_proj", "w1", "w2"], "r": 16},
    "rslora": {"target_modules": ["c_attn", "w1"], "use_rslora": True},
    "dora": {"target_modules": ["c_attn", "w2"], "use_dora": True},
    "pattern": {"target_modules": r"transformer\.h\.\d+\.(attn|mlp)\.(c_attn|c_proj|w1|w2)"},
    "vision": {"target_modules": ["c_attn", "c_fc", "in_proj", "1.attn.out_proj"]},
}
SWIFT = {  # arguments of `swift sft`
    "default": {},
    "c_attn": {"target_modules": ["c_attn"]},
    "ALL": {"target_modules": ["ALL"]},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "norms": {"modules_to_save": ["LN"]},
    "embeddings": {"target_modules": ["c_attn"], "modules_to_save": ["EMBEDDING"]},
}


@dataclass(frozen=True)
class Results:
    """The folder of what one environment wrote, and the names of the adapters it trained."""

    folder: Path
    trained: list[str]

    def logits(self, name: str) -> torch.Tensor:
        return load_file(self.folder / f"{name}.logits")["logits"]


def add_code(folder: Path) -> None:
    """Copies the Python code that a folder names into it, and changes nothing else."""
    source = Path(os.environ.get("QWEN_VL_CODE", HERE / "remote_code"))
    for name in CODE:
        if (source / f"{name}.py").exists():
            shutil.copy(source / f"{name}.py", folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a base model, and what was trained and exported here."""
    home = tmp_path_factory.mktemp("interop")
    sizes = {**small_sizes(IMAGE_TOKENS), "initializer_range": 0.15}
    model = QwenVLFamily(config=sizes, vocabulary="tiny", seed=3).load()
    write_checkpoint(model, TINY_VOCABULARY, home / "base")
    Image.effect_mandelbrot((40, 30), (-2, -1.5, 1, 1.5), 40).convert("RGB").save(home / "a.png")
    row = {"query": "<img>a.png</img>What is it?", "response": "a red car"}
    (home / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
    for name, choice in ADAPTERS.items():
        output_of(home, "train", *TRAIN, *choice, f"hydra.run.dir={name}")
        export = [f"ckpt={name}", "compare=none"]
        output_of(home, "export", *export, f"out={name}-adapter", "merge=false")
        output_of(home, "export", *export, f"out={name}-merged")
        add_code(home / f"{name}-merged")
    add_code(home / "base")
    return home


@pytest.fixture(scope="module")
def ids(home) -> list[int]:
    """Tokens of a row with an image, whose path is written as the original does."""
    start = QwenVLFamily(path=str(home / "base")).config.visual["image_start_id"]
    path = list(b"a.png")
    span = path + [start + 2] * (IMAGE_TOKENS - len(path))
    return [5, 9, start, *span, start + 1, *range(20, 60)]


def here(network, ids: list[int], home: Path, **more):
    start = 2  # index of <img>
    pixels = preprocess(Image.open(home / "a.png"), 64)[None]
    positions = torch.arange(start + 1, start + 1 + IMAGE_TOKENS)
    ids_BT = torch.tensor([ids])
    return network(input_ids=ids_BT, pixel_values=pixels, vision_positions=positions, **more)


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda pair: f"{pair[0]} {pair[1] or ''}")
def there(request, home, ids) -> Results:
    """Does all jobs in one environment, with one version of peft."""
    stack, peft = request.param
    folder = home / f"{stack}-{peft}"
    folder.mkdir()
    jobs = [{"model": "base", "logits": "base"}]
    for name in ADAPTERS:
        jobs.append({"model": f"{name}-merged", "logits": f"{name}-merged"})
        if name != "resampler":
            adapter = f"{name}-adapter"
            jobs.append({"model": "base", "adapter": adapter, "logits": adapter})
    jobs.append({"model": "base", "adapter": "swift26-adapter", "steps": STEPS, "logits": "more"})
    theirs = SWIFT if peft is None else PEFT
    for name, settings in theirs.items():
        defaults = {} if peft is None else {"r": 4, "lora_alpha": 16, "lora_dropout": 0.0}
        job = {"model": "base", "lora": {**defaults, **settings}, "save": str(folder / name)}
        jobs.append({**job, "steps": STEPS, "logits": name})
    for job in jobs:
        job |= {"ids": ids, "logits": str(folder / f"{job['logits']}.logits")}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = ENVIRONMENTS / stack
    assert (environment / "installed").exists(), "make test-interop creates the environments"
    variables = {"PYTHONPATH": str(environment / f"peft-{peft}"), "OMP_NUM_THREADS": "1"}
    variables |= {"HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1"}
    program = "swift" if peft is None else "peft"
    process = subprocess.run(
        [environment / "bin/python", HERE / "original_stack.py", folder / "jobs.json", program],
        cwd=home,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return Results(folder, list(theirs))


def test_the_base_model_computes_the_same_there(there, home, ids):
    network = QwenVLFamily(path=str(home / "base")).load()
    with torch.no_grad():
        ours = here(network, ids, home).logits
    torch.testing.assert_close(there.logits("base"), ours, **CLOSE)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_what_is_trained_here_computes_the_same_there(kind, name, there, home, ids):
    network = QwenVL.load(home / f"{name}-{kind}", device="cpu", dtype="float32").model
    with torch.no_grad():
        ours = here(network, ids, home).logits
    difference = (there.logits("base") - ours).abs().max()
    assert difference > 0.1, "training changed the answers"
    if (kind, name) != ("adapter", "resampler"):  # has no effect there: see `export`
        torch.testing.assert_close(there.logits(f"{name}-{kind}"), ours, **CLOSE)


def test_what_is_trained_there_computes_the_same_here(there, home, ids):
    for name in there.trained:
        adapter = there.folder / name
        qwen = QwenVL.load(adapter, base_model=str(home / "base"), device="cpu", dtype="float32")
        with torch.no_grad():
            ours = here(qwen.model, ids, home).logits
        assert (there.logits("base") - ours).abs().max() > 0.1, name
        assert (there.logits(name) - ours).abs().max() < CLOSE["atol"], name


def test_training_goes_on_there_as_here(there, home, ids):
    network = QwenVL.load(home / "swift26-adapter", device="cpu", dtype="float32").model.train()
    trained = [tensor for name, tensor in network.named_parameters() if ".lora_" in name]
    for tensor in trained:
        tensor.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for _ in range(STEPS):
        here(network, ids, home, labels=torch.tensor([ids])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        ours = here(network.eval(), ids, home).logits
    torch.testing.assert_close(there.logits("more"), ours, **CLOSE)
