"""Recording what a scheduler is given, on the scheduler alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sgl_diffusion_accel import ConfigError, UnsupportedModelError
from sgl_diffusion_accel.calibration.call_record import LATENTS, SKETCH, Recording, recording
from zoo.base import flow_euler, unipc_flow

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
    with recording(pipe_of(scheduler := flow_euler())) as watch:
        runs = watch.runs
        run(scheduler, given)
    (only,) = runs
    stacked = torch.cat(given).double().numpy()
    np.testing.assert_allclose(only.gram(), stacked @ stacked.T / 48, rtol=1e-12)
    assert only.timesteps == scheduler.timesteps.tolist()
    assert only.shape == (1, 48)
    assert only.nbytes == STEPS * 2 * 48 * 4, "outputs and latents"


def test_large_outputs_are_recorded_as_bounded_sketches() -> None:
    given = outputs(4 * SKETCH)
    base = torch.randn(1, 4 * SKETCH, generator=torch.Generator().manual_seed(9))
    given = [base + 0.3 * each for each in given]
    with recording(pipe_of(scheduler := flow_euler())) as watch:
        runs = watch.runs
        run(scheduler, given)
    assert runs[0].nbytes == STEPS * (SKETCH + LATENTS) * 4
    stacked = torch.cat(given).double().numpy()
    np.testing.assert_allclose(runs[0].gram(), stacked @ stacked.T / stacked.shape[1], rtol=0.01)


def test_what_is_recorded_is_a_copy() -> None:
    with recording(pipe_of(scheduler := flow_euler())) as watch:
        runs = watch.runs
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
    with recording(pipe_of(scheduler := flow_euler())) as watch:
        runs = watch.runs
        scheduler.set_timesteps(1)
        scheduler.step(model_output=outputs()[0], timestep=scheduler.timesteps[0], sample=outputs()[1])
    assert len(runs[0].timesteps) == 1


def test_runs_are_told_apart() -> None:
    with recording(pipe_of(scheduler := flow_euler())) as watch:
        runs = watch.runs
        run(scheduler, outputs())
        run(scheduler, outputs(seed=1)[:3])
    assert [len(each.timesteps) for each in runs] == [STEPS, 3]


Move = Callable[[Any, list[torch.Tensor]], tuple[torch.Tensor, ...]]


def two_at_once(scheduler: Any, given: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """As LTX-2, Kandinsky 6 and Cosmos 3 move picture and sound: a copy of the scheduler for the second one."""
    sound_scheduler = copy.deepcopy(scheduler)
    for each in (sound_scheduler, scheduler):
        each.set_timesteps(len(given))
    picture, sound = torch.zeros_like(given[0]), torch.zeros(1, 2)
    for timestep, output in zip(scheduler.timesteps, given, strict=True):
        picture = scheduler.step(output, timestep, picture, return_dict=False)[0]
        sound = sound_scheduler.step(9 * output[:, :2], timestep, sound, return_dict=False)[0]
    return picture, sound


def copied_when_set(scheduler: Any, given: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """As Cosmos 3 has it: copied with the timesteps already set."""
    scheduler.set_timesteps(len(given))
    second = copy.deepcopy(scheduler)
    picture, sound = torch.zeros_like(given[0]), torch.zeros(1, 2)
    for timestep, output in zip(scheduler.timesteps, given, strict=True):
        sound = second.step(9 * output[:, :2], timestep, sound, return_dict=False)[0]
        picture = scheduler.step(output, timestep, picture, return_dict=False)[0]
    return picture, sound


def copies_alone(scheduler: Any, given: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """As SkyReels-V2 moves each frame by a scheduler of its own."""
    scheduler.set_timesteps(len(given))
    frames = [(copy.deepcopy(scheduler), torch.zeros(1, 24)) for _ in range(2)]
    for index, output in enumerate(given):
        halves = output.chunk(2, dim=1)
        frames = [
            (each, each.step(half, each.timesteps[index], frame, return_dict=False)[0])
            for (each, frame), half in zip(frames, halves, strict=True)
        ]
    return tuple(frame for _, frame in frames)


@pytest.mark.parametrize("move", [two_at_once, copied_when_set, copies_alone])
@pytest.mark.parametrize("scheduler", [flow_euler, unipc_flow])
def test_copies_of_the_scheduler_are_plain_ones(move: Move, scheduler: Callable[[], Any]) -> None:
    given = outputs()
    expected = move(scheduler(), given)
    with recording(pipe_of(watched := scheduler())) as watch:
        runs = watch.runs
        moved = move(watched, given)
        assert type(copy.deepcopy(watched)) is type(scheduler())
    assert all(torch.equal(one, other) for one, other in zip(moved, expected, strict=True))
    if move is copies_alone:
        assert not runs
    else:
        (only,) = runs
        assert only.shape == (1, 48), "the pipeline's own scheduler moves the picture"
        assert len(only.timesteps) == STEPS
        assert only.final is not None
        assert torch.equal(only.final, expected[0])


def test_schedule_that_is_not_set_anew_begins_another_run_when_it_is_through() -> None:
    """Video in parts: a pipeline may go through the same timesteps for each of them."""
    with recording(pipe_of(scheduler := flow_euler())) as watch:
        runs = watch.runs
        scheduler.set_timesteps(STEPS)
        for _ in range(2):
            scheduler._step_index = None
            for timestep, output in zip(scheduler.timesteps, outputs(), strict=True):
                scheduler.step(output, timestep, output)
    assert [len(each.timesteps) for each in runs] == [STEPS, STEPS]


def test_two_recordings_at_once() -> None:
    pipe = pipe_of(flow_euler())
    with recording(pipe) as outer, recording(pipe) as inner:
        run(pipe.scheduler, outputs())
    assert len(outer.runs[0].timesteps) == len(inner.runs[0].timesteps) == STEPS
    assert type(pipe.scheduler) is type(flow_euler())


@pytest.mark.parametrize("own", [False, True])
def test_scheduler_is_put_back_also_after_an_error(own: bool) -> None:
    scheduler = flow_euler()
    if own:
        scheduler.step = scheduler.step
    before, kind = dict(vars(scheduler)), type(scheduler)
    plain = scheduler.step

    def fail() -> None:
        with recording(pipe_of(scheduler)):
            assert scheduler.step != plain
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert type(scheduler) is kind
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
