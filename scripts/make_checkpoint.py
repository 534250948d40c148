"""Writes a checkpoint of random weights in the format of the published one.

python scripts/make_checkpoint.py /tmp/random-qwen-vl --size full --device cuda  # 9.66 B, 19.3 GB
python scripts/make_checkpoint.py /tmp/small-qwen-vl --size small    # 0.8 M parameters
python scripts/make_checkpoint.py /tmp/small-qwen-vl --image-tokens 256    # for the original code

Programs can be tried and measured with it in place of the published checkpoint. The original code
loads both sizes once its five Python files are copied into the folder. Its tokenizer writes 256
tokens for an image; a small network has 16, unless --image-tokens says otherwise.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.qwen_vl.export import file_shapes, write_companions, write_weights
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM
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
    state = model.state_dict()
    write_weights(
        lambda name: state[name].cpu(),
        file_shapes(model),
        folder,
        dtype=model.dtype,
        kind=kind,
        shard_bytes=shard_bytes,
    )


def small_sizes(image_tokens: int) -> dict[str, Any]:
    """Returns the sizes of model=qwen_vl_tiny with a width for which the original code works.

    It gives the resampler a head for every 128 channels.
    """
    tiny = OmegaConf.load(config_folder() / "model/qwen_vl_tiny.yaml")
    sizes = OmegaConf.to_container(tiny.config)
    sizes |= {"hidden_size": 128, "kv_channels": 64, "intermediate_size": 512}
    sizes["visual"] |= {"output_dim": 128, "resampler_heads": 1, "n_queries": image_tokens}
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--image-tokens", type=int, default=16, help="of a small network")
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
        options["config"] = small_sizes(arguments.image_tokens)
    model = QwenVLFamily(**options).load(arguments.device)
    write_checkpoint(model, arguments.vocabulary, arguments.folder, kind=arguments.format)


if __name__ == "__main__":
    main()
