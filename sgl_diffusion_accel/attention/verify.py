"""Whether a backend computes what it should: its error against a float32 reference."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite, nan
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_diffusion_accel.attention.backends.backend_table import Backend
from sgl_diffusion_accel.errors import UnsupportedModelError

QUANTISED_TOLERANCE = 0.1
"""Largest relative L2 error of a quantised backend. 8-bit SageAttention is at about 0.02 to 0.05."""

_EXACT_TOLERANCE = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-6}
_ROWS_BYTES = 1 << 28  # of scores
_SIDES_BYTES = 1 << 28  # of key and value at a time


def relative_error(output: Tensor, sides: tuple[Tensor, ...], more: dict[str, Any]) -> float:
    """Relative L2 error of an attention output, ‖o - r‖ / ‖r‖, with r computed in float32.

    Of very long sequences evenly spaced queries are looked at, with all heads and keys, a few heads at a time: so it
    takes at most about half a gigabyte beside what is given, unless a single head is larger.

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
    mask = _mask_of_rows(more, index, key.shape[-2])
    wrongs, sizes = [], []
    for some, of_key in _heads_at_a_time(query, key, value):
        parts = (query[:, some][:, :, index].float(), key[:, of_key].float(), value[:, of_key].float())
        own = mask[..., some, :, :] if mask is not None and mask.ndim > 2 and mask.shape[-3] > 1 else mask
        # Beside sides in float32 PyTorch's function takes a mask of float32 or of bools.
        own = own.float() if own is not None and own.dtype != torch.bool else own
        # Autocast would bring the reference down to half precision.
        with torch.autocast(query.device.type, enabled=False):
            reference = F.scaled_dot_product_attention(*parts, own, scale=more["scale"], enable_gqa=more["enable_gqa"])
        wrongs.append((output[:, some][:, :, index].float() - reference).norm())
        sizes.append(reference.norm())
    # One wait for the device, for all heads together.
    wrong, size = torch.stack([torch.stack(wrongs).norm(), torch.stack(sizes).norm()]).tolist()
    error: float = wrong / size if size else wrong
    # Infinity as well: `error != error` tells both.
    return error if isfinite(error) else nan


def _mask_of_rows(more: dict[str, Any], index: Tensor, keys: int) -> Tensor | None:
    """The mask of the queries that are looked at, with what a causal call leaves out."""
    mask: Tensor | None = more["mask"]
    if mask is not None and mask.shape[-2] > 1:
        mask = mask[..., index, :]
    if not more["is_causal"]:
        return mask
    causal = index[:, None] >= torch.arange(keys, device=index.device)[None]
    if mask is None:
        return causal
    return mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, float("-inf"))


def _heads_at_a_time(query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple[slice, slice]]:
    """Heads of the query, and those of the key that belong to them: so many that key and value fit in float32."""
    heads = key.shape[1]
    groups = query.shape[1] // heads
    size = 4 * key.shape[0] * key.shape[2] * (key.shape[3] + value.shape[3])
    step = max(1, _SIDES_BYTES // size)
    for first in range(0, heads, step):
        last = min(first + step, heads)
        yield slice(first * groups, last * groups), slice(first, last)


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
        f"{list(sides[0].shape)}, key {list(sides[1].shape)}, {sides[0].dtype}. Take another backend: "
        "set_attention_backend(pipe, 'sdpa'); or leave the layer out with layers=; or do without this check: "
        "verify=False."
    )
