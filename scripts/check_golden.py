"""Compare this package with values that the original Qwen-VL-Chat code produced.

    python scripts/check_golden.py tests/golden

One line per case with its largest deviation and what is allowed; the exit status is 1 if a case misses. `CHECKS` says who reads which
file: a check gets its path and yields a `Result` per case.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import DynamicCache
from transformers.utils.logging import disable_progress_bar

from qwenvl_lit.families.qwen_vl import preprocess
from qwenvl_lit.models import QwenVLConfig, QwenVLForCausalLM
from qwenvl_lit.models.language import ntk_alpha, rotary_tables
from qwenvl_lit.models.vision import resize_positions, sine_cosine_positions

# In float32 the original's own results move by 2e-7 with the number of threads and by 1.3e-5 with fused attention (logits go up to 9);
# a tanh GELU already shows as 1.4e-3, another interpolation as more than 1.
LOGITS = 1e-4
LOSS = 1e-5  # relative; gradients too
BFLOAT16_LOGITS = 0.4  # bfloat16 and float32 of the original differ by 0.17
TABLE = 2e-6  # sines and cosines of angles up to 100, in float32


@dataclass(frozen=True)
class Result:
    """The largest deviation of a case, and the largest one allowed."""

    case: str
    deviation: float
    allowed: float = 0

    @property
    def passed(self) -> bool:
        return self.deviation <= self.allowed  # not so for NaN


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest absolute difference; infinite between different shapes. The reference may keep every n-th entry of the last dimension."""
    ours = ours[..., :: max(ours.shape[-1] // theirs.shape[-1], 1)]
    return (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")


# -- model ------------------------------------------------------------------------------------------------------------------------


@cache
def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tiny network's, from `model.safetensors`, or from a packed one: of each tensor all first bytes, then all second bytes, ..."""
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    planes = safetensors.torch.load(lzma.decompress((folder / "model.safetensors.xz").read_bytes()))
    shapes = read(folder / "param_shapes.json")
    return {name: tensor.T.contiguous().view(torch.float32).view(shapes[name]) for name, tensor in planes.items()}


def load(folder: Path, overrides: dict | None = None, dtype: torch.dtype = torch.float32) -> QwenVLForCausalLM:
    """The tiny network, with changes to its `config.json`."""
    config = QwenVLConfig.from_pretrained(folder, **(overrides or {}))
    state = {name: tensor.clone() for name, tensor in weights(folder).items()}
    return QwenVLForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval()


def picture_inputs(folder: Path, images: list[dict], length: int) -> dict[str, torch.Tensor]:
    """`pixel_values` and `vision_positions` of a case's pictures in rows of `length` tokens; nothing if there are none."""
    if not images:
        return {}
    pixels = [preprocess(Image.open(folder / image["file"]), 112) for image in images]
    positions = [image["batch"] * length + torch.arange(image["first_feature"], image["end"]) for image in images]
    return {"pixel_values": torch.stack(pixels), "vision_positions": torch.cat(positions)}


def parameter_shapes(path: Path) -> Iterator[Result]:
    """What `save_pretrained` writes has the original names, shapes and values."""
    with tempfile.TemporaryDirectory() as folder:
        load(path.parent).save_pretrained(folder)
        ours = load_file(Path(folder) / "model.safetensors")
    theirs = weights(path.parent)
    shapes = {name: list(tensor.shape) for name, tensor in ours.items()}
    yield Result("names and shapes", shapes != read(path))
    yield Result("values", max(distance(ours[name], theirs[name]) for name in theirs))


def pixels(path: Path) -> Iterator[Result]:
    """Pixel values at both sizes, and their sums over the whole picture at 448."""
    small = load_file(path.with_name("preprocess_112.safetensors"))
    large = load_file(path.with_name("preprocess_448_stride13.safetensors"))
    for case in read(path)["images"]:
        name = case["file"]
        image = Image.open(path.parent / name)
        full = preprocess(image, 448)
        sum_error = abs(full.double().sum().item() - case["full_448"]["sum"]) / case["full_448"]["abs_sum"]
        yield Result(f"{name} 112", distance(preprocess(image, 112), small[name]))
        yield Result(f"{name} 448", distance(full[:, ::13, ::13], large[name]))
        yield Result(f"{name} 448 sum", sum_error, 1e-7)


def vision(path: Path) -> Iterator[Result]:
    """Every stage of the tower, from pixels to the tokens of a picture."""
    side = int(path.stem.split("_")[1])
    tower = load(path.parent).transformer.visual
    files = [image["file"] for image in read(path.with_name("preprocess.json"))["images"]]
    chosen = {112: files[:2], 224: files[1:2], 448: files[:1]}[side]
    pixel_values = torch.stack([preprocess(Image.open(path.parent / name), side) for name in chosen])

    stages = {"pixel_values": pixel_values}
    modules = {
        "conv1": tower.conv1,
        "ln_pre": tower.ln_pre,
        "resblock_0": tower.transformer["resblocks"][0],
        "resblock_1": tower.transformer["resblocks"][1],
        "transformer": tower.transformer["resblocks"][-1],
        "attn_pool": tower.attn_pool,
        "ln_post": tower.ln_post,
    }
    for name, module in modules.items():
        module.register_forward_hook(lambda module, args, output, name=name: stages.__setitem__(name, output))
    with torch.no_grad():
        stages["output"] = tower(pixel_values)
        stages["conv1"] = stages["conv1"].flatten(2).mT
        patches = stages["ln_pre"].shape[1]
        stages["interpolated_positional_embedding"] = resize_positions(tower.positional_embedding, patches)
        stages["interpolated_attn_pool_pos_embed"] = resize_positions(tower.attn_pool.pos_embed, patches)
    for name, theirs in load_file(path).items():
        yield Result(name, distance(stages[name], theirs), LOGITS)


def fresh_positions(path: Path) -> Iterator[Result]:
    theirs = load_file(path)["attn_pool.pos_embed"]
    yield Result("sine-cosine table", distance(sine_cosine_positions(*theirs.shape), theirs), TABLE)


def cases(path: Path) -> Iterator[Result]:
    """Hidden states, logits, losses and gradients of whole batches."""
    for case in read(path)["cases"]:
        tensors = load_file(path.with_name(case["file"]))
        inputs = {name: tensors[name] for name in ("input_ids", "attention_mask")}
        inputs |= picture_inputs(path.parent, case["images"], inputs["input_ids"].shape[1])
        if case.get("quirk"):
            continue  # what an earlier text left behind in the original; ours keeps nothing
        dtype = getattr(torch, case.get("dtype", "float32"))
        model = load(path.parent, case.get("config_overrides"), dtype=dtype).train(case["mode"] == "train")
        if "prefill" in case:
            yield from compare_decoding(case, tensors, model, inputs)
        else:
            yield from compare_forward(case, tensors, model, inputs)


def compare_forward(case: dict, tensors: dict, model: QwenVLForCausalLM, inputs: dict) -> Iterator[Result]:
    """One forward pass, and the backward pass of training cases."""
    name, allowed = case["name"], BFLOAT16_LOGITS if model.dtype == torch.bfloat16 else LOGITS
    out = model(**inputs, labels=tensors.get("labels"), output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    if "logits" in tensors:
        total = inputs["input_ids"].shape[1]
        positions = tensors.get("logits_positions", torch.arange(total - tensors["logits"].shape[1], total))
        kept = real[:, positions]
        yield Result(f"{name} logits", distance(out.logits[:, positions].float()[kept], tensors["logits"][kept]), allowed)
    hidden = {f"hidden_{i}": states for i, states in enumerate(out.hidden_states)} | {"hidden_last": out.hidden_states[-1]}
    for key in hidden.keys() & tensors.keys():
        yield Result(f"{name} {key}", distance(hidden[key][real], tensors[key][real]), LOGITS)
    if "loss" in tensors:
        yield Result(f"{name} loss", abs(out.loss.item() / tensors["loss"].item() - 1), LOSS)
    if "grad_norms" in case:
        out.loss.backward()
        yield from compare_gradients(case, tensors, model)


def as_in_files(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the original names: in files, the resampler's three input projections are one."""
    tensors, prefix = dict(tensors), "transformer.visual.attn_pool.attn"
    for kind in ("weight", "bias"):
        tensors[f"{prefix}.in_proj_{kind}"] = torch.cat([tensors.pop(f"{prefix}.{part}_proj.{kind}") for part in "qkv"])
    return tensors


def compare_gradients(case: dict, tensors: dict, model: QwenVLForCausalLM) -> Iterator[Result]:
    """Eight gradients entry by entry, the size of all others, and which parameters have none."""
    gradients = as_in_files({name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None})
    for key in (key for key in tensors if key.startswith("grad.")):
        ours, theirs = gradients[key.removeprefix("grad.")], tensors[key]
        yield Result(f"{case['name']} {key}", distance(ours, theirs) / max(theirs.abs().max().item(), 1e-9), LOSS)
    norms = {name: norm for name, norm in case["grad_norms"].items() if norm is not None}
    yield Result(f"{case['name']} parameters with a gradient", len(norms.keys() ^ gradients.keys()))
    errors = [abs(gradients[name].double().norm().item() - norm) / max(norm, 1e-9) for name, norm in norms.items()]
    yield Result(f"{case['name']} gradient norms", max(errors), LOSS)


@torch.no_grad()
def compare_decoding(case: dict, tensors: dict, model: QwenVLForCausalLM, inputs: dict) -> Iterator[Result]:
    """A prompt, then one token a step with the cache: logits of each step, and the cache at the end."""
    cache, ids, mask = DynamicCache(), inputs["input_ids"], inputs["attention_mask"]
    bounds = [0, *range(case["prefill"], ids.shape[1] + 1)]
    steps = [
        model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits[:, -1] for start, stop in pairwise(bounds)
    ]
    yield Result(f"{case['name']} logits", distance(torch.stack(steps, dim=1), tensors["logits"]), LOGITS)
    for part in ("key", "value"):
        if f"{part}_cache_layer0" in tensors:
            ours = getattr(cache.layers[0], f"{part}s").transpose(1, 2)
            yield Result(f"{case['name']} {part}s", distance(ours, tensors[f"{part}_cache_layer0"]), LOGITS)


def generation(path: Path) -> Iterator[Result]:
    """Greedy decoding through `generate`: every token."""
    for case in read(path)["cases"]:
        model = load(path.parent, case["config_overrides"])
        ids, mask = torch.tensor(case["input_ids"]), torch.tensor(case["attention_mask"])
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            **picture_inputs(path.parent, case["images"], ids.shape[1]),
            max_new_tokens=case["max_new_tokens"],
            eos_token_id=case["eos_token_id"],
            pad_token_id=case["pad_token_id"],
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        wrong = 0
        for ours, theirs in zip(out.sequences[:, ids.shape[1] :].tolist(), case["new_tokens"], strict=True):
            theirs = theirs[:-1] if case["stop_words_ids"] else theirs  # the original forces an end mark after a stop word
            wrong += ours[: len(theirs)] != theirs
        yield Result(f"{case['name']} rows with other tokens", wrong)
        if case["first_step_logits"]:
            yield Result(f"{case['name']} first logits", distance(out.logits[0], torch.tensor(case["first_step_logits"])), LOGITS)


def train_steps(path: Path) -> Iterator[Result]:
    """Losses of six AdamW steps, which parameters stayed, and how far some moved."""
    batches = {case["name"]: case for case in read(path.with_name("cases.json"))["cases"]}
    for name, recipe in read(path).items():
        case = batches[recipe["case"]]
        tensors = load_file(path.with_name(case["file"]))
        inputs = {key: tensors[key] for key in ("input_ids", "attention_mask", "labels")}
        inputs |= picture_inputs(path.parent, case["images"], inputs["input_ids"].shape[1])
        model = load(path.parent).train()
        resampler = model.transformer.visual.attn_pool
        if name.startswith("fix_vit"):
            model.transformer.visual.requires_grad_(False)
            resampler.requires_grad_(True)
            resampler.pos_embed.requires_grad_(True)  # the original's script thaws this table too; ours never does
        learned = [tensor for tensor in (*model.parameters(), resampler.pos_embed) if tensor.requires_grad]
        before = {key: tensor.clone() for key, tensor in as_in_files(model.state_dict()).items()}
        optimizer = torch.optim.AdamW(learned, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
        losses = []
        for _ in recipe["losses"]:
            optimizer.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        moved = {key: (tensor - before[key]).norm().item() for key, tensor in as_in_files(model.state_dict()).items()}
        yield Result(f"{name} losses", max(abs(a / b - 1) for a, b in zip(losses, recipe["losses"], strict=True)), 1e-3)
        yield Result(f"{name} unchanged", len({key for key, norm in moved.items() if norm == 0} ^ set(recipe["unchanged"])))
        yield Result(f"{name} changes", max(abs(moved[key] - norm) for key, norm in recipe["change_norm"].items()), 1e-3)


def ntk_alphas(path: Path) -> Iterator[Result]:
    wrong = [case for case in read(path)["cases"] if ntk_alpha(case["kv_seq_len"], case["seq_length"]) != case["ntk_alpha"]]
    yield Result("alpha", len(wrong))


def rotary(path: Path) -> Iterator[Result]:
    """Cosines and sines, by the sizes in their names. The original stores each twice, for the two halves of a head."""
    for name, theirs in load_file(path).items():
        function, dim, base, alpha = re.fullmatch(r"(cos|sin)_dim(\d+)_base(\d+)_alpha(\d+)", name).groups()
        tables = rotary_tables(torch.arange(len(theirs))[None], int(dim), float(base), alpha=int(alpha))
        half = tables[function == "sin"].flatten(0, 3)
        yield Result(name, distance(torch.cat((half, half), dim=1), theirs), TABLE)


def logn(path: Path) -> Iterator[Result]:
    """The queries' scale: at position 0 of every head the cosine of the slowest channel is nearly 1, so it is divided out."""
    theirs = load_file(path)["logn"]
    slots = torch.arange(len(theirs))[None]
    scaled, plain = rotary_tables(slots, 64, 10000.0, logn_above=32)[0][0, :, :, 0, -1].unbind(1)
    yield Result("scale", distance(scaled / plain, theirs), TABLE)


# -- all of a folder --------------------------------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[[Path], Iterator[Result]]] = {
    "model/param_shapes.json": parameter_shapes,
    "model/preprocess.json": pixels,
    "model/vision_*.safetensors": vision,
    "model/init_pos_embed.safetensors": fresh_positions,
    "model/cases.json": cases,
    "model/generation.json": generation,
    "model/train_steps.json": train_steps,
    "model/ntk_alpha.json": ntk_alphas,
    "model/rotary.safetensors": rotary,
    "model/logn_seq32.safetensors": logn,
}


def results(folder: Path, pattern: str) -> Iterator[tuple[str, Result]]:
    """The results of one entry of `CHECKS`, each with the name of its file."""
    for path in sorted(folder.glob(pattern)):
        for result in CHECKS[pattern](path):
            yield path.relative_to(folder).as_posix(), result


def main(folder: Path) -> int:
    """Prints every result and a total; returns how many miss."""
    disable_progress_bar()
    found = []
    for pattern in CHECKS:
        for file, result in results(folder, pattern):
            found.append(result)
            print(f"{'ok  ' if result.passed else 'MISS'} {file}: {result.case}: {result.deviation:.2g} (allowed {result.allowed:.2g})")
    missed = sum(not result.passed for result in found)
    print(f"{len(found) - missed} of {len(found)} agree")
    return missed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    sys.exit(bool(main(parser.parse_args().folder)))
