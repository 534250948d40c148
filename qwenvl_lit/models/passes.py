"""Forward passes over prompts and steps, with keys and values in a static cache.

Decoders of all families compute with `Passes`, whether they answer batches (`static_decoder`) or
rows that come and go (`running_rows`).

A slot is the index of a token in its row of the cache, including padding. A position is what rotary
tables are computed from; a family counts it without padding.
"""

# B rows of a step, n rows of a batch, b rows of a prefill pass, T tokens of a padded prompt, t of
# them that are read in one pass, S slots of the cache, D width, V vocabulary size, H heads, G heads
# of keys and values, K head width, Q tokens of an image, M image tokens of a batch, A axes of
# positions

from __future__ import annotations

import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from qwenvl_lit.models.cuda_graphs import CUDAGraphs, Function, first_line
from qwenvl_lit.models.dynamo import recompilation_limits
from qwenvl_lit.models.feature_cache import FeatureCache
from qwenvl_lit.models.host_copy import upload
from qwenvl_lit.models.kv_cache import KVCache

# Numbers of images that are encoded as one pass between the steps of running rows. Four images are
# one pass, for which a GPU needs less time than for four.
FEW_IMAGES = (4, 3, 2, 1)
# Recompilations of the functions of a block, above any realistic number of shapes. They are set for
# a whole pass, because a call right after setting them takes three times as long.
LIMITS = {"per_function": 256, "in_total": 1024}

log = logging.getLogger(__name__)

Rotary = tuple[torch.Tensor, torch.Tensor]  # cosines and sines
# Is shown the heads of a block: (its index, queries (b, H, t, K), keys (b, G, S, K), what is added
# to the scores (b, 1, t, S), 0 or -inf, or None: causal attention with t = S)
ShowHeads = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor | None], None]


@dataclass(slots=True)
class StepInputs:
    """The inputs of a decoding step. They are written in place: graphs read fixed addresses."""

    ids: torch.Tensor  # (B,) the latest token of each row
    slot: torch.Tensor  # (1,) the slot of these tokens
    starts: torch.Tensor  # (B, 1) the slot of the first token of each row after padding
    positional: torch.Tensor  # (B, ...) what else the rotary tables of each row depend on

    def first(self, rows: int) -> StepInputs:
        """Returns the inputs of the first rows, at the same addresses."""
        return StepInputs(self.ids[:rows], self.slot, self.starts[:rows], self.positional[:rows])


@dataclass(slots=True)
class PromptInputs:
    """What reading n left-padded prompts depends on, besides their embeddings."""

    starts: torch.Tensor  # (n, 1) the slot of the first token of each row after padding
    padded: bool  # whether a row has padding
    positions: torch.Tensor  # (n, T) or (A, n, T)
    positional: torch.Tensor  # (n, ...) as in `StepInputs`
    # Features (M, D) that are added to the image tokens, one tensor for each of the first blocks
    levels: Sequence[torch.Tensor] = ()
    image_index: torch.Tensor | None = None  # (n, T) of each token in `levels`, -1 for text


class Passes(ABC):
    """Computes prompts and steps of one network, compiled or not, and keeps encoded images."""

    def __init__(self, network: PreTrainedModel, cache: KVCache):
        self._network = weakref.ref(network)  # see `generation.decoders`
        self.cache = cache
        self.device = cache.device
        self.images = FeatureCache()
        self.few_images = False  # whether passes of `FEW_IMAGES` images are worth a graph
        self.can_compile = True
        self.compiled = False
        self._all_graphs: weakref.WeakSet[CUDAGraphs] = weakref.WeakSet()
        self.use_functions(compiled=False)

    @property
    def network(self) -> PreTrainedModel:
        network = self._network()
        assert network is not None
        return network

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        if torch.is_autocast_enabled(self.device.type):
            return torch.get_autocast_dtype(self.device.type)
        return self.network.get_input_embeddings().weight.dtype

    # -- what a family defines ---------------------------------------------------------------------

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The blocks of the language model."""

    # Computes a block up to its attention: (block, (B, T, D), rotary tables) -> queries
    # (B, H, T, K), keys and values (2, B, G, T, K)
    before_attention: Callable[[nn.Module, torch.Tensor, Rotary], tuple[torch.Tensor, torch.Tensor]]
    # Computes a block after its attention: (block, its input (B, T, D), attended (B, H, T, K)) ->
    # its output
    after_attention: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]

    @abstractmethod
    def use_functions(self, *, compiled: bool) -> None:
        """Sets `before_attention` and `after_attention`, and other functions to compile."""

    @abstractmethod
    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeds ids as (..., D)."""

    @abstractmethod
    def logits(self, x_BD: torch.Tensor) -> torch.Tensor:
        """Returns the logits (B, V) of outputs of the last block."""

    @abstractmethod
    def image_tokens(self, inputs: Mapping[str, Any]) -> Sequence[int]:
        """Returns the number of tokens of each image that is to be encoded."""

    @abstractmethod
    def encode_images(
        self, inputs: Mapping[str, Any], indices: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        """Yields the features (Q, D) of the images with these indices. Does not synchronize."""

    @abstractmethod
    def embed_prompts(
        self, inputs: Mapping[str, Any], features: Sequence[torch.Tensor] | None
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Returns the embeddings (n, T, D) of prompts, and `PromptInputs.levels`.

        Args:
            features: of each image; None: `inputs` have them, or there are none.
        """

    @abstractmethod
    def positions(self, inputs: Mapping[str, Any], starts_n1: torch.Tensor) -> torch.Tensor:
        """Returns the positions (n, T) or (A, n, T) of the tokens of prompts."""

    @abstractmethod
    def positional(
        self, positions: torch.Tensor, starts_n1: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """Returns `StepInputs.positional` (n, ...) of prompts of `lengths` tokens.

        It does not depend on where a row starts, because running rows move.
        """

    def step_positions(self, step_inputs: StepInputs) -> torch.Tensor:
        """Returns the positions (B, 1) or (A, B, 1) of the tokens of a step."""
        return step_inputs.slot - step_inputs.starts

    @abstractmethod
    def rotary(self, positions: torch.Tensor, positional: torch.Tensor) -> Rotary:
        """Returns the rotary tables of tokens at some positions."""

    # -- prompts -----------------------------------------------------------------------------------

    def prompt_inputs(self, inputs: Mapping[str, Any], lengths: Sequence[int]) -> PromptInputs:
        """Returns the inputs of left-padded prompts of `lengths` tokens."""
        length = inputs["input_ids"].shape[1]
        starts = upload([length - tokens for tokens in lengths], self.device)[:, None]
        positions = self.positions(inputs, starts)
        positional = self.positional(positions, starts, lengths)
        return PromptInputs(starts, min(lengths) < length, positions, positional)

    def embed(
        self,
        prompts: PromptInputs,
        inputs: Mapping[str, Any],
        features: Sequence[torch.Tensor] | None,
    ) -> torch.Tensor:
        """Returns the embeddings (n, T, D) of prompts, and writes `prompts.levels`."""
        x_nTD, prompts.levels = self.embed_prompts(inputs, features)
        if prompts.levels:
            positions = inputs["vision_positions"]
            index = torch.full((x_nTD.shape[0] * x_nTD.shape[1],), -1, device=self.device)
            index.index_copy_(0, positions, torch.arange(len(positions), device=self.device))
            prompts.image_index = index.view(x_nTD.shape[:2])
        return x_nTD

    def read_tokens(
        self,
        x_btD: torch.Tensor,
        cache: torch.Tensor,
        prompts: PromptInputs,
        *,
        rows: slice = slice(None),
        first: int = 0,
        show_heads: ShowHeads | None = None,
    ) -> torch.Tensor:
        """Runs the blocks on tokens of prompts, and returns their output (b, t, D).

        Args:
            x_btD: the embeddings of the tokens in slots `first` to `first + t - 1`.
            cache: (layers, 2, b, G, S, K). It holds the keys and values of the tokens before
                `first`. Those of the new tokens are written to it.
            rows: the rows of the prompts.
            show_heads: called for each block, before its attention.
        """
        end = first + x_btD.shape[1]
        columns = slice(first, end)
        rotary = self.rotary(prompts.positions[..., rows, columns], prompts.positional[rows])
        mask = None
        if prompts.padded or first:
            mask = prompt_mask(prompts.starts[rows], first, end, cache.dtype)
        with recompilation_limits(**LIMITS):
            for index, (block, keys_values) in enumerate(zip(self.blocks, cache, strict=True)):
                q_bHtK, kv_2bGSK = self.before_attention(block, x_btD, rotary)
                keys_values[:, :, :, columns] = kv_2bGSK
                if first:
                    kv_2bGSK = keys_values[:, :, :, :end]
                if show_heads is not None:
                    show_heads(index, q_bHtK, kv_2bGSK[0], mask)
                attended_bHtK = attend_to_prompt(q_bHtK, *kv_2bGSK, mask)
                x_btD = self.after_attention(block, x_btD, attended_bHtK)
                if index < len(prompts.levels):
                    assert prompts.image_index is not None
                    image_index = prompts.image_index[rows, columns]
                    x_btD = x_btD + features_at(image_index, prompts.levels[index])
        return x_btD

    # -- steps -------------------------------------------------------------------------------------

    def new_step_inputs(self, rows: int) -> StepInputs:
        """Returns the inputs of rows that have no prompts."""
        ids = torch.zeros(rows, dtype=torch.int64, device=self.device)
        unused = self.prompt_inputs({"input_ids": ids[:, None]}, lengths=[1] * rows)
        return StepInputs(
            ids=ids,
            slot=torch.zeros(1, dtype=torch.int64, device=self.device),
            starts=torch.zeros(rows, 1, dtype=torch.int64, device=self.device),
            positional=unused.positional.clone(),
        )

    def compute_step(
        self, step_inputs: StepInputs, cache: torch.Tensor, slots_read: int
    ) -> torch.Tensor:
        """Runs the network on the latest token of each of B rows, and returns the logits (B, V).

        The tokens attend to the first `slots_read` slots of the cache (layers, 2, B, G, S, K).
        """
        slot, starts_B1 = step_inputs.slot, step_inputs.starts
        x_B1D = self.embed_tokens(step_inputs.ids)[:, None]
        slots = torch.arange(slots_read, device=self.device)
        hidden_BS = (slots < starts_B1) | (slots > slot)
        mask_BS = torch.zeros(hidden_BS.shape, dtype=cache.dtype, device=self.device)
        mask = mask_BS.masked_fill_(hidden_BS, -torch.inf)[:, None, None]
        rotary = self.rotary(self.step_positions(step_inputs), step_inputs.positional)
        with recompilation_limits(**LIMITS):
            for block, keys_values in zip(self.blocks, cache, strict=True):
                q_BH1K, kv_2BG1K = self.before_attention(block, x_B1D, rotary)
                keys_values.index_copy_(3, slot, kv_2BG1K)
                k_BGSK, v_BGSK = keys_values[:, :, :, :slots_read]
                # The heads that share keys are attended as if they were tokens of one head: the
                # keys need no copy for each of them.
                q_BGXK = q_BH1K.unflatten(1, (k_BGSK.shape[1], -1)).flatten(2, 3)
                attended_BGXK = scaled_dot_product_attention(q_BGXK, k_BGSK, v_BGSK, attn_mask=mask)
                attended_BH1K = attended_BGXK.reshape(q_BH1K.shape)
                x_B1D = self.after_attention(block, x_B1D, attended_BH1K)
        return self.logits(x_B1D[:, 0])

    # -- graphs and compilation --------------------------------------------------------------------

    def new_graphs(self) -> CUDAGraphs:
        """Returns an empty set of graphs, for steps on one cache."""
        graphs = CUDAGraphs(self.device)
        self._all_graphs.add(graphs)
        return graphs

    def clear_graphs(self) -> None:
        """Deletes all graphs. Call it before other kernels compute the steps."""
        for graphs in self._all_graphs:
            graphs.clear()

    def run_step(
        self, graphs: CUDAGraphs, step_inputs: StepInputs, cache: torch.Tensor, slots_read: int
    ) -> torch.Tensor:
        """Runs `compute_step`, as one of `graphs` if that is faster."""
        step = partial(self.compute_step, step_inputs, cache, slots_read)
        return self.run_graphed(graphs, (len(step_inputs.ids), slots_read), step)

    def run_graphed(self, graphs: CUDAGraphs, shape: Hashable, function: Function) -> torch.Tensor:
        """Runs a function, as one of `graphs` if that is faster."""
        if not graphs.help():
            return function()
        if shape not in graphs.captured:
            try:
                graphs.capture(shape, function)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # A layer of another package may not be compilable, or may synchronize.
                if self.compiled:
                    self.stop_compiling(error)
                    return self.run_graphed(graphs, shape, function)
                reason = first_line(error)
                log.warning("decoding continues without CUDA graphs, which is slower: %s", reason)
                graphs.can_capture = False
                return function()
        return graphs.replay(shape)

    def set_compiled(self, compiled: bool) -> None:
        compiled = compiled and self.can_compile
        if compiled != self.compiled:
            self.compiled = compiled
            self.clear_graphs()
            self.use_functions(compiled=compiled)

    def stop_compiling(self, error: RuntimeError) -> None:
        log.warning("decoding continues without compilation: %s", first_line(error))
        self.can_compile = False
        self.set_compiled(False)


def prompt_mask(starts_b1: torch.Tensor, first: int, end: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns which tokens of left-padded prompts attend to which, (b, 1, t, end): 0 or -inf.

    The t tokens are those in slots `first` to `end - 1`.
    """
    slots = torch.arange(end, device=starts_b1.device)
    new_slots = slots[first:, None]
    mask_btS = (new_slots >= slots) & (slots >= starts_b1[:, :, None])
    # Padding attends to itself: a fully masked softmax row is NaN.
    mask_btS |= new_slots == slots
    # Kernels add the mask to the scores. They would convert one of bools in each block.
    bias_btS = torch.zeros(mask_btS.shape, dtype=dtype, device=mask_btS.device)
    return bias_btS.masked_fill_(~mask_btS, -torch.inf)[:, None]


def attend_to_prompt(
    q_bHtK: torch.Tensor, k_bGSK: torch.Tensor, v_bGSK: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Computes attention with a mask, or causal attention."""
    groups = q_bHtK.shape[1] // k_bGSK.shape[1]
    if mask is not None and groups > 1:
        # Kernels that take masks have no grouped heads.
        k_bGSK, v_bGSK = (x.repeat_interleave(groups, dim=1) for x in (k_bGSK, v_bGSK))
    return scaled_dot_product_attention(
        q_bHtK,
        k_bGSK,
        v_bGSK,
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q_bHtK.shape[1] != k_bGSK.shape[1],
    )


def features_at(image_index_bt: torch.Tensor, features_MD: torch.Tensor) -> torch.Tensor:
    """Returns the features (b, t, D) of tokens, 0 for text; see `PromptInputs.image_index`."""
    features_btD = features_MD[image_index_bt.clamp(min=0)]
    return features_btD.masked_fill_((image_index_bt < 0)[:, :, None], 0)
