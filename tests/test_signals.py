"""The distance that decides, and the tensor that it is taken of."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sgl_diffusion_accel.caching.signals import HeadResidual, relative_l1


@pytest.mark.parametrize("shape", [(7,), (2, 5, 3), (1, 2, 3, 4)])
def test_distance_is_the_mean_difference_over_the_mean_reference(shape):
    generator = np.random.default_rng(len(shape))
    now, reference = generator.normal(size=shape), generator.normal(size=shape)
    expected = np.abs(now - reference).mean() / np.abs(reference).mean()
    assert relative_l1(torch.from_numpy(now), torch.from_numpy(reference)) == pytest.approx(expected, rel=1e-6)


def test_distance_is_relative_to_the_reference_not_to_now():
    assert relative_l1(torch.tensor([4.0]), torch.tensor([1.0])) == 3.0
    assert relative_l1(torch.tensor([1.0]), torch.tensor([4.0])) == 0.75


def test_equal_signals_have_no_distance():
    signal = torch.randn(3, 4)
    assert relative_l1(signal, signal.clone()) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_averaged_in_single(dtype):
    reference = torch.ones(200_000, dtype=dtype)
    now = reference.clone()
    now[:10] = 2.0
    assert relative_l1(now, reference) == pytest.approx(10 / 200_000, rel=1e-4)


def test_large_half_precision_values_do_not_overflow_the_mean():
    reference = torch.full((1000,), 30_000.0, dtype=torch.float16)
    assert relative_l1(reference * 0.5, reference) == pytest.approx(0.5, rel=1e-3)


def test_zero_reference_is_no_small_distance():
    assert math.isinf(relative_l1(torch.ones(3), torch.zeros(3)))
    assert math.isnan(relative_l1(torch.zeros(3), torch.zeros(3)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_value_that_is_not_finite_gives_a_distance_that_is_not_finite(bad):
    assert not math.isfinite(relative_l1(torch.tensor([1.0, bad]), torch.tensor([1.0, 1.0])))
    assert not math.isfinite(relative_l1(torch.tensor([1.0, 1.0]), torch.tensor([1.0, bad])))


def test_reduction_over_devices_gives_the_distance_of_the_whole_signal():
    """Two devices hold half of the tokens each; the sum of their means stands in for the all-reduce."""
    now, reference = torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    halves = [(now[:, :3], reference[:, :3]), (now[:, 3:], reference[:, 3:])]
    means: list[torch.Tensor] = []
    for half in halves:
        relative_l1(*half, reduce=lambda pair: means.append(pair.clone()))
    assert [pair.shape for pair in means] == [(2,), (2,)]

    def add_the_other(pair):
        pair += means[1]

    assert relative_l1(*halves[0], reduce=add_the_other) == pytest.approx(relative_l1(now, reference), rel=1e-5)


def test_head_residual_is_what_the_first_blocks_added():
    before, after = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    kept_before, kept_after = before.clone(), after.clone()
    taken = HeadResidual().take(before, after)
    assert torch.equal(taken, kept_after - kept_before)
    before.zero_()
    after.zero_()
    assert torch.equal(taken, kept_after - kept_before)
