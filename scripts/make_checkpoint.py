"""Writes a checkpoint of random weights in the format of the published one.

python scripts/make_checkpoint.py /tmp/random-qwen-vl --size full --device cuda  # 9.66 B, 19.3 GB
python scripts/make_checkpoint.py /tmp/small-qwen-vl --size small    # sizes of model=qwen_vl_tiny

Programs can be tried and measured with it in place of the published checkpoint.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from omegaconf import OmegaConf

from qwenvl_lit.models.qwen_vl.export import (
    PUBLISHED_CONFIG,
    write_companions,
    write_json,
    write_weights,
)
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM, file_shapes
from qwenvl_lit.models.qwen_vl.tokenizer import TINY_VOCABULARY
from qwenvl_lit.runs.run import config_folder


def write_checkpoint(
    model: QwenVLForCausalLM,
    vocabulary: Path,
    folder: Path,
    *,
    kind: str = "bin",
    shard_bytes: int = 2 * 10**9,
) -> None:
    """Writes all files of the published folder except the remote code, which its config names.

    Args:
        kind: of the weight files, "bin" or "safetensors".
    """
    folder.mkdir(parents=True)
    write_companions(
        folder,
        model.config,
        dtype=str(model.dtype).removeprefix("torch."),
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
        dtype=model.dtype,
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
    parser.add_argument("--device", default="cpu", help="where full-size weights are made")
    parser.add_argument(
        "--vocabulary",
        type=Path,
        default=TINY_VOCABULARY,
        help="a copy of qwen.tiktoken; default: the demo's",
    )
    arguments = parser.parse_args()
    options = {"vocabulary": str(arguments.vocabulary), "dtype": arguments.dtype}
    if arguments.size == "full":
        options |= {"path": "Qwen/Qwen-VL-Chat", "weights": "random"}
    else:
        tiny = OmegaConf.load(config_folder() / "model/qwen_vl_tiny.yaml")
        options["config"] = OmegaConf.to_container(tiny.config)
    model = QwenVLFamily(**options).load(arguments.device)
    write_checkpoint(model, arguments.vocabulary, arguments.folder, kind=arguments.format)


if __name__ == "__main__":
    main()
