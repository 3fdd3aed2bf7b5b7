"""The distance that decides, and the tensor that it is taken of."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from sgl_diffusion_accel.caching.parts.signals import (
    HeadResidual,
    ModulatedInput,
    TimeEmbedding,
    relative_l1,
    relative_l1_steps,
)


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


# All steps of a run at once


@pytest.mark.parametrize("shape", [(2, 1), (7, 5), (4, 3, 6)])
def test_changes_of_a_run_are_those_of_each_row_from_the_one_before(shape):
    rows = np.random.default_rng(len(shape)).normal(size=shape)
    changes = relative_l1_steps(torch.from_numpy(rows).float())
    assert (changes.shape, changes.dtype) == ((shape[0],), torch.float32)
    assert changes[0] == math.inf
    for step in range(1, shape[0]):
        expected = np.abs(rows[step] - rows[step - 1]).mean() / np.abs(rows[step - 1]).mean()
        assert float(changes[step]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_changes_of_a_run_are_those_that_are_measured_step_by_step(dtype):
    rows = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    one_by_one = [relative_l1(now, before) for before, now in itertools.pairwise(rows)]
    assert relative_l1_steps(rows).tolist()[1:] == pytest.approx(one_by_one, rel=1e-6)


def test_row_of_zeros_is_no_small_change():
    changes = relative_l1_steps(torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))
    assert changes.tolist()[:4] == [math.inf, math.inf, 0.0, 1.0]
    assert math.isnan(changes[4])


def test_run_of_one_step_has_no_step_before():
    assert relative_l1_steps(torch.ones(1, 4)).tolist() == [math.inf]


def test_changes_need_no_gradient():
    assert not relative_l1_steps(torch.randn(3, 2, requires_grad=True)).requires_grad


# What is taken


@dataclass
class Step:
    """One denoising step, as far as signals look at it."""

    first: tuple[torch.Tensor, torch.Tensor] | None = None
    modulated: torch.Tensor | None = None

    def head(self):
        return self.first

    def modulated_input(self):
        assert self.modulated is not None, "the modulated input was asked for"
        return self.modulated


def test_head_residual_is_what_the_first_blocks_added():
    before, after = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    kept_before, kept_after = before.clone(), after.clone()
    taken = HeadResidual().take(Step((before, after)))
    assert torch.equal(taken, kept_after - kept_before)
    before.zero_()
    after.zero_()
    assert torch.equal(taken, kept_after - kept_before)


def test_lost_head_gives_no_signal():
    assert HeadResidual().take(Step()) is None


def test_modulated_input_is_taken_as_it_is_seen():
    modulated = torch.randn(2, 3, 4)
    assert ModulatedInput().take(Step(modulated=modulated)) is modulated


def test_teacache_compares_with_the_step_before_and_dbcache_with_the_last_computed_one():
    assert ModulatedInput.from_previous_step
    assert not HeadResidual.from_previous_step


class Timed(nn.Module):
    """A model with an embedding of timesteps, and nothing else."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Linear(1, 6)


def embed(model, timesteps, dtype):
    return model.embedding(timesteps[:, None].float() / 1000).to(dtype)


def test_time_embedding_knows_the_changes_of_a_whole_run():
    model, timesteps = Timed(), torch.linspace(1000, 30, 8)
    changes = TimeEmbedding(embed).changes(model, timesteps, torch.float32)
    weight, bias = (parameter.detach().numpy() for parameter in model.embedding.parameters())
    rows = timesteps.numpy()[:, None] / 1000 @ weight.T + bias
    expected = np.abs(np.diff(rows, axis=0)).mean(1) / np.abs(rows[:-1]).mean(1)
    assert changes[0] == math.inf
    np.testing.assert_allclose(changes[1:].numpy(), expected, rtol=1e-4)
    assert not changes.requires_grad


def test_time_embedding_is_made_in_the_dtype_of_the_hidden_states():
    seen = []

    def record(model, timesteps, dtype):
        seen.append((model, timesteps, dtype))
        return embed(model, timesteps, dtype)

    model, timesteps = Timed(), torch.tensor([900, 500, 100])
    changes = TimeEmbedding(record).changes(model, timesteps, torch.bfloat16)
    assert seen == [(model, timesteps, torch.bfloat16)]
    rows = embed(model, timesteps, torch.bfloat16)
    assert changes.tolist()[1:] == pytest.approx([relative_l1(rows[1], rows[0]), relative_l1(rows[2], rows[1])])
    assert changes.dtype == torch.float32


@pytest.mark.parametrize("signal", [HeadResidual(), ModulatedInput(), TimeEmbedding(embed)])
def test_signals_are_values(signal):
    assert signal == dataclasses.replace(signal)
    assert hash(signal) == hash(dataclasses.replace(signal))
