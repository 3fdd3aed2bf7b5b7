"""The history keeps the newest residual and differences, and answers as if it kept the residuals themselves."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from sgl_diffusion_accel.caching.parts.history import History

CUBIC = (4.0, -6.0, 4.0, -1.0)
"""Weights of the cubic through four even steps: large, of both signs."""


def filled(depth, residuals, times=None):
    history = History(depth)
    for index, residual in enumerate(residuals):
        history.append(float(index) if times is None else times[index], (residual,))
    return history


def weighed(residuals, weights):
    """The weighted sum of the newest residuals, newest first, in double precision."""
    newest = list(reversed(residuals))[: len(weights)]
    return sum(weight * residual.double() for weight, residual in zip(weights, newest, strict=True))


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_combination_is_the_weighted_sum_of_the_newest_residuals(depth, count):
    generator = torch.Generator().manual_seed(depth * 10 + count)
    residuals = [torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(count)]
    kept = min(depth, count)
    weights = torch.randn(kept, generator=generator, dtype=torch.float64)
    weights = (weights + (1 - weights.sum()) / kept).tolist()
    combined = filled(depth, residuals).combine(0, weights)
    torch.testing.assert_close(combined, weighed(residuals, weights), rtol=1e-12, atol=1e-12)


def test_times_are_newest_first_and_no_more_than_the_depth():
    history = filled(3, [torch.zeros(1)] * 5, times=[0.0, 1.0, 4.0, 6.0, 7.0])
    assert history.times == (7.0, 6.0, 4.0)
    assert len(history) == 3


def test_new_history_is_empty():
    history = History(2)
    assert len(history) == 0
    assert history.times == ()
    assert history.nbytes() == 0


def test_reuse_gives_the_newest_residual_bit_by_bit():
    residuals = [torch.randn(5, dtype=torch.bfloat16) for _ in range(3)]
    history = filled(3, residuals)
    assert torch.equal(history.combine(0, (1.0,)), residuals[-1])
    assert torch.equal(history.combine(0, (1.0, 0.0, 0.0)), residuals[-1])


def test_streams_are_combined_each_by_itself():
    history = History(2)
    history.append(0.0, (torch.tensor([1.0]), torch.tensor([10.0, 20.0])))
    history.append(1.0, (torch.tensor([2.0]), torch.tensor([40.0, 80.0])))
    assert history.combine(0, (2.0, -1.0)).tolist() == [3.0]
    assert history.combine(1, (2.0, -1.0)).tolist() == [70.0, 140.0]


def test_unchanged_stream_stays_without_a_residual():
    history = History(3)
    for time in range(4):
        history.append(float(time), (torch.ones(2) * time, None))
    assert history.combine(1, (3.0, -3.0, 1.0)) is None
    assert history.combine(0, (3.0, -3.0, 1.0)).tolist() == [4.0, 4.0]


def test_stream_that_changes_only_sometimes_is_no_error():
    history = History(2)
    history.append(0.0, (None, torch.ones(2)))
    history.append(1.0, (torch.ones(2), None))
    assert history.combine(0, (2.0, -1.0)).tolist() == [1.0, 1.0]
    assert history.combine(1, (2.0, -1.0)) is None


def test_combining_leaves_what_is_kept_as_it_was():
    residuals = [torch.randn(6) for _ in range(4)]
    copies = [residual.clone() for residual in residuals]
    history = filled(4, residuals)
    first = history.combine(0, CUBIC).clone()
    history.combine(0, (0.5, 0.5))
    assert torch.equal(history.combine(0, CUBIC), first)
    assert all(torch.equal(residual, copy) for residual, copy in zip(residuals, copies, strict=True))


def test_half_precision_loses_less_than_the_sum_of_large_residuals():
    generator = torch.Generator().manual_seed(0)
    large = 8 * torch.randn(4096, generator=generator, dtype=torch.float64)
    drift = torch.randn(4096, generator=generator, dtype=torch.float64)
    exact = [(large + 0.02 * step * drift).to(torch.bfloat16) for step in range(4)]
    wanted = weighed(exact, CUBIC)
    naive = torch.zeros(4096, dtype=torch.bfloat16)
    for weight, residual in zip(CUBIC, reversed(exact), strict=True):
        naive = naive.add(residual, alpha=weight)
    combined = filled(4, exact).combine(0, CUBIC)
    assert combined.dtype == torch.bfloat16
    assert (combined.double() - wanted).norm() < 0.7 * (naive.double() - wanted).norm()


@pytest.mark.parametrize(("depth", "count", "kept"), [(1, 5, 1), (2, 1, 1), (2, 5, 2), (3, 2, 2), (4, 9, 4)])
def test_memory_is_one_tensor_a_kept_step_and_stream(depth, count, kept):
    history = History(depth)
    for time in range(count):
        history.append(float(time), (torch.zeros(10, 10), None, torch.zeros(7, dtype=torch.float16)))
    assert history.nbytes() == kept * (10 * 10 * 4 + 7 * 2)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_older_residuals_are_let_go(depth):
    history = History(depth)
    residuals = [torch.zeros(3) for _ in range(6)]
    alive = [weakref.ref(residual) for residual in residuals]
    for time, residual in enumerate(residuals):
        history.append(float(time), (residual,))
    del residuals, residual
    gc.collect()
    assert [reference() is not None for reference in alive] == [False] * 5 + [True]


def test_oldest_step_can_be_dropped():
    history = History(3)
    for time, value in ((0.0, 5.0), (1.0, 1.0), (2.0, 2.0)):
        history.append(time, (torch.tensor([value]),))
    history.drop_oldest()
    assert history.times == (2.0, 1.0)
    assert history.combine(0, (2.0, -1.0)).item() == 3.0
    assert history.nbytes() == 2 * 4


def test_all_but_the_newest_can_be_forgotten():
    history = History(3)
    for time, value in ((0.0, 5.0), (1.0, 1.0), (2.0, 2.0)):
        history.append(time, (torch.tensor([value]),))
    history.keep_newest()
    assert history.times == (2.0,)
    assert history.combine(0, (1.0,)).item() == 2.0
    assert history.nbytes() == 4
    history.append(4.0, (torch.tensor([6.0]),))
    assert history.times == (4.0, 2.0)
    assert history.combine(0, (1.5, -0.5)).item() == 8.0
