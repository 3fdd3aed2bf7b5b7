"""How errors grow, against a loop whose growth is known, and on pipelines."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from invariants.families import few_blocks, present
from sgl_diffusion_accel import CachePlan, ConfigError, calibrate
from sgl_diffusion_accel.caching.parts.gap_control import GapSettings
from sgl_diffusion_accel.calibration import apply_plan
from sgl_diffusion_accel.calibration.call_record import recording
from sgl_diffusion_accel.calibration.growth import (
    SHARES,
    Disturbance,
    disturbance_for,
    early_growth,
    growth_between,
)
from sgl_diffusion_accel.loop.scheduler_response import Response, euler, response_of
from test_record import pipe_of
from zoo import Family
from zoo.base import flow_euler, unipc_flow

STEPS = 20


def loop(scheduler: Any, feedback: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A run of a model that answers feedback·x and a part of its own to latents x."""
    generator = torch.Generator().manual_seed(1)
    own = torch.randn(STEPS, 1, 4096, generator=generator).cumsum(0) / STEPS
    sample = torch.randn(1, 4096, generator=generator).to(dtype)
    scheduler.set_timesteps(STEPS)
    for timestep, part in zip(scheduler.timesteps, own, strict=True):
        output = (feedback * sample.float() + part).to(dtype)
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
    return sample


def measured(scheduler: Any, feedback: float, call: int = 0, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    scheduler.set_timesteps(STEPS)
    response = response_of(scheduler, STEPS)
    assert response is not None
    made = disturbance_for(call, response)
    assert made is not None
    plain = loop(scheduler, feedback, dtype)
    with recording(pipe_of(scheduler)) as watch:
        watch.disturbance = made
        disturbed = loop(scheduler, feedback, dtype)
    found = growth_between(made, response, plain, disturbed)
    assert found is not None
    return found


@pytest.mark.parametrize("call", range(len(SHARES)))
@pytest.mark.parametrize("feedback", [0.0, -3.0, 1.5])
def test_growth_is_that_of_the_equation(feedback: float, call: int) -> None:
    """x' = a·x multiplies what is off at one step by Π (1 + a·Δσ) over the later ones."""
    scheduler = flow_euler()
    left, growth = measured(scheduler, feedback, call)
    sigmas = scheduler.sigmas.double().numpy()
    step = int(np.argmin(np.abs(sigmas[:-1] - SHARES[call])))
    assert left == pytest.approx(sigmas[step], rel=1e-4)
    assert growth == pytest.approx(np.prod(1 + feedback * np.diff(sigmas)[step + 1 :]), rel=1e-3)


def test_growth_under_a_scheduler_of_second_order() -> None:
    assert measured(unipc_flow(), 0.0)[1] == pytest.approx(1.0, rel=1e-3)
    scheduler = unipc_flow()
    left, growth = measured(scheduler, -3.0)
    after = float(scheduler.sigmas[int(np.argmin(np.abs(scheduler.sigmas.numpy() - left))) + 1])
    assert growth == pytest.approx(np.exp(3 * after), rel=0.1)


def test_growth_does_not_drown_in_half_precision() -> None:
    exact = measured(flow_euler(), -3.0)[1]
    assert measured(flow_euler(), -3.0, dtype=torch.bfloat16)[1] == pytest.approx(exact, rel=0.1)


def test_what_does_not_bend_is_not_disturbed() -> None:
    made = Disturbance(3)
    assert [made.see(torch.ones(1, 8)) for _ in range(5)] == [None] * 5
    assert growth_between(made, euler(np.linspace(1, 0, 11).tolist()), torch.ones(1), torch.ones(1)) is None


def test_one_output_is_moved_along_the_bend_and_left_as_it_is() -> None:
    made = Disturbance(3)
    plain = [torch.tensor([[float(step**3), 1.0]]) for step in range(6)]
    kept = [each.clone() for each in plain]
    moved = [made.see(each) for each in plain]
    assert all(map(torch.equal, plain, kept))
    assert [step for step, each in enumerate(moved) if each is not None] == [3]
    off = moved[3] - plain[3]
    assert off[0, 1] == 0
    assert float(off.norm()) == pytest.approx(made.moved) == pytest.approx(0.3 * float(plain[3].norm()))


@pytest.mark.parametrize("own", [False, True], ids=["class", "instance"])
@pytest.mark.parametrize("by_name", [False, True])
def test_scheduler_is_given_the_moved_output(own: bool, by_name: bool) -> None:
    """Also where somebody has put a step on the instance, and where arguments come by name."""
    scheduler = flow_euler()
    if own:
        scheduler.step = scheduler.step
    ends = []
    for made in (None, Disturbance(4)):
        scheduler.set_timesteps(8)
        sample = torch.zeros(1, 8)
        with recording(pipe_of(scheduler)) as watch:
            watch.disturbance = made
            for step, timestep in enumerate(scheduler.timesteps):
                output = torch.full((1, 1), float(step**3)).expand(1, 8)  # not to be written in place
                given = {"model_output": output, "timestep": timestep, "sample": sample}
                stepped = scheduler.step(**given) if by_name else scheduler.step(output, timestep, sample)
                sample = stepped.prev_sample
        ends.append(sample)
        assert torch.equal(watch.runs[0].final, sample)
        assert len(watch.runs[0].timesteps) == 8
    weight = abs(float(scheduler.sigmas[5] - scheduler.sigmas[4]))
    assert float((ends[1] - ends[0]).norm()) == pytest.approx(weight * made.moved, rel=1e-4)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_schedules_that_have_passed_the_place_are_not_disturbed(steps: int) -> None:
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    response = response_of(scheduler, steps)
    assert response is not None
    assert disturbance_for(0, response) is None


def test_short_runs_later_calls_and_midpoints_are_not_disturbed() -> None:
    even: Response = euler(np.linspace(1, 0, STEPS + 1).tolist())
    assert disturbance_for(len(SHARES), even) is None
    assert disturbance_for(0, euler(np.linspace(1, 0, 9).tolist())) is None
    made = disturbance_for(0, even)
    assert made is not None
    gone = even.copy()
    gone[-1, made.step] = 0.0  # as what leads to a midpoint
    other = disturbance_for(0, gone)
    assert other is not None
    assert other.step != made.step


def test_usual_growth_where_none_was_measured_and_the_mean_of_what_was() -> None:
    assert early_growth([]) == GapSettings.early
    assert early_growth([(1.0, 5.0)]) == pytest.approx(4.0)
    assert early_growth([(1.0, 5.0), (0.9, 1 + 2 * 0.9**5)]) == pytest.approx(3.0)
    assert early_growth([(1.0, 0.4)]) == 0.0, "an error that fades counts as one that stays"
    assert early_growth([(0.5, 1e9)]) < 100, "one wild run must not decide all"


# On pipelines


def given(family: Family, count: int, steps: int = 12) -> list[dict[str, Any]]:
    return [family.call(None, steps=steps, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_first_two_calls_are_made_once_more(name: str) -> None:
    family = present(name)
    pipe = few_blocks(family)
    ran: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: ran.append(1))
    without = calibrate(pipe, given(family, 3), teacache=False, magnitudes=False, growth=False)
    calls, ran[:] = len(ran), []
    plan = calibrate(pipe, given(family, 3), teacache=False, magnitudes=False)
    assert len(ran) * 3 == calls * 5
    assert without.growth == ()
    assert len(plan.growth) == 2
    assert all(
        growth > 0 and abs(left - share) < 0.1 for (left, growth), share in zip(plan.growth, SHARES, strict=True)
    )
    assert dataclasses.replace(plan, growth=(), answers=(), held_out=without.held_out) == without, (
        "what is recorded comes from the undisturbed runs alone"
    )
    assert plan.moments.early == early_growth(plan.growth)
    assert "errors of the start grow" in str(plan)
    assert "errors of the start grow" not in str(without)


def test_call_that_draws_its_noise_anew_tells_nothing() -> None:
    family = present("flux")
    pipe = few_blocks(family)
    call = {name: value for name, value in given(family, 1)[0].items() if name not in ("latents", "generator")}
    plan = calibrate(pipe, [{**call, "generator": None}], teacache=False, magnitudes=False)
    assert len(plan.growth) == 1, "calibration gives it a generator of its own"
    prepare = pipe.prepare_latents
    pipe.prepare_latents = lambda *args: prepare(
        *[None if isinstance(each, torch.Generator) else each for each in args]
    )
    assert calibrate(pipe, [call], teacache=False, magnitudes=False).growth == ()


def test_disturbed_run_that_fails_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    family = present("flux")
    ran: list[int] = []

    def fail(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        ran.append(step)
        if len(ran) > 12 + 3:
            raise RuntimeError("only once")
        return values

    call = {**given(family, 1)[0], "callback_on_step_end": fail}
    plan = calibrate(few_blocks(family), [call], tmp_path / "plan.json", teacache=False)
    assert plan.growth == ()
    assert CachePlan.load(tmp_path / "plan.json") == plan
    assert "only once" in caplog.text


def test_growth_that_a_file_is_without_is_measured_by_the_next_calls(tmp_path: Path) -> None:
    family = present("flux")
    path = tmp_path / "plan.json"
    calibrate(few_blocks(family), given(family, 2), path, teacache=False, growth=False)
    assert len(calibrate(few_blocks(family), given(family, 3), path, teacache=False).growth) == 1
    assert len(calibrate(few_blocks(family), given(family, 5), path, teacache=False).growth) == 2


def test_run_that_begins_later_has_passed_the_place_where_errors_grow() -> None:
    family = present("flux")
    plan = calibrate(few_blocks(family), given(family, 1), teacache=False, magnitudes=False, growth=False)
    plan = dataclasses.replace(plan, growth=[(1.0, 9.0)])
    half = np.ascontiguousarray(plan.moments.response[6:, 6:])
    same = apply_plan._moments(plan, plan.timesteps, plan.moments.response.tobytes(), 1.0)
    late = apply_plan._moments(plan, plan.timesteps[6:], half.tobytes(), 0.5)
    assert same.early == pytest.approx(8.0)
    assert late.early == pytest.approx(8.0 / 32)


def test_disturbed_run_that_fails_leaves_nothing_behind() -> None:
    family = present("flux")
    pipe = few_blocks(family)
    runs = []

    def fail(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        runs.append(step)
        if len(runs) > 12 + 3:
            raise KeyboardInterrupt
        return values

    family.run(pipe, steps=12)
    before, kind = dict(vars(pipe.scheduler)), type(pipe.scheduler)
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, [{**given(family, 1)[0], "callback_on_step_end": fail}], teacache=False)
    assert type(pipe.scheduler) is kind
    assert set(vars(pipe.scheduler)) == set(before)


def test_growth_is_kept_merged_and_read_from_files_of_before(tmp_path: Path) -> None:
    family = present("flux")
    plan = calibrate(few_blocks(family), given(family, 1), tmp_path / "plan.json", teacache=False)
    assert CachePlan.load(tmp_path / "plan.json") == plan
    assert plan.merge(plan).growth == plan.growth * 2
    fields = json.loads((tmp_path / "plan.json").read_text())
    del fields["growth"]
    (tmp_path / "old.json").write_text(json.dumps(fields))
    assert CachePlan.load(tmp_path / "old.json").growth == ()


@pytest.mark.parametrize(
    "growth", [[(0.0, 1.0)], [(1.5, 1.0)], [(0.9, -1.0)], [(0.9, float("nan"))], [(0.9,)], [(1e-9, 2.0)]]
)
def test_growth_that_cannot_be_is_refused(growth: Any) -> None:
    family = present("flux")
    plan = calibrate(few_blocks(family), given(family, 1), teacache=False, magnitudes=False, growth=False)
    with pytest.raises(ConfigError, match="growth"):
        dataclasses.replace(plan, growth=growth)
