"""The network: its files, pixels, the tower, logits, losses, gradients, decoding."""

from __future__ import annotations

import hashlib
import lzma
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import pairwise, takewhile
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import DynamicCache

from parity import reasons
from parity.result import Result, UnreadableError, distance, read, same, tensors_of, worst
from qwenvl_lit.generation.generation import Generation
from qwenvl_lit.models.qwen_vl.config import QwenVLConfig
from qwenvl_lit.models.qwen_vl.dynamic_ntk import ntk_alpha
from qwenvl_lit.models.qwen_vl.image_processing import preprocess
from qwenvl_lit.models.qwen_vl.language import rotary_tables
from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM
from qwenvl_lit.models.qwen_vl.vision import resize_positions, sine_cosine_positions

# In float32 the original's own results move by 2e-7 with the number of threads and by 1.3e-5 with
# fused attention (logits go up to 9). A tanh GELU gives 1.4e-3, another interpolation more than 1.
LOGITS = 1e-4
LOSS = 1e-5  # relative; of gradients too
MOVED = 1e-4  # of the norms of the changes by six steps, which are about 1
BFLOAT16_LOGITS = 0.4  # bfloat16 and float32 of the original differ by 0.17
TABLE = 2e-6  # sines and cosines of angles up to 100, in float32


@cache
def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Reads the weights of the tiny network, which may be packed.

    A packed tensor has all first bytes of its values, then all second bytes, ...
    """
    if not (folder / "model.safetensors.xz").exists():
        return tensors_of(folder / "model.safetensors")
    try:
        planes = safetensors.torch.load(
            lzma.decompress((folder / "model.safetensors.xz").read_bytes())
        )
    except (lzma.LZMAError, SafetensorError) as error:
        raise UnreadableError(f"model.safetensors.xz cannot be unpacked: {error}") from None
    shapes = read(folder / "param_shapes.json")
    return {
        name: tensor.T.contiguous().view(torch.float32).view(shapes[name])
        for name, tensor in planes.items()
    }


def load(
    folder: Path, overrides: dict | None = None, dtype: torch.dtype = torch.float32
) -> QwenVLForCausalLM:
    """Loads the tiny network, with changes to its `config.json`."""
    config = QwenVLConfig.from_pretrained(folder, **(overrides or {}))
    state = {name: tensor.clone() for name, tensor in weights(folder).items()}
    return QwenVLForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype
    ).eval()


@cache
def saved(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors that `save_pretrained` writes of the loaded network."""
    with tempfile.TemporaryDirectory() as written:
        load(folder).save_pretrained(written)
        tensors = tensors_of(Path(written) / "model.safetensors")
        return {name: tensor.clone() for name, tensor in tensors.items()}


def parameter_shapes(path: Path) -> Iterator[Result]:
    theirs = read(path)
    ours = {name: list(tensor.shape) for name, tensor in saved(path.parent).items()}
    for name in theirs | ours:
        yield same(name, "names and shapes", ours.get(name), theirs.get(name))


def parameters(path: Path) -> Iterator[Result]:
    """Compares the weights after they were loaded and saved again."""
    ours = saved(path.parent)
    for name, theirs in weights(path.parent).items():
        yield Result(case=name, of="parameters", deviation=distance(ours[name], theirs))


# -- images ---------------------------------------------------------------------------------------


def images(path: Path) -> Iterator[Result]:
    """Compares size, mode and RGB bytes of every image, and the sum of its pixel values at 448."""
    for case in read(path)["images"]:
        name = case["file"]
        image = Image.open(path.parent / name)
        rgb = hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
        ours = {
            "mode": image.mode,
            "size": list(image.size),
            "exif_orientation": image.getexif().get(0x0112),
            "rgb_sha256": rgb,
        }
        yield same(name, "RGB bytes", ours, {key: case[key] for key in ours})
        full, theirs = preprocess(image, 448), case["full_448"]
        yield same(name, "shape", list(full.shape), theirs["shape"])
        error = abs(full.double().sum().item() - theirs["sum"]) / theirs["abs_sum"]
        yield Result(case=name, of="sum of pixels (relative)", deviation=error, allowed=1e-7)


def pixels(path: Path) -> Iterator[Result]:
    """Compares pixel values at 112, or every 13th in both directions at 448."""
    side = int(path.stem.split("_")[1])
    for name, theirs in tensors_of(path).items():
        ours = preprocess(Image.open(path.parent / name), side)
        ours = ours[:, ::13, ::13] if side == 448 else ours
        yield Result(case=name, of="pixels", deviation=distance(ours, theirs))


def vision(path: Path) -> Iterator[Result]:
    """Compares every stage of the tower, from pixels to the tokens of an image."""
    side = int(path.stem.split("_")[1])
    tower = load(path.parent).transformer.visual
    files = [image["file"] for image in read(path.with_name("preprocess.json"))["images"]]
    chosen = {112: files[:2], 224: files[1:2], 448: files[:1]}[side]
    pixel_values = torch.stack(
        [preprocess(Image.open(path.parent / name), side) for name in chosen]
    )

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
        module.register_forward_hook(
            lambda module, args, output, name=name: stages.__setitem__(name, output)
        )
    with torch.no_grad():
        stages["output"] = tower(pixel_values)
        stages["conv1"] = stages["conv1"].flatten(2).mT
        patches = stages["ln_pre"].shape[1]
        stages["interpolated_positional_embedding"] = resize_positions(
            tower.positional_embedding, patches
        )
        stages["interpolated_attn_pool_pos_embed"] = resize_positions(
            tower.attn_pool.pos_embed, patches
        )
    for name, theirs in tensors_of(path).items():
        exact = name == "pixel_values"
        of = "pixels" if exact else "stages of the tower"
        deviation, allowed = distance(stages[name], theirs), 0 if exact else LOGITS
        yield Result(case=name, of=of, deviation=deviation, allowed=allowed)


# -- batches --------------------------------------------------------------------------------------


def image_inputs(folder: Path, images: list[dict], length: int) -> dict[str, torch.Tensor]:
    """Returns `pixel_values` and `vision_positions` of a case's images, if it has any.

    Args:
        length: tokens of a row.
    """
    if not images:
        return {}
    pixel_values, positions = [], []
    for image in images:
        pixel_values.append(preprocess(Image.open(folder / image["file"]), 112))
        in_row = torch.arange(image["first_feature"], image["end"])
        positions.append(image["batch"] * length + in_row)
    return {"pixel_values": torch.stack(pixel_values), "vision_positions": torch.cat(positions)}


def case_list(path: Path) -> Iterator[Result]:
    """Compares the tensors in the file of each case, and alpha, with those that the list names."""
    data = read(path)
    for case in data["cases"]:
        tensors = tensors_of(path.with_name(case["file"]))
        kinds = {}
        for name, tensor in tensors.items():
            kinds[name] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        yield same(case["name"], "names and shapes", kinds, case.get("tensors", kinds))
        if "ntk_alpha" in case:
            length = case.get("prefill", tensors["input_ids"].shape[1])
            alpha = float(ntk_alpha(length, case["config_overrides"]["seq_length"]))
            yield same(case["name"], "alpha", alpha, case["ntk_alpha"])
    model, ids = load(path.parent), tensors_of(path.with_name("case_text.safetensors"))["input_ids"]
    with torch.no_grad():
        moved = distance(model(ids).logits, model(ids, attention_mask=torch.ones_like(ids)).logits)
    theirs = data["no_attention_mask_vs_all_ones_max_abs_diff"]
    yield Result(case="without a mask", of="logits", deviation=abs(moved - theirs), allowed=LOGITS)


def batch(path: Path) -> Iterator[Result]:
    """Compares every recorded tensor of a case.

    These are hidden states, logits, loss and gradients, or the steps of decoding.
    """
    listed = {case["file"]: case for case in read(path.with_name("cases.json"))["cases"]}
    if path.name not in listed:
        raise UnreadableError("cases.json does not name it")
    case, tensors = listed[path.name], tensors_of(path)
    inputs = {name: tensors[name] for name in ("input_ids", "attention_mask")}
    inputs |= image_inputs(path.parent, case["images"], inputs["input_ids"].shape[1])
    dtype = getattr(torch, case.get("dtype", "float32"))
    model = load(path.parent, case.get("config_overrides"), dtype=dtype).train(
        case["mode"] == "train"
    )
    compare = compare_decoding if "prefill" in case else compare_forward
    if case.get("quirk"):
        unaffected = path.with_name(path.name.replace("_after_long_eval", ""))
        compare = partial(compare_quirk, unaffected=unaffected)
    given = {"input_ids", "attention_mask", "labels", "logits_positions"}
    seen = set()
    for key, result in compare(case, tensors, model, inputs):
        seen.add(key)
        yield result
    if left := sorted(tensors.keys() - given - seen):
        yield same(case["name"], "tensors, without a comparison", left, [])


# Results with the name of the recorded tensor.
Compared = Iterator[tuple[str | None, Result]]


def compare_forward(case: dict, tensors: dict, model: QwenVLForCausalLM, inputs: dict) -> Compared:
    """Compares a forward pass, and the backward pass of training cases."""
    name, allowed = case["name"], BFLOAT16_LOGITS if model.dtype == torch.bfloat16 else LOGITS
    with torch.set_grad_enabled("grad_norms" in case):
        out = model(**inputs, labels=tensors.get("labels"), output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    if "logits" in tensors:
        total = inputs["input_ids"].shape[1]
        positions = tensors.get(
            "logits_positions", torch.arange(total - tensors["logits"].shape[1], total)
        )
        kept = real[:, positions]
        error = distance(out.logits[:, positions].float()[kept], tensors["logits"][kept])
        of = f"{case.get('dtype', '')} logits".strip()
        yield "logits", Result(case=name, of=of, deviation=error, allowed=allowed)
    hidden = {f"hidden_{i}": states for i, states in enumerate(out.hidden_states)}
    hidden["hidden_last"] = out.hidden_states[-1]
    for key in hidden.keys() & tensors.keys():
        error = distance(hidden[key][real], tensors[key][real])
        yield key, Result(case=name, of="hidden states", deviation=error, allowed=LOGITS)
    if "loss" in tensors:
        for theirs in (tensors["loss"].item(), case["loss"]):
            error = abs(out.loss.item() / theirs - 1)
            yield "loss", Result(case=name, of="loss (relative)", deviation=error, allowed=LOSS)
    if "grad_norms" in case:
        out.loss.backward()
        yield from compare_gradients(case, tensors, model)


def as_in_files(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames tensors as in files, where the resampler's three input projections are one."""
    tensors, prefix = dict(tensors), "transformer.visual.attn_pool.attn"
    for kind in ("weight", "bias"):
        projections = [tensors.pop(f"{prefix}.{part}_proj.{kind}") for part in "qkv"]
        tensors[f"{prefix}.in_proj_{kind}"] = torch.cat(projections)
    return tensors


def compare_gradients(case: dict, tensors: dict, model: QwenVLForCausalLM) -> Compared:
    """Compares eight gradients, the norms of all others, and which parameters have none."""
    of, name = "gradients (relative)", case["name"]
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    gradients = as_in_files(gradients)
    for key in (key for key in tensors if key.startswith("grad.")):
        ours, theirs = gradients[key.removeprefix("grad.")], tensors[key]
        error = distance(ours, theirs) / max(theirs.abs().max().item(), 1e-9)
        yield key, Result(case=name, of=of, deviation=error, allowed=LOSS)
    norms = {name: norm for name, norm in case["grad_norms"].items() if norm is not None}
    yield None, same(name, "parameters with a gradient", sorted(gradients), sorted(norms))
    errors = []
    for key, norm in norms.items():
        errors.append(abs(gradients[key].double().norm().item() - norm) / max(norm, 1e-9))
    yield None, Result(case=name, of=of, deviation=worst(errors), allowed=LOSS)
    placeholder = gradients["transformer.wte.weight"][model.config.visual["image_start_id"] + 2]
    is_zero, expected = not placeholder.any().item(), case["wte_grad_zero_rows_of_image_tokens"]
    yield None, same(name, "no gradient at image tokens", is_zero, expected)


@torch.no_grad()
def compare_decoding(case: dict, tensors: dict, model: QwenVLForCausalLM, inputs: dict) -> Compared:
    """Compares a prompt and then one token a step with the cache.

    The logits of each step are compared, and the cache at the end.
    """
    cache, ids, mask = DynamicCache(), inputs["input_ids"], inputs["attention_mask"]
    bounds = [0, *range(case["prefill"], ids.shape[1] + 1)]
    steps = []
    for start, stop in pairwise(bounds):
        seen = mask[:, :stop]
        output = model(ids[:, start:stop], attention_mask=seen, past_key_values=cache)
        steps.append(output.logits[:, -1])
    error = distance(torch.stack(steps, dim=1), tensors["logits"])
    yield "logits", Result(case=case["name"], of="logits", deviation=error, allowed=LOGITS)
    for part in ("key", "value"):
        key = f"{part}_cache_layer0"
        if key in tensors:
            ours = getattr(cache.layers[0], f"{part}s").transpose(1, 2)
            error, of = distance(ours, tensors[key]), "keys and values"
            yield key, Result(case=case["name"], of=of, deviation=error, allowed=LOGITS)


@torch.no_grad()
def compare_quirk(
    case: dict, tensors: dict, model: QwenVLForCausalLM, inputs: dict, unaffected: Path
) -> Compared:
    """Compares training after a long text in evaluation mode.

    The original keeps the alpha of that text. Ours gives the logits that `unaffected` holds.
    """
    model.eval()(**inputs)
    logits = model.train()(**inputs).logits
    as_without = distance(logits, tensors_of(unaffected)["logits"]) <= LOGITS
    result = Result(
        case=case["name"],
        of="logits",
        deviation=distance(logits[:, -tensors["logits"].shape[1] :], tensors["logits"]),
        allowed=LOGITS,
        ours={"logits of": unaffected.name if as_without else "neither"},
        reason=reasons.NO_MEMORY if as_without else None,
    )
    yield "logits", result


# -- decoding and training ------------------------------------------------------------------------


def before_stop(ids: Iterable[int], stops: Collection[int]) -> list[int]:
    return list(takewhile(lambda token_id: token_id not in stops, ids))


def before_word(ids: list[int], words: Sequence[list[int]]) -> list[int]:
    """Returns ids without the stop word with which they end, if they do."""
    ends = [len(word) for word in words if ids[-len(word) :] == word]
    return ids[: -max(ends)] if ends else ids


def generation(path: Path) -> Iterator[Result]:
    """Compares greedy decoding through `generate`.

    Every token up to the end is compared, the five likeliest of each step, and the first logits.
    """
    for case in read(path)["cases"]:
        model = load(path.parent, case["config_overrides"])
        ids, mask = torch.tensor(case["input_ids"]), torch.tensor(case["attention_mask"])
        words = case["stop_words_ids"] or []
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs |= image_inputs(path.parent, case["images"], ids.shape[1])
        out = model.generate(
            **inputs,
            max_new_tokens=case["max_new_tokens"],
            eos_token_id=case["eos_token_id"],
            pad_token_id=case["pad_token_id"],
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        # After a stop word the original forces an <|endoftext|>. Our answers end before the word.
        generate = Generation(max_new_tokens=case["max_new_tokens"], stop_words_ids=words)
        eos = case["eos_token_id"]
        ours = generate(model, inputs, stop_ids=[eos], pad_id=case["pad_token_id"])
        theirs = [before_word(before_stop(row, {eos}), words) for row in case["new_tokens"]]
        yield same(case["name"], "ids", ours, theirs)
        steps = min(map(len, (*ours, *theirs)))
        best = [logits.topk(5).indices.tolist() for logits in out.logits[:steps]]
        yield same(case["name"], "the five likeliest ids", best, case["top5_ids_per_step"][:steps])
        if case["first_step_logits"]:
            error = distance(out.logits[0], torch.tensor(case["first_step_logits"]))
            yield Result(case=case["name"], of="logits", deviation=error, allowed=LOGITS)


def train_steps(path: Path) -> Iterator[Result]:
    """Compares six AdamW steps: losses, unchanged parameters, and how far some parameters move."""
    batches = {case["name"]: case for case in read(path.with_name("cases.json"))["cases"]}
    for name, recipe in read(path).items():
        case = batches[recipe["case"]]
        tensors = tensors_of(path.with_name(case["file"]))
        inputs = {key: tensors[key] for key in ("input_ids", "attention_mask", "labels")}
        inputs |= image_inputs(path.parent, case["images"], inputs["input_ids"].shape[1])
        model = load(path.parent).train()
        resampler = model.transformer.visual.attn_pool
        if name.startswith("fix_vit"):
            model.transformer.visual.requires_grad_(False)
            resampler.requires_grad_(True)
            # The original's script also trains this table; ours never does.
            resampler.pos_embed.requires_grad_(True)
        candidates = (*model.parameters(), resampler.pos_embed)
        trained = [tensor for tensor in candidates if tensor.requires_grad]
        before = {key: tensor.clone() for key, tensor in as_in_files(model.state_dict()).items()}
        optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
        errors = []
        for theirs in recipe["losses"]:
            optimizer.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            errors.append(abs(loss.item() - theirs) / max(theirs, 1))
        moved = {}
        for key, tensor in as_in_files(model.state_dict()).items():
            moved[key] = (tensor - before[key]).norm().item()
        # A loss is a difference of logits of about 10. Below 1 its rounding error does not shrink
        # with it (the sixth loss is 0.002).
        of = "losses (relative to max(1, loss))"
        yield Result(case=name, of=of, deviation=worst(errors), allowed=LOSS)
        unchanged = sorted(key for key, norm in moved.items() if norm == 0)
        yield same(name, "unchanged parameters", unchanged, sorted(recipe["unchanged"]))
        change = worst(abs(moved[key] - norm) for key, norm in recipe["change_norm"].items())
        yield Result(case=name, of="norm of changes", deviation=change, allowed=MOVED)


# -- tables ---------------------------------------------------------------------------------------


def fresh_positions(path: Path) -> Iterator[Result]:
    for name, theirs in tensors_of(path).items():
        error = distance(sine_cosine_positions(*theirs.shape), theirs)
        yield Result(case=name, of="position table", deviation=error, allowed=TABLE)


def ntk_alphas(path: Path) -> Iterator[Result]:
    for case in read(path)["cases"]:
        ours = ntk_alpha(case["kv_seq_len"], case["seq_length"])
        name = f"{case['kv_seq_len']} of {case['seq_length']}"
        yield same(name, "alpha", ours, case["ntk_alpha"])


def rotary(path: Path) -> Iterator[Result]:
    """Compares cosines and sines, with the sizes that are in their names.

    The original stores each twice, for the two halves of a head.
    """
    for name, theirs in tensors_of(path).items():
        function, dim, base, alpha = re.fullmatch(
            r"(cos|sin)_dim(\d+)_base(\d+)_alpha(\d+)", name
        ).groups()
        slots = torch.arange(len(theirs))[None]
        tables = rotary_tables(slots, int(dim), float(base), alpha=int(alpha))
        half = tables[function == "sin"].flatten(0, 3)
        error = distance(torch.cat((half, half), dim=1), theirs)
        yield Result(case=name, of="table", deviation=error, allowed=TABLE)


def logn(path: Path) -> Iterator[Result]:
    """Compares the log-n scale of queries.

    The cosine of the slowest channel, nearly 1, is divided out.
    """
    for name, theirs in tensors_of(path).items():
        slots = torch.arange(len(theirs))[None]
        cosines, _ = rotary_tables(slots, 64, 10000.0, logn_above=32)
        scaled, plain = cosines[0, :, :, 0, -1].unbind(1)
        error = distance(scaled / plain, theirs)
        yield Result(case=name, of="table", deviation=error, allowed=TABLE)


CHECKS = {
    "model/param_shapes.json": parameter_shapes,
    "model/model.safetensors*": parameters,
    "model/preprocess.json": images,
    "model/preprocess_*.safetensors": pixels,
    "model/vision_*.safetensors": vision,
    "model/cases.json": case_list,
    "model/case_*.safetensors": batch,
    "model/generation.json": generation,
    "model/train_steps.json": train_steps,
    "model/init_pos_embed.safetensors": fresh_positions,
    "model/ntk_alpha.json": ntk_alphas,
    "model/rotary.safetensors": rotary,
    "model/logn_seq32.safetensors": logn,
}
