"""Recording what a scheduler is given, on the scheduler alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sgl_diffusion_accel import ConfigError, UnsupportedModelError
from sgl_diffusion_accel.calibration.record import SKETCH, Recording, recording
from zoo.base import flow_euler

STEPS = 5


def pipe_of(scheduler: Any) -> Any:
    return SimpleNamespace(scheduler=scheduler)


def run(scheduler: Any, outputs: list[torch.Tensor]) -> torch.Tensor:
    scheduler.set_timesteps(len(outputs))
    sample = torch.zeros_like(outputs[0])
    for timestep, output in zip(scheduler.timesteps, outputs, strict=True):
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
    return sample


def outputs(elements: int = 48, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, elements, generator=generator) for _ in range(STEPS)]


def test_small_outputs_are_recorded_exactly() -> None:
    given = outputs()
    with recording(pipe_of(scheduler := flow_euler())) as runs:
        run(scheduler, given)
    (only,) = runs
    stacked = torch.cat(given).double().numpy()
    np.testing.assert_allclose(only.gram(), stacked @ stacked.T / 48, rtol=1e-12)
    assert only.timesteps == scheduler.timesteps.tolist()
    assert only.shape == (1, 48)
    assert only.nbytes == STEPS * 48 * 4


def test_large_outputs_are_recorded_as_bounded_sketches() -> None:
    given = outputs(4 * SKETCH)
    base = torch.randn(1, 4 * SKETCH, generator=torch.Generator().manual_seed(9))
    given = [base + 0.3 * each for each in given]
    with recording(pipe_of(scheduler := flow_euler())) as runs:
        run(scheduler, given)
    assert runs[0].nbytes == STEPS * SKETCH * 4
    stacked = torch.cat(given).double().numpy()
    np.testing.assert_allclose(runs[0].gram(), stacked @ stacked.T / stacked.shape[1], rtol=0.01)


def test_what_is_recorded_is_a_copy() -> None:
    with recording(pipe_of(scheduler := flow_euler())) as runs:
        given = outputs()
        expected = torch.cat(given).double().numpy()
        scheduler.set_timesteps(STEPS)
        for timestep, output in zip(scheduler.timesteps, given, strict=True):
            scheduler.step(output, timestep, torch.zeros(1, 48), return_dict=False)
            output.fill_(float("nan"))
    np.testing.assert_allclose(runs[0].gram(), expected @ expected.T / 48)


def test_step_returns_what_it_would() -> None:
    expected = run(flow_euler(), outputs())
    with recording(pipe_of(scheduler := flow_euler())):
        assert torch.equal(run(scheduler, outputs()), expected)


def test_arguments_by_name_are_recorded_too() -> None:
    with recording(pipe_of(scheduler := flow_euler())) as runs:
        scheduler.set_timesteps(1)
        scheduler.step(model_output=outputs()[0], timestep=scheduler.timesteps[0], sample=outputs()[1])
    assert len(runs[0].timesteps) == 1


def test_runs_are_told_apart() -> None:
    with recording(pipe_of(scheduler := flow_euler())) as runs:
        run(scheduler, outputs())
        run(scheduler, outputs(seed=1)[:3])
    assert [len(each.timesteps) for each in runs] == [STEPS, 3]


@pytest.mark.parametrize("own", [False, True])
def test_scheduler_is_put_back_also_after_an_error(own: bool) -> None:
    scheduler = flow_euler()
    if own:
        scheduler.step = scheduler.step
    before = dict(vars(scheduler))

    def fail() -> None:
        with recording(pipe_of(scheduler)):
            assert vars(scheduler)["step"] is not before.get("step")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert vars(scheduler).keys() == before.keys()
    assert all(vars(scheduler)[name] is value for name, value in before.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    record = Recording()
    record.add(torch.tensor([[1.0, value]]), 1000, torch.zeros(1, 2))
    with pytest.raises(ConfigError, match="not finite"):
        record.gram()


@pytest.mark.parametrize("pipe", [SimpleNamespace(), pipe_of(None), pipe_of(object())])
def test_pipeline_without_a_scheduler_is_refused(pipe: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="apply_adaptive_cache"), recording(pipe):
        pass
