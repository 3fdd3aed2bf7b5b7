"""The attention functions, each behind one signature; optional packages are imported when a kernel is loaded.

Every kernel takes query `[B, H, Q, D]`, key and value `[B, Hkv, K, D]`, and returns `[B, H, Q, D]`. What it cannot take
is told by its requirements (`backends.py`) and never reaches it.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Kernel(Protocol):
    """softmax(query @ keyᵀ · scale + mask) @ value."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        /,
        *,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        """Computes attention.

        Args:
            query: `[B, H, Q, D]`.
            key: `[B, Hkv, K, D]`.
            value: `[B, Hkv, K, D]`.
            mask: Broadcasts to `[B, H, Q, K]`; bool (True attends) or added to the scores.
            is_causal: Whether a query attends to no later key, counted from the first of both.
            scale: Factor of the scores, None for 1 / √D.
            enable_gqa: Whether Hkv divides H.
        """


def sdpa() -> Kernel:
    """PyTorch's `scaled_dot_product_attention`, which chooses among its own kernels."""

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        /,
        *,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )

    return run


def math() -> Kernel:
    """PyTorch's plain matrix products and softmax."""

    def run(query: Tensor, key: Tensor, value: Tensor, /, *, mask: Tensor | None, **more: Any) -> Tensor:
        numbers = None if mask is None else _numbers(mask, query.dtype)  # it would add a bool mask as 0 and 1
        output: Tensor = torch.ops.aten._scaled_dot_product_attention_math(query, key, value, numbers, 0.0, **more)[0]
        return output

    return run


def _numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers that are added to the scores."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
    return mask.to(dtype)


def _added(mask: Tensor | None, query: Tensor, key: Tensor, align: int = 1) -> Tensor | None:
    """A mask as numbers that are added to the scores, `[B, H, Q, K]`; its rows start at multiples of `align`."""
    if mask is None:
        return None
    mask = _numbers(mask, query.dtype)
    length = key.shape[-2]
    if align > 1 and (length % align or mask.stride(-1) != 1):
        mask = F.pad(mask.expand(*mask.shape[:-1], length), (0, -length % align))[..., :length]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], length)


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with as many heads as the query."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def _same_size(*sides: Tensor, align: int = 1) -> list[Tensor]:
    """Query, key and value, filled up with zeros to one head size, which is a multiple of `align`."""
    size = max(side.shape[-1] for side in sides)
    size += -size % align
    filled = (F.pad(side, (0, size - side.shape[-1])) if side.shape[-1] < size else side for side in sides)
    return [side if side.stride(-1) == 1 else side.contiguous() for side in filled]


def _trains(query: Tensor, key: Tensor) -> bool:
    """Whether there may be a backward pass, for which a kernel has to keep its normalisation."""
    return torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)


def efficient() -> Kernel:
    """PyTorch's memory-efficient kernel; on a CPU its fused kernel, which works in blocks as well."""

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        /,
        *,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        if enable_gqa:
            key, value = _repeated(query, key, value)
        ops: Any = torch.ops.aten
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if query.device.type == "cpu":
            added = _added(mask, query, key)
            output = ops._scaled_dot_product_flash_attention_for_cpu(
                *_same_size(query, key, value), 0.0, is_causal, attn_mask=added, scale=scale
            )[0][..., : value.shape[-1]]
        else:
            added = _added(mask, query, key, align=16)
            output = ops._scaled_dot_product_efficient_attention(
                *_same_size(query, key, value, align=8), added, _trains(query, key), 0.0, is_causal, scale=scale
            )[0][..., : value.shape[-1]]
        result: Tensor = output
        return result

    return run


def cudnn() -> Kernel:
    """Fused attention of cuDNN, through PyTorch."""

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        /,
        *,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        if enable_gqa:
            key, value = _repeated(query, key, value)
        added = _added(mask, query, key, align=16)
        output: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, added, _trains(query, key), 0.0, is_causal, False, scale=scale
        )[0]
        return output

    return run


def sdpa_flash() -> Kernel:
    """FlashAttention 2 as it comes with PyTorch."""

    def run(query: Tensor, key: Tensor, value: Tensor, /, *, is_causal: bool, scale: float | None, **_: Any) -> Tensor:
        key, value = _repeated(query, key, value)
        output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, False, scale=scale
        )[0]
        return output

    return run


def flex() -> Kernel:
    """PyTorch's FlexAttention, compiled on a GPU; masks go into the scores, whatever their shape."""
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = flex_attention

    @functools.cache
    def compiled() -> Any:
        return torch.compile(attend)

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        /,
        *,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        full = None if mask is None else mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])

        def scored(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if full is not None:
                score = torch.where(full[b, h, i, j], score, -float("inf")) if is_bool else score + full[b, h, i, j]
            return torch.where(i >= j, score, -float("inf")) if is_causal else score

        if query.device.type == "cpu" and torch.compiler.is_compiling():  # it cannot compile views for a CPU
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        is_bool = full is not None and full.dtype == torch.bool
        plain = full is None and not is_causal
        function = attend if query.device.type == "cpu" or torch.compiler.is_compiling() else compiled()
        output: Tensor = function(
            query, key, value, score_mod=None if plain else scored, scale=scale, enable_gqa=enable_gqa
        )
        return output

    return run


def flash_like(function: Any) -> Kernel:
    """Any of the FlashAttention packages: `[B, S, H, D]`, grouped heads as they are."""
    names = inspect.signature(function).parameters

    def run(query: Tensor, key: Tensor, value: Tensor, /, *, is_causal: bool, scale: float | None, **_: Any) -> Tensor:
        sides = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        output = function(*sides, softmax_scale=scale, causal=is_causal)
        first: Tensor = output[0] if isinstance(output, tuple) else output  # some releases add the log-sum-exp
        return first.transpose(1, 2)

    if not {"softmax_scale", "causal"} <= set(names):
        raise ImportError(f"{function.__module__}.{function.__name__} has other parameters: {', '.join(names)}")
    return run


def flash() -> Kernel:
    """FlashAttention 2, package flash-attn."""
    from flash_attn import flash_attn_func

    return flash_like(flash_attn_func)


def flash3() -> Kernel:
    """FlashAttention 3, module flash_attn_interface."""
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found, unused-ignore]

    return flash_like(flash_attn_func)


def flash4() -> Kernel:
    """FlashAttention 4, package flash-attn-4."""
    from flash_attn.cute import flash_attn_func

    return flash_like(flash_attn_func)


def aiter_flash() -> Kernel:
    """AMD's aiter."""
    from aiter import flash_attn_func  # type: ignore[import-not-found, unused-ignore]

    return flash_like(flash_attn_func)


def sage_like(function: Any) -> Kernel:
    """`sageattn`, wherever it comes from: `[B, H, S, D]` is `"HND"`."""
    may_smooth = "smooth_k" in inspect.signature(function).parameters
    without_smoothing = {"smooth_k": False} if may_smooth else {}

    def run(query: Tensor, key: Tensor, value: Tensor, /, *, is_causal: bool, scale: float | None, **_: Any) -> Tensor:
        if may_smooth:  # version 1 writes over the key then; this is the same, into a new tensor
            key = key - key.mean(dim=-2, keepdim=True)
        query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
        output: Tensor = function(
            query, key, value, tensor_layout="HND", is_causal=is_causal, sm_scale=scale, **without_smoothing
        )
        return output

    return run


def sage() -> Kernel:
    """SageAttention: 8-bit scores. Version 1 is Triton; version 2 takes its best kernel for the device by itself."""
    from sageattention import sageattn

    return sage_like(sageattn)


def sage3_like(function: Any) -> Kernel:
    """`sageattn3_blackwell`, wherever it comes from."""

    def run(query: Tensor, key: Tensor, value: Tensor, /, *, is_causal: bool, scale: float | None, **_: Any) -> Tensor:
        if scale is not None:  # it scales by 1 / √D
            query = query * (scale * query.shape[-1] ** 0.5)
        output: Tensor = function(query, key.clone(), value, is_causal=is_causal)  # it centres it in place
        return output

    return run


def sage3() -> Kernel:
    """SageAttention 3: 4-bit, for Blackwell."""
    from sageattn3 import sageattn3_blackwell  # type: ignore[import-not-found, unused-ignore]

    return sage3_like(sageattn3_blackwell)


def xformers() -> Kernel:
    """Memory-efficient attention of xformers: `[B, S, H, D]`."""
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        /,
        *,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        if enable_gqa:
            key, value = _repeated(query, key, value)
        bias: Any = LowerTriangularMask() if is_causal else _added(mask, query, key, align=8)
        sides = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        output: Tensor = memory_efficient_attention(*sides, attn_bias=bias, scale=scale)
        return output.transpose(1, 2)

    return run
