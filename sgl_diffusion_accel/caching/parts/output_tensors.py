"""What a transformer returns, taken apart into tensors and put together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
"""The floating-point tensors of an output, in order; for most models one, `[B, C, (F,) H, W]` or `[B, T, C]`."""


def take_apart(output: Any) -> tuple[Tensors, Callable[[Sequence[Tensor]], Any]]:
    """Takes an output apart.

    Args:
        output: A tensor, or tuples, lists and mappings (such as diffusers' output classes) of them, however nested.

    Returns:
        Its floating-point tensors, and a function that puts as many tensors together in the same form. Whatever else
        the output holds is put in as it was.
    """
    tensors: list[Tensor] = []
    form = _form(output, tensors)
    return tuple(tensors), lambda values: form(iter(values))


def _form(part: Any, tensors: list[Tensor]) -> Callable[[Any], Any]:
    if isinstance(part, Tensor) and part.is_floating_point():
        tensors.append(part)
        return next
    if isinstance(part, Mapping):
        kind = type(part)
        fields = {key: _form(value, tensors) for key, value in part.items()}
        if kind is dict:
            return lambda values: {key: make(values) for key, make in fields.items()}
        return lambda values: kind(**{key: make(values) for key, make in fields.items()})
    if isinstance(part, (tuple, list)):
        forms = [_form(each, tensors) for each in part]
        make: Any = getattr(type(part), "_make", type(part))  # a named tuple takes its parts through _make
        return lambda values: make([form(values) for form in forms])
    return lambda _: part


def combine(weighted: Sequence[tuple[float, Tensors]]) -> Tensors:
    """The weighted sum Σ w·t of several outputs, tensor by tensor, summed in float32 and rounded once."""
    result = []
    for parts in zip(*(tensors for _, tensors in weighted), strict=True):
        exact = torch.promote_types(parts[0].dtype, torch.float32)
        total = parts[0].to(exact) * weighted[0][0]
        for (weight, _), part in zip(weighted[1:], parts[1:], strict=True):
            total = total.add_(part.to(exact), alpha=weight)
        result.append(total.to(parts[0].dtype))
    return tuple(result)
