"""A network that decodes: prompts go into a static cache in one pass, then each step has a fixed shape and is replayed as a CUDA graph."""

# B rows of the cache, n <= B rows that are answered, T tokens of the prompts, S slots of the cache, D width, V vocabulary
# H heads, K head width, N images, Q tokens of an image

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Literal

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.distributed.tensor import DTensor
from torch.nn.functional import scaled_dot_product_attention

from qwenvl_lit.models.components import network_of
from qwenvl_lit.models.qwen_vl.image_cache import TOGETHER, ImageCache
from qwenvl_lit.models.qwen_vl.language import (
    LanguageBlock,
    ntk_alpha,
    rotary_frequencies,
    rotary_tables_at,
)
from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM
from qwenvl_lit.models.qwen_vl.vision import VisionBlock

PROMPT_TOKENS = 16384  # that go through the network at a time: more take memory and are no faster
COMPILE_AFTER = 60  # seconds of answers
log = logging.getLogger(__name__)

_decoders: weakref.WeakKeyDictionary[nn.Module, Decoder] = weakref.WeakKeyDictionary()


def decoder_of(model: nn.Module) -> Decoder | None:
    """The decoder of a Qwen-VL network, inside adapters or not; None where it cannot be: spread over devices, sharded, another family's."""
    network = network_of(model)
    if (
        not isinstance(network, QwenVLForCausalLM)
        or len(set((getattr(network, "hf_device_map", None) or {}).values())) > 1
    ):
        return None
    if any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        return None
    if network not in _decoders or _decoders[network].home != network.transformer.wte.weight.device:
        _decoders[network] = Decoder(network)
    return _decoders[network]


def release(model: nn.Module) -> None:
    _decoders.pop(network_of(model), None)


@dataclass(slots=True)
class Rows:
    """What a step of B rows reads; always in the same place, since graphs know places only."""

    ids: torch.Tensor  # (B,) the latest token of each row
    slot: torch.Tensor  # (1,) where it goes, counted with padding
    starts: torch.Tensor  # (B, 1) the slot of each row's first token
    frequencies: torch.Tensor  # (B, 1, 1, 1, K / 2) of its rotary positions


class Decoder:
    """One network's cache, graphs and encoded images.

    Positions of a row, dynamic NTK and log-n go by its own tokens: each row is answered as it would be alone.
    """

    def __init__(self, network: QwenVLForCausalLM):
        self._network = weakref.ref(network)  # or the table of decoders would keep it alive
        self.images = ImageCache()
        self.answer = 0  # counts answers, so that an old one cannot go on
        self.home = network.transformer.wte.weight.device
        self.seconds = self.began = self.latest = (
            0.0  # spent on earlier answers; start and latest step of this one
        )
        self.memory: torch.Tensor | None = None  # all of the cache, flat
        self.rows: dict[int, Rows] = {}  # by B
        self.asked: Counter[int] = Counter()  # how often for so many rows
        self.graphs: dict[
            tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor]
        ] = {}  # by B and slots in use; with its logits
        self.graphable = True
        self.compiled = False
        self.compilable = True
        self.before: Callable = LanguageBlock.before
        self.after: Callable = LanguageBlock.after
        self.look: Callable = VisionBlock.compute

    @property
    def network(self) -> QwenVLForCausalLM:
        network = self._network()
        assert network is not None
        return network

    # -- answers --------------------------------------------------------------------------------------------------------------------

    def start(
        self,
        inputs: Mapping[str, Any],
        *,
        new_tokens: int,
        image_keys: Sequence[str] | None = None,
        compile: Literal["auto"] | bool = "auto",
    ) -> torch.Tensor:
        """Take in the prompts of n left-padded rows; the logits (n, V) of their first new tokens."""
        self.seconds += self.latest - self.began
        self.began = self.latest = perf_counter()
        self.answer += 1
        ids, mask, config = inputs["input_ids"], inputs.get("attention_mask"), self.network.config
        self.n, length = ids.shape
        lengths = (
            [length] * self.n if mask is None else mask.sum(1).tolist()
        )  # here the host waits, the device has nothing to do
        self._set_compiled(compile)
        self.size = self._size(self.n, length + new_tokens)
        self.filled = length
        self._reserve(self.size, length + new_tokens)
        cache = self._cache(self.size)
        rows = self._rows(self.size)
        rows.slot.fill_(length)
        rows.starts.fill_(length)  # rows that nobody asked for see what they write themselves
        rows.starts[: self.n, 0] = length - torch.tensor(lengths, device=self.home)
        dynamic = config.use_dynamic_ntk
        alphas = [ntk_alpha(tokens, config.seq_length) if dynamic else 1 for tokens in lengths] + [
            1
        ] * (self.size - self.n)
        tables = {
            alpha: rotary_frequencies(config.kv_channels, config.rotary_emb_base, alpha, self.home)
            for alpha in set(alphas)
        }
        rows.frequencies.copy_(
            torch.stack([tables[alpha] for alpha in alphas])[:, None, None, None]
        )
        while True:
            try:
                images = {
                    name: inputs[name]
                    for name in ("vision_features", "vision_positions")
                    if name in inputs
                }
                if len(pixel_values := inputs.get("pixel_values", ())):
                    images["vision_features"] = self.images(pixel_values, image_keys, self._encode)
                return self._take_in(
                    self.network.embed(ids, **images), cache, rows, padded=min(lengths) < length
                )
            except (
                TorchDynamoException
            ) as error:  # layers of other packages that may not be compiled
                self._give_up_compiling(error)

    def step(self, ids: torch.Tensor, answer: int | None = None) -> torch.Tensor:
        """Logits (n, V) after the tokens `ids` (n,) are appended to the rows.

        Raises:
            ValueError: `answer` is not the one that was started last.
        """
        if answer not in (None, self.answer):
            raise ValueError(
                "another answer of this model was begun before this one had ended; read one to its end, or load the model twice"
            )
        rows = self.rows[self.size]
        rows.ids[: self.n] = ids
        self.filled += 1
        logits = self._replayed(self.size, self._in_use(self.size, self.filled))
        rows.slot += 1
        self.latest = perf_counter()
        return logits[: self.n]

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if (
            not self.compiled or len(pixel_values) != TOGETHER
        ):  # what is left over is not worth a compilation of its own
            return self.network.get_image_features(pixel_values)
        blocks = self.network.transformer.visual.transformer["resblocks"]
        before = [block.compute for block in blocks]  # training compiles it, or not, in its own way
        for block in blocks:
            block.compute = partial(self.look, block)
        try:
            return self.network.get_image_features(pixel_values)
        finally:
            for block, compute in zip(blocks, before, strict=True):
                block.compute = compute

    # -- the network ----------------------------------------------------------------------------------------------------------------

    def _take_in(
        self, x_BTD: torch.Tensor, cache: torch.Tensor, rows: Rows, *, padded: bool
    ) -> torch.Tensor:
        """Rows of the prompts together as `PROMPT_TOKENS` allow; keys and values go to the cache, the last token's logits come back."""
        network, (n, length) = self.network, x_BTD.shape[:2]
        some = max(1, PROMPT_TOKENS // length)
        last = []
        slots = torch.arange(length, device=x_BTD.device)
        for first in range(0, n, some):
            chosen = slice(first, min(first + some, n))
            starts_B1 = rows.starts[chosen]
            rotary = self._rotary((slots - starts_B1).clamp(min=0), rows.frequencies[chosen])
            mask = None
            if padded:
                mask = (slots[:, None] >= slots) & (slots >= starts_B1[:, :, None])  # (b, T, T)
                mask = (mask | (slots[:, None] == slots))[
                    :, None
                ]  # padding sees itself: nothing at all would be NaN
            x_bTD = x_BTD[chosen]
            for block, keys_values in zip(network.transformer.h, cache, strict=True):
                q_bHTK, kv_2bHTK = self.before(block, x_bTD, rotary)
                keys_values[:, chosen, :, :length] = kv_2bHTK
                attended = scaled_dot_product_attention(
                    q_bHTK, *kv_2bHTK, attn_mask=mask, is_causal=mask is None
                )
                x_bTD = self.after(block, x_bTD, attended)
            last.append(x_bTD[:, -1])
        return network.lm_head(network.transformer.ln_f(torch.cat(last)))

    def _step(self, size: int, in_use: int) -> torch.Tensor:
        """One token more for all B rows, which see the first `in_use` slots; logits (B, V)."""
        network, rows, cache = self.network, self.rows[size], self._cache(size)
        slots = torch.arange(in_use, device=self.home)
        x_B1D = network.transformer.wte(rows.ids)[:, None]
        hidden = (slots < rows.starts) | (slots > rows.slot)  # (B, in_use)
        mask = torch.zeros(hidden.shape, dtype=cache.dtype, device=self.home).masked_fill_(
            hidden, -torch.inf
        )[:, None, None]
        rotary = self._rotary(rows.slot - rows.starts, rows.frequencies)
        for block, keys_values in zip(network.transformer.h, cache, strict=True):
            q_BH1K, kv_2BH1K = self.before(block, x_B1D, rotary)
            keys_values.index_copy_(3, rows.slot, kv_2BH1K)
            attended = scaled_dot_product_attention(
                q_BH1K, *keys_values[:, :, :, :in_use], attn_mask=mask
            )
            x_B1D = self.after(block, x_B1D, attended)
        return network.lm_head(network.transformer.ln_f(x_B1D[:, 0]))

    def _rotary(
        self, positions: torch.Tensor, frequencies: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.network.config
        return rotary_tables_at(
            positions, frequencies, logn_above=config.seq_length if config.use_logn_attn else None
        )

    # -- graphs ---------------------------------------------------------------------------------------------------------------------

    def _replayed(self, size: int, in_use: int) -> torch.Tensor:
        if not self._graphs_help():
            return self._step(size, in_use)
        if (size, in_use) not in self.graphs:
            try:
                self.graphs[size, in_use] = self._captured(size, in_use)
            except torch.OutOfMemoryError:
                raise
            except (
                RuntimeError
            ) as error:  # layers of other packages that may not be compiled, or wait for the device
                if self.compiled:
                    self._give_up_compiling(error)
                    return self._replayed(size, in_use)
                log.warning(
                    "decoding goes on without CUDA graphs, which is slower: %s", _first_line(error)
                )
                self.graphable = False
                return self._step(size, in_use)
        graph, logits = self.graphs[size, in_use]
        graph.replay()
        return logits

    def _graphs_help(self) -> bool:
        """On a GPU; under autocast weights are cast in every step, which a graph would repeat to no use."""
        return self.graphable and self.home.type == "cuda" and not torch.is_autocast_enabled("cuda")

    def _captured(self, size: int, in_use: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(
                size, in_use
            )  # libraries set themselves up; what it writes, the replay writes again
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = (
            next(iter(self.graphs.values()))[0].pool() if self.graphs else None
        )  # only one runs at a time
        with torch.cuda.graph(
            graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        ):  # other threads pin batches meanwhile
            logits = self._step(size, in_use)
        return graph, logits

    def _set_compiled(self, wanted: Literal["auto"] | bool) -> None:
        if wanted == "auto":
            wanted = self.compiled or (self._graphs_help() and self.seconds > COMPILE_AFTER)
        wanted = wanted and self.compilable
        if wanted == self.compiled:
            return
        self.compiled = wanted
        self.graphs.clear()
        self.before, self.after = LanguageBlock.before, LanguageBlock.after
        if wanted:
            # By block, not as a whole: one compilation serves them all. Prompts come in all shapes, steps in the few that graphs have.
            self.before, self.after = Compiled(LanguageBlock.before), Compiled(LanguageBlock.after)
            self.look = torch.compile(VisionBlock.compute, fullgraph=True, dynamic=False)

    def _give_up_compiling(self, error: RuntimeError) -> None:
        log.warning("decoding goes on without compilation: %s", _first_line(error))
        self.compilable = False
        self._set_compiled(False)

    # -- memory ---------------------------------------------------------------------------------------------------------------------

    def _size(self, n: int, slots: int) -> int:
        """B for n rows. A size that comes up for the first time, such as a dataset's last batch, uses the graphs of a larger one."""
        self.asked[n] += 1
        larger = [size for size in self.rows if size >= n and self._room(size) >= slots]
        return (
            min(larger)
            if n not in self.rows and self.asked[n] == 1 and larger and self._graphs_help()
            else n
        )

    def _rows(self, size: int) -> Rows:
        if size not in self.rows:
            self.rows[size] = Rows(
                ids=torch.zeros(size, dtype=torch.int64, device=self.home),
                slot=torch.zeros(1, dtype=torch.int64, device=self.home),
                starts=torch.zeros(size, 1, dtype=torch.int64, device=self.home),
                frequencies=torch.zeros(
                    size, 1, 1, 1, self.network.config.kv_channels // 2, device=self.home
                ),
            )
        return self.rows[size]

    def _a_slot(self, size: int) -> int:
        """Numbers that are kept of one token of B rows."""
        config = self.network.config
        return config.num_hidden_layers * 2 * size * config.num_attention_heads * config.kv_channels

    def _room(self, size: int) -> int:
        """Slots that B rows have, a multiple of 8 as attention kernels like it."""
        return 0 if self.memory is None else self.memory.numel() // self._a_slot(size) // 8 * 8

    def _in_use(self, size: int, slots: int) -> int:
        """Slots that a step looks at when so many are filled: a graph for each count would be too many. Few rows read little cache."""
        return min(_rounded(size, slots), self._room(size))

    def _reserve(self, size: int, slots: int) -> None:
        """Make the cache anew where it is too small; it never shrinks."""
        dtype = self.network.transformer.wte.weight.dtype
        if torch.is_autocast_enabled(self.home.type):
            dtype = torch.get_autocast_dtype(self.home.type)
        if self._room(size) < slots or self.memory.dtype != dtype:
            self.memory = None  # the old one makes room first
            self.graphs.clear()
            self.memory = torch.zeros(
                self._a_slot(size) * _rounded(size, slots), dtype=dtype, device=self.home
            )  # zeros: 0 * NaN is NaN

    def _cache(self, size: int) -> torch.Tensor:
        """The cache as (layers, 2, B, H, S, K)."""
        config, room = self.network.config, self._room(size)
        shape = (
            config.num_hidden_layers,
            2,
            size,
            config.num_attention_heads,
            room,
            config.kv_channels,
        )
        return self.memory[: self._a_slot(size) * room].view(shape)


def _rounded(size: int, slots: int) -> int:
    step = 64 if size > 32 else 128 if size > 4 else 512
    return -(-slots // step) * step


class Compiled:
    """A function that is compiled twice: for prompts, of any shape, and for steps, each number of rows by itself."""

    def __init__(self, function: Callable):
        self.prompts = torch.compile(function, fullgraph=True, dynamic=True)
        self.steps = torch.compile(function, fullgraph=True, dynamic=False)

    def __call__(self, block: LanguageBlock, x_BTD: torch.Tensor, other: Any):
        with torch._dynamo.config.patch(
            recompile_limit=256, accumulated_recompile_limit=1024
        ):  # more sizes than anybody asks for
            return (self.steps if x_BTD.shape[1] == 1 else self.prompts)(block, x_BTD, other)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
