"""Attention within segments of a row, such as packed samples or the images of a batch."""

# B batch size, T tokens, H heads, G heads of keys and values, K head width, n segments

from __future__ import annotations

from inspect import signature

import torch


def attend_in_segments(
    q_BHTK: torch.Tensor,
    k_BGTK: torch.Tensor,
    v_BGTK: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    *,
    scaling: float,
    causal: bool = True,
) -> torch.Tensor:
    """Computes attention within each segment of packed rows, (B, T, H, K).

    Attention between segments is not computed. The function needs no mask and does not synchronize.
    Call it only if `has_segments_kernel` returns True.

    Args:
        k_BGTK, v_BGTK: keys and values, each shared by H / G heads of the queries.
        bounds: (n + 1,) int32, the cumulative lengths of the segments over all B * T tokens.
            Segments may be empty.
        longest: an upper bound of the number of tokens of a segment.
        causal: whether each token attends to no later one of its segment.
    """
    # Imported here because this import loads the compiler, which takes seconds.
    from torch.nn.attention.varlen import varlen_attn

    options = {"scale": scaling, "window_size": (-1, 0) if causal else (-1, -1)}  # -1: all tokens
    heads_per_key = q_BHTK.shape[1] // k_BGTK.shape[1]
    if heads_per_key > 1 and _kernel_takes_groups():
        options["enable_gqa"] = True
    elif heads_per_key > 1:
        k_BGTK, v_BGTK = (x.repeat_interleave(heads_per_key, dim=1) for x in (k_BGTK, v_BGTK))
    rows = [x_BHTK.transpose(1, 2) for x_BHTK in (q_BHTK, k_BGTK, v_BGTK)]
    flat = [x_BTHK.flatten(0, 1) for x_BTHK in rows]
    attended = varlen_attn(*flat, bounds, bounds, longest, longest, **options)
    return attended.view(rows[0].shape)


@torch.compiler.assume_constant_result
def _kernel_takes_groups() -> bool:
    """Returns whether several heads may share keys and values, as in newer versions of torch."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in signature(varlen_attn).parameters


def has_segments_kernel(x: torch.Tensor) -> bool:
    """Returns whether `attend_in_segments` supports the device and the matmul precision of `x`."""
    device_type, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    return (
        x.is_cuda
        and dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )
