"""The error of predictions, combined as guidance combines the branches; see `test_output_run.py`, too."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sgl_diffusion_accel.caching.parts.prediction_error import PredictionError

GUIDANCE = 4.0


def pair(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """What was predicted, and what was computed."""
    generator = torch.Generator().manual_seed(seed)
    computed = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (computed + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype), computed.to(dtype)


def relative(predicted: Tensor, computed: Tensor) -> float:
    return float((predicted.double() - computed.double()).norm() / computed.double().norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_error_is_relative_in_every_precision(dtype: torch.dtype) -> None:
    predicted, computed = pair(0, 2, 5, 3, dtype=dtype)
    error = PredictionError()
    error.add("cond", (predicted,), (computed,), None)
    assert error.take() == pytest.approx(relative(predicted, computed), rel=1e-2)


def test_nothing_measured_is_no_error_and_an_error_is_told_once() -> None:
    error = PredictionError()
    assert error.take() is None
    predicted, computed = pair(0, 4)
    error.add("cond", (predicted,), (computed,), GUIDANCE)
    assert error.take() is not None
    assert error.take() is None


def test_errors_that_the_branches_share_weigh_less_than_opposite_ones() -> None:
    """Guidance subtracts the branches: what is wrong in both alike is wrong once in the guided output."""
    _, computed = pair(0, 4, 3)
    off = pair(1, 4, 3)[1] * 0.1
    found = []
    for sign in (1, -1):
        error = PredictionError()
        error.add("uncond", (computed + off,), (computed,), GUIDANCE)
        error.add("cond", (computed + sign * off,), (computed,), GUIDANCE)
        found.append(error.take())
    size = float(off.norm() / computed.norm())
    assert found == pytest.approx([size, (2 * GUIDANCE - 1) * size], rel=1e-4)


def test_branches_of_unlike_shapes_are_not_mixed() -> None:
    pairs = [pair(0, 1, 6, 3), pair(1, 1, 4, 3)]
    error = PredictionError()
    for branch, (predicted, computed) in zip(("cond", "uncond"), pairs, strict=True):
        error.add(branch, (predicted,), (computed,), GUIDANCE)
    predicted, computed = (torch.cat(both, dim=1) for both in zip(*pairs, strict=True))
    assert error.take() == pytest.approx(relative(predicted, computed), rel=1e-4)


def test_branches_that_end_alike_are_mixed_where_both_have_tokens() -> None:
    """One branch has text in front of the picture; guidance combines the pictures."""
    with_text, other = pair(0, 1, 6, 3), pair(1, 1, 4, 3)
    for order in (("cond", "uncond"), ("uncond", "cond")):
        error = PredictionError(ends_alike=True)
        given = {"cond": with_text, "uncond": other}
        for branch in order:
            predicted, computed = given[branch]
            error.add(branch, (predicted,), (computed,), GUIDANCE)
        guided = [c[:, -4:] * GUIDANCE + u * (1 - GUIDANCE) for c, u in zip(with_text, other, strict=True)]
        assert error.take() == pytest.approx(relative(*guided), rel=1e-4)


@pytest.mark.parametrize(("shape", "other"), [((1, 6, 3), (2, 4, 3)), ((1, 6, 3), (1, 4, 2)), ((6, 3), (4, 3))])
def test_branches_that_differ_in_more_than_their_tokens_are_not_mixed(
    shape: tuple[int, ...], other: tuple[int, ...]
) -> None:
    error, pairs = PredictionError(ends_alike=True), [pair(0, *shape), pair(1, *other)]
    for branch, (predicted, computed) in zip(("cond", "uncond"), pairs, strict=True):
        error.add(branch, (predicted,), (computed,), GUIDANCE)
    predicted, computed = (torch.cat([each.flatten() for each in both]) for both in zip(*pairs, strict=True))
    assert error.take() == pytest.approx(relative(predicted, computed), rel=1e-4)


def test_two_devices_with_a_part_each_find_the_error_of_the_whole() -> None:
    predicted, computed = pair(3, 1, 8, 3)
    sums: list[Tensor] = []
    parts = [PredictionError(), PredictionError()]
    for part, half, whole in zip(parts, predicted.chunk(2, dim=1), computed.chunk(2, dim=1), strict=True):
        part.add("cond", (half,), (whole,), None)
    parts[0].take(lambda mine: sums.append(mine.clone()))
    assert parts[1].take(lambda mine: mine.add_(sums[0])) == pytest.approx(relative(predicted, computed), rel=1e-4)


def test_memory_is_the_error_of_the_branch_that_waits() -> None:
    predicted, computed = pair(0, 5, 3)
    error = PredictionError()
    error.add("cond", (predicted,), (computed,), GUIDANCE)
    assert error.nbytes() == 5 * 3 * 4
    error.add("uncond", (predicted,), (computed,), GUIDANCE)
    assert error.nbytes() == 0
    error.add("cond", (predicted,), (computed,), GUIDANCE)
    error.forget()
    assert error.nbytes() == 0
    assert error.take() is None


def test_error_that_is_no_number_stays_none() -> None:
    error = PredictionError()
    error.add("cond", (torch.full((3,), math.nan),), (torch.ones(3),), None)
    assert math.isnan(error.take() or 0.0)


@pytest.mark.parametrize(
    ("branch", "uncond_first"), [("cond_uncond", True), ("uncond+cond", True), ("cond+uncond", False)]
)
def test_halves_of_a_batch_are_combined_in_the_order_of_its_name(branch: str, uncond_first: bool) -> None:
    uncond, cond = pair(0, 2, 5, 3), pair(1, 2, 5, 3)
    order = (uncond, cond) if uncond_first else (cond, uncond)
    error = PredictionError()
    predicted, computed = (torch.cat(both) for both in zip(*order, strict=True))
    error.add(branch, (predicted,), (computed,), GUIDANCE)
    guided = [u + GUIDANCE * (c - u) for u, c in zip(uncond, cond, strict=True)]
    assert error.take() == pytest.approx(relative(*guided), rel=1e-4)


@pytest.mark.parametrize("branch", ["cond#2", "tile", "uncond_stg", "cond of refiner"])
def test_batch_of_any_other_name_is_taken_as_a_whole(branch: str) -> None:
    predicted, computed = pair(0, 4, 5, 3)
    error = PredictionError()
    error.add(branch, (predicted,), (computed,), GUIDANCE)
    assert error.take() == pytest.approx(relative(predicted, computed), rel=1e-4)


@pytest.mark.parametrize("is_right", [True, False])
@pytest.mark.parametrize("branch", ["cond", "tile"])
def test_error_of_a_combination_takes_the_place_of_that_of_one_branch(branch: str, is_right: bool) -> None:
    predicted, computed = pair(0, 4, 5, 3)
    error = PredictionError()
    error.add(branch, (predicted, predicted), (computed, computed), GUIDANCE)
    error.combine(torch.tensor([0.09, 1.0]), torch.tensor(is_right))
    assert error.nbytes() == 0
    assert error.take() == pytest.approx(0.3 if is_right else relative(predicted, computed), rel=1e-4)
    assert error.take() is None
