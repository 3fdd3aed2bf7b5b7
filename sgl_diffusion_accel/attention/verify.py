"""Whether a backend computes what it should: its error against a float32 reference."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_diffusion_accel.attention.table import Backend
from sgl_diffusion_accel.errors import UnsupportedModelError

QUANTISED_TOLERANCE = 0.1
"""Largest relative L2 error of a quantised backend. 8-bit SageAttention is at about 0.02 to 0.05."""

_EXACT_TOLERANCE = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-6}
_ROWS_BYTES = 1 << 28  # of scores at a time


def relative_error(output: Tensor, sides: tuple[Tensor, ...], more: dict[str, Any]) -> float:
    """Relative L2 error of an attention output, ‖o - r‖ / ‖r‖, with r computed in float32.

    Of very long sequences evenly spaced queries are looked at.

    Args:
        output: `[B, H, Q, D]`.
        sides: Query, key and value, as for a kernel.
        more: `mask`, `is_causal`, `scale` and `enable_gqa`, as for a kernel.

    Returns:
        The error; NaN if the output holds NaN or infinity.
    """
    query, key, value = sides
    batch, heads, length, _ = query.shape
    rows = max(1, min(length, _ROWS_BYTES // (4 * batch * heads * key.shape[-2])))
    index = torch.linspace(0, length - 1, rows, device=query.device).round().long()
    mask = more["mask"]
    if mask is not None and mask.shape[-2] > 1:
        mask = mask[..., index, :]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    if more["is_causal"]:
        causal = index[:, None] >= torch.arange(key.shape[-2], device=query.device)[None]
        if mask is None:
            mask = causal
        else:
            mask = mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, float("-inf"))
    sides = (query[:, :, index].float(), key.float(), value.float())
    with torch.autocast(query.device.type, enabled=False):
        reference = F.scaled_dot_product_attention(*sides, mask, scale=more["scale"], enable_gqa=more["enable_gqa"])
    part = output[:, :, index].float()
    if not bool(torch.isfinite(part).all()):
        return float("nan")
    size = float(reference.norm())
    return float((part - reference).norm()) / size if size else float(part.norm())


def tolerance(backend: Backend, dtype: torch.dtype) -> float:
    """The largest relative L2 error that a backend may have."""
    return _EXACT_TOLERANCE.get(dtype, 3e-2) if backend.is_exact else QUANTISED_TOLERANCE


def check_output(layer: str, backend: Backend, output: Tensor, sides: tuple[Tensor, ...], more: dict[str, Any]) -> None:
    """Raises UnsupportedModelError where a backend's output is not what it should be."""
    expected = (*sides[0].shape[:-1], sides[2].shape[-1])
    if output.shape != expected:
        raise UnsupportedModelError(
            f"the attention backend {backend.name!r} gives a wrong output in {layer}: its shape is "
            f"{list(output.shape)}, and should be {list(expected)}."
        )
    error = relative_error(output, sides, more)
    allowed = tolerance(backend, sides[0].dtype)
    if error <= allowed:
        return
    what = (
        "not finite (NaN or infinity)" if error != error else f"off by {error:.2g} (relative L2; allowed {allowed:g})"
    )
    if error == error and not bool(output.any()):
        what = "black: all zeros"
    raise UnsupportedModelError(
        f"the attention backend {backend.name!r} gives a wrong output in {layer}: it is {what}, for query "
        f"{list(sides[0].shape)}, key {list(sides[1].shape)}, {sides[0].dtype}. Take another backend, or leave the "
        "layer out with layers=."
    )
