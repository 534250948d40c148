"""Fine-tuning methods: each decides which tensors of a model are trained."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import nn

from qwenvl_lit.models.components import network_of
from qwenvl_lit.settings import check_settings
from qwenvl_lit.training.adapters.patterns import check_speed, check_syntax
from qwenvl_lit.value_types import brief, matches, type_name

if TYPE_CHECKING:
    from qwenvl_lit.models.protocols import Family

log = logging.getLogger(__name__)

# Targets that adapt a smaller share of the weights of all linear layers are probably a mistake: the
# `c_attn` layers alone have 18 %, those of the resampler 0.8 %.
SMALL_SHARE = 0.02
ADAPTED = ".base_layer"  # peft's name of the layer inside its adapter
# Initializations that leave the base weights as they are. Others, such as PiSSA and OLoRA, subtract
# the initial adapter from them, and EVA needs data.
INITIALIZATIONS = (True, False, "gaussian", "orthogonal")
# Settings of peft's `LoraConfig` that make sense for `LoRA.options`, with their types. The others
# are set by `LoRA` itself, or are for other models. The Megatron settings would let a config make
# peft import any module.
PEFT_OPTIONS: Mapping[str, Any] = {
    "alpha_pattern": dict[str, float],
    "bias": Literal["none", "all", "lora_only"],
    "ensure_weight_tying": bool,
    "exclude_modules": str | list[str],
    "fan_in_fan_out": bool,
    "init_lora_weights": bool | str,
    "layer_replication": list[tuple[int, int]],
    "layers_pattern": str | list[str],
    "layers_to_transform": int | list[int],
    "lora_bias": bool,
    "modules_to_save": list[str],
    "qalora_group_size": int,
    "rank_pattern": dict[str, int],
    "target_parameters": list[str],
    "trainable_token_indices": list[int] | dict[str, list[int]],
    "use_dora": bool,
    "use_qalora": bool,
    "use_rslora": bool,
}


class Adapter(Protocol):
    """A fine-tuning method: prepares a loaded model for training, and merges what was trained."""

    trains_base_weights: bool
    """Whether training changes base weights, which is impossible if they are quantized."""

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """Settings of transformers' `BitsAndBytesConfig` for the base weights, or None."""
        ...

    def apply(self, model: nn.Module, family: Family) -> nn.Module:
        """Returns the model to train, in which exactly the trained tensors require gradients.

        Args:
            model: the network that `family` loaded; it is changed in place.

        Raises:
            ValueError: the method names a component or a target that the model does not have.
        """
        ...

    def merge(self, model: nn.Module) -> nn.Module:
        """Merges what was trained and returns a model of the original class."""
        ...


class Full:
    """Trains all tensors except those of frozen components.

    Tensors that the network itself never trains, such as position tables, stay frozen.

    Args:
        freeze: components ("vision", "resampler", "language", "embeddings", "head"), or "all".
        train: components inside frozen ones that are trained nevertheless.
            `freeze=["vision"], train=["resampler"]` is the official full fine-tuning.
    """

    trains_base_weights = True
    quantization = None

    def __init__(self, freeze: Sequence[str] = (), train: Sequence[str] = ()):
        self.freeze = tuple(freeze)
        self.train = tuple(train)

    def apply(self, model: nn.Module, family: Family) -> nn.Module:
        components = {**family.components, "all": ""}
        unknown = sorted({*self.freeze, *self.train} - set(components))
        if unknown:
            no_images = "" if "vision" in components else "reads no images and "
            raise ValueError(
                f"the model {no_images}has no component {', '.join(unknown)}; its components are "
                f"{', '.join(components)}: choose another adapter, or other adapter.freeze and "
                f"adapter.train"
            )
        trainable = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
        for component in self.freeze:
            model.get_submodule(components[component]).requires_grad_(False)
        for component in self.train:
            path = components[component]
            for name, tensor in model.get_submodule(path).named_parameters(path):
                tensor.requires_grad_(name in trainable)
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        return model


class LoRA:
    """Low-rank adapters (arXiv:2106.09685) on linear layers, through peft.

    The base weights are frozen. The adapters are float32.

    Args:
        rank, alpha, dropout: of every adapter, whose output is scaled by `alpha / rank`.
        targets: the adapted layers: a group in `Family.lora_targets` such as "attention";
            "all-linear" for every linear layer except the head; a regular expression that matches
            whole module paths; or a list of endings of module paths.
        options: further settings of peft's `LoraConfig`, such as `use_dora` or `use_rslora`.
        quantization: settings of transformers' `BitsAndBytesConfig` for the base weights.
    """

    trains_base_weights = False

    def __init__(
        self,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        targets: str | Sequence[str],
        options: Mapping[str, Any] | None = None,
        quantization: Mapping[str, Any] | None = None,
    ):
        check_settings("adapter", {"rank": rank, "alpha": alpha, "dropout": dropout})
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.targets = targets if isinstance(targets, str) else list(targets)
        self.options = _checked_options(options or {})
        check_syntax({**self.options, "target_modules": self.targets})
        self.quantization = dict(quantization) if quantization else None

    def apply(self, model: nn.Module, family: Family) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        targets = self.targets
        if isinstance(targets, str):
            targets = family.lora_targets.get(targets, targets)
        settings = dict(self.options)
        if targets == self.targets:  # not a group of the family
            settings["target_modules"] = targets
        check_speed(settings, [path for path, _ in model.named_modules()])
        if targets != "all-linear":
            self._check_targets(targets, model, family)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            **self.options,
        )
        return get_peft_model(model, config)

    def merge(self, model: nn.Module) -> nn.Module:
        return model.merge_and_unload()

    def _check_targets(
        self, targets: str | Sequence[str], model: nn.Module, family: Family
    ) -> None:
        """Raises ValueError unless `targets` select layers of `model`, and every target matches."""
        modules = dict(model.named_modules())
        matched, unused = [], []
        for target, pattern in _path_patterns(targets).items():
            paths = [path for path in modules if re.fullmatch(pattern, path)]
            matched += paths
            if not paths:
                unused.append(target)
        if unused or not matched:
            raise ValueError(
                f"adapter.targets={self.targets!r}: {', '.join(unused) or 'it'} matches no module; "
                f"choose {', '.join(family.lora_targets)}, all-linear, or some of the linear "
                f"layers {', '.join(_linear_layers(model))}"
            )
        for path in matched:
            if not isinstance(modules[path], nn.Linear | nn.Embedding | nn.Conv2d):
                raise ValueError(
                    f"adapter.targets={self.targets!r} matches {path}, which is not a linear, "
                    f"embedding or convolution layer"
                )


def warn_of_few_layers(adapted: nn.Module, family: Family) -> None:
    """Warns with a table if an adapter covers a small part of the model, probably by mistake.

    The usual targets for other models, such as `q_proj` and `v_proj`, match the resampler alone.
    """
    sizes, total = {}, 0
    for path, module in network_of(adapted).named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in path:
            total += module.weight.numel()
            if path.endswith(ADAPTED):
                sizes[path.removesuffix(ADAPTED)] = module.weight.numel()
    if not sizes:
        return
    share = sum(sizes.values()) / total
    language = family.components["language"]
    in_language = any(path.startswith(f"{language}.") for path in sizes)
    if in_language and share >= SMALL_SHARE:
        return
    where = "" if in_language else ", none of them in the language model"
    log.warning(
        "the adapter covers only %.1f %% of the weights of all linear layers%s:\n%s\n"
        "For more choose adapter.targets=%s or all-linear",
        *(100 * share, where, _table(sizes), ", ".join(family.lora_targets)),
    )


def _checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    initialization = options.get("init_lora_weights")
    if initialization is not None and initialization not in INITIALIZATIONS:
        raise ValueError(
            f"adapter.options.init_lora_weights={brief(initialization)} is not supported: it "
            f"changes the base weights or needs data, and checkpoints hold the adapter alone; "
            f"choose {', '.join(map(str, INITIALIZATIONS)).lower()}"
        )
    for name, value in options.items():
        expected = PEFT_OPTIONS.get(name)
        if expected is None:
            raise ValueError(f"adapter.options has {name}; it may have {', '.join(PEFT_OPTIONS)}")
        if value is not None and not matches(value, expected):
            raise ValueError(
                f"adapter.options.{name} is {brief(value)}, expected {type_name(expected)}"
            )
    return dict(options)


def _path_patterns(targets: str | Sequence[str]) -> dict[str, str]:
    """A regular expression for whole module paths, for each target: see `LoRA`."""
    if isinstance(targets, str):
        return {targets: targets}
    return {end: rf"(.*\.)?{re.escape(end)}" for end in targets}


def _table(sizes: Mapping[str, int]) -> str:
    """Lists layers and the parameters of their weights, with N in place of block numbers."""
    layers: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for path, size in sizes.items():
        name = re.sub(r"\d+", "N", path)
        layers[name] += 1
        weights[name] += size
    width = max(map(len, layers))
    rows = [f"  {name:{width}}  {layers[name]:6}  {weights[name]:,}" for name in layers]
    return "\n".join([f"  {'layer':{width}}  number  weights", *rows])


def _linear_layers(model: nn.Module) -> list[str]:
    """Paths of the linear layers, with N in place of block numbers."""
    layers = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            layers.add(re.sub(r"\d+", "N", path))
    return sorted(layers)
