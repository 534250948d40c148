"""Write a checkpoint of random weights in the layout in which Qwen-VL is published: to try and to measure without the real one.

python scripts/make_checkpoint.py /tmp/random-qwen-vl --size full --device cuda     # 9.66 B parameters, 19.3 GB
python scripts/make_checkpoint.py /tmp/small-qwen-vl --size small                   # the sizes of model=qwen_vl_tiny
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from omegaconf import OmegaConf

from qwenvl_lit.cli.command import config_folder
from qwenvl_lit.models.qwen_vl.export import (
    PUBLISHED_CONFIG,
    write_companions,
    write_json,
    write_weights,
)
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM, file_shapes
from qwenvl_lit.models.qwen_vl.tokenizer import TINY_VOCABULARY


def write_checkpoint(
    model: QwenVLForCausalLM,
    vocabulary: Path,
    folder: Path,
    *,
    kind: str = "bin",
    shard_bytes: int = 2 * 10**9,
) -> None:
    """Everything that the published folder has but the remote code, which its config names; `kind` is "bin" or "safetensors"."""
    folder.mkdir(parents=True)
    dtype = model.dtype
    write_companions(
        folder,
        model.config,
        dtype=str(dtype).removeprefix("torch."),
        vocabulary=vocabulary,
        base=None,
        template="chatml",
    )
    settings = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**settings, "auto_map": PUBLISHED_CONFIG["auto_map"]})
    state = model.state_dict()
    write_weights(
        lambda name: state[name].cpu(),
        file_shapes(model),
        folder,
        dtype=dtype,
        kind=kind,
        shard_bytes=shard_bytes,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--format", choices=("bin", "safetensors"), default="bin")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu", help="where full-size weights are drawn")
    parser.add_argument(
        "--vocabulary",
        type=Path,
        default=TINY_VOCABULARY,
        help="a copy of qwen.tiktoken; default: the demo's",
    )
    arguments = parser.parse_args()
    options = {"vocabulary": str(arguments.vocabulary), "dtype": arguments.dtype}
    if arguments.size == "full":
        family = QwenVLFamily(path="Qwen/Qwen-VL-Chat", weights="random", **options)
    else:
        sizes = OmegaConf.to_container(
            OmegaConf.load(config_folder() / "model/qwen_vl_tiny.yaml").config
        )
        family = QwenVLFamily(config=sizes, **options)
    write_checkpoint(
        family.load(arguments.device), arguments.vocabulary, arguments.folder, kind=arguments.format
    )


if __name__ == "__main__":
    main()
