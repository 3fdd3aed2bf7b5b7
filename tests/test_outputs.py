"""Outputs taken apart into tensors and put together again, and weighted sums of them."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from sgl_diffusion_accel.caching.parts.output_tensors import combine, take_apart

Pair = namedtuple("Pair", ["sample", "mask"])
A, B = torch.arange(6.0).reshape(2, 3), torch.ones(4, dtype=torch.float16)

FORMS: dict[str, tuple[Any, int]] = {
    "tensor": (A, 1),
    "tuple": ((A,), 1),
    "two": ((A, B), 2),
    "list": ([A, B], 2),
    "nested": (([A, B], {"more": (A,)}), 3),
    "with others": ((A, None, 3, "text", torch.ones(2, dtype=torch.long)), 1),
    "diffusers": (Transformer2DModelOutput(sample=A), 1),
    "ordered": (OrderedDict(sample=A, other=B), 2),
    "named": (Pair(A, None), 1),
    "nothing": ((), 0),
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return type(one) is type(other) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("name", FORMS)
def test_what_is_put_together_is_what_was_taken_apart(name: str) -> None:
    output, count = FORMS[name]
    tensors, form = take_apart(output)
    assert len(tensors) == count
    for _ in range(2):  # a form is used many times
        assert same(form(tensors), output)


def test_other_tensors_take_the_same_places() -> None:
    tensors, form = take_apart((A, [B], None))
    made = form([tensor + 1 for tensor in tensors])
    assert torch.equal(made[0], A + 1)
    assert torch.equal(made[1][0], B + 1)
    assert made[2] is None


def test_mapping_whose_keys_are_no_words() -> None:
    tensors, form = take_apart({0: A, "a b": B})
    assert same(form(tensors), {0: A, "a b": B})


def test_sum_is_weighted_tensor_by_tensor() -> None:
    first, second = (A, A * 10), (A + 1, A)
    made = combine([(2.0, first), (-0.5, second)])
    assert torch.allclose(made[0], 2 * A - 0.5 * (A + 1))
    assert torch.allclose(made[1], 20 * A - 0.5 * A)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sum_keeps_the_dtype_and_is_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(100, generator=generator).to(dtype) for _ in range(4)]
    weights = [2.7, -1.9, 0.8, -0.6]
    (made,) = combine([(weight, (part,)) for weight, part in zip(weights, parts, strict=True)])
    exact = sum(weight * part.double() for weight, part in zip(weights, parts, strict=True))
    assert made.dtype == dtype
    torch.testing.assert_close(made, exact.to(dtype))


def test_sum_of_half_precision_does_not_overflow_on_the_way() -> None:
    big = torch.full((2,), 60000.0, dtype=torch.float16)
    (made,) = combine([(2.0, (big,)), (-1.0, (big,))])
    assert torch.equal(made, big)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0]])
def test_sum_is_a_new_tensor(weights: list[float]) -> None:
    parts = [A.clone() for _ in weights]
    (made,) = combine([(weight, (part,)) for weight, part in zip(weights, parts, strict=True)])
    made.fill_(float("nan"))
    assert all(torch.equal(part, A) for part in parts)


def test_outputs_of_different_kinds_are_not_added() -> None:
    with pytest.raises(ValueError, match="zip"):
        combine([(1.0, (A,)), (1.0, (A, B))])
