"""How a model answers to latents that are off, against a loop whose answer is known, and on pipelines."""

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
from sgl_diffusion_accel.calibration import apply_plan, call_record
from sgl_diffusion_accel.calibration.call_record import recording
from sgl_diffusion_accel.calibration.designs.answers import MOST, Answers, answer_at, answers_between, scale_of
from sgl_diffusion_accel.calibration.designs.design import Moments
from sgl_diffusion_accel.calibration.growth import Disturbance, disturbance_for
from sgl_diffusion_accel.calibration.plan_checks import Check
from sgl_diffusion_accel.loop.scheduler_response import Response, euler, left_at, response_of
from test_growth import given
from test_plan import made
from test_record import pipe_of
from zoo.base import flow_euler, unipc_flow

STEPS = 20
DISTURBED = 4


def response_for(scheduler: Any, steps: int = STEPS) -> Response:
    scheduler.set_timesteps(steps)
    response = response_of(scheduler, steps)
    assert response is not None
    return response


def loop(scheduler: Any, along: float, across: float, dtype: torch.dtype, steps: int) -> None:
    """A run of a model that answers along·x + across·R x and a part of its own; R is a quarter turn."""
    generator = torch.Generator().manual_seed(1)
    own = torch.randn(steps, 1, 4096, generator=generator).cumsum(0) / steps
    sample = torch.randn(1, 4096, generator=generator).to(dtype)
    scheduler.set_timesteps(steps)
    for timestep, part in zip(scheduler.timesteps, own, strict=True):
        one, other = sample.float().chunk(2, -1)
        output = along * sample.float() + across * torch.cat([-other, one], -1) + part
        sample = scheduler.step(output.to(dtype), timestep, sample, return_dict=False)[0]


def measured(
    scheduler: Any, along: float, across: float, dtype: torch.dtype = torch.float32, steps: int = STEPS
) -> Answers:
    response = response_for(scheduler, steps)
    made = disturbance_for(0, response) or Disturbance(DISTURBED)
    with recording(pipe_of(scheduler)) as watch:
        loop(scheduler, along, across, dtype, steps)
        watch.disturbance = made
        loop(scheduler, along, across, dtype, steps)
    plain, run = (each.seen() for each in watch.runs)
    assert plain is not None
    assert run is not None
    return answers_between(response, plain, run, made.step)


def sd_euler() -> Any:
    """With noise levels up to 15: the latents move by 15 outputs."""
    return diffusers.EulerDiscreteScheduler()


@pytest.mark.parametrize("make", [flow_euler, unipc_flow, sd_euler])
@pytest.mark.parametrize(("along", "across"), [(0.0, 0.0), (0.8, 0.0), (-1.5, 0.0), (0.0, 0.7), (-0.5, 0.4)])
def test_answer_is_that_of_the_model(make: Any, along: float, across: float) -> None:
    """Relative to the error and times the share of the run that is left, in units of the latents."""
    scheduler = make()
    response = response_for(scheduler)
    scale = np.abs(response[-1]).sum()
    found = np.array(measured(scheduler, along / scale, across / scale))
    left = left_at(response[-1])[-len(found) :]
    assert STEPS > len(found) > STEPS - 2 * DISTURBED
    np.testing.assert_allclose(found[:, 0], left, rtol=1e-9)
    np.testing.assert_allclose(found[:, 1], along * left, atol=2e-3)
    np.testing.assert_allclose(found[:, 2], across * left, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize(("along", "across"), [(0.8, 0.0), (-1.5, 0.7)])
def test_answer_does_not_drown_in_half_precision(along: float, across: float, steps: int, dtype: torch.dtype) -> None:
    """Rounding of the latents is a part of what is off, that of the outputs comes on top of what is across."""
    exact, rough = (np.array(measured(flow_euler(), along, across, each, steps)) for each in (torch.float32, dtype))
    np.testing.assert_allclose(rough[:, 1], exact[:, 1], atol=0.05)
    np.testing.assert_allclose(rough[:, 2], exact[:, 2], atol=0.2 if dtype == torch.bfloat16 else 0.05)


def turning(change: dict[int, list[float]], response: Response, moved: list[float]) -> Answers:
    """Of outputs that are off as given, where step 1 was moved."""
    size = (response.shape[1], 2)
    plain = torch.randn(*size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    off = torch.zeros(*size, dtype=torch.float64)
    for step, by in change.items():
        off[step] = torch.tensor(by, dtype=torch.float64)
    given = off.clone()
    given[1] += torch.tensor(moved, dtype=torch.float64)
    latents = torch.from_numpy(response[:-1]) @ given
    return answers_between(response, (plain, torch.zeros_like(plain)), (plain + off, latents), 1)


EVEN = euler(np.linspace(1, 0, 5).tolist())


def test_what_lies_along_and_what_lies_across_are_told_apart() -> None:
    found = turning({2: [3.0, -4.0]}, EVEN, [-4.0, 0.0])  # at step 2 the latents are off by (1, 0), with half to go
    assert found[0] == pytest.approx((0.5, 1.5, 2.0))
    assert found[1] == pytest.approx((0.25, 0.0, 0.0))


def test_answer_of_the_disturbed_step_itself_is_none() -> None:
    assert [left for left, *_ in turning({}, EVEN, [1.0, 0.0])] == pytest.approx([0.5, 0.25])


def test_steps_where_nothing_is_off_are_left_out() -> None:
    assert turning({}, EVEN, [0.0, 0.0]) == ()
    forgets = EVEN.copy()
    forgets[3, 1] = 0.0
    assert [left for left, *_ in turning({}, forgets, [1.0, 0.0])] == pytest.approx([0.5])


def test_outputs_that_are_not_finite_tell_nothing() -> None:
    found = turning({2: [float("nan"), 0.0]}, EVEN, [1.0, 0.0])
    assert np.isfinite(found).all()


def test_wild_answers_are_clipped() -> None:
    found = turning({2: [-1e6, 1e5], 3: [0.0, 0.0]}, EVEN, [-4.0, 0.0])
    assert found[0] == (pytest.approx(0.5), -MOST, MOST)


def test_scale_is_the_share_that_is_left_in_units_of_the_latents() -> None:
    np.testing.assert_allclose(scale_of(EVEN), [1.0, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(scale_of(15 * EVEN), 15 * scale_of(EVEN))
    weightless = EVEN.copy()
    weightless[:, -1] = 0.0  # as DEIS does with the last output
    assert (scale_of(weightless) > 0).all()


# Between the measured steps


ONE: Answers = ((0.8, -1.0, 3.0), (0.4, 1.0, 1.0))


def test_answer_between_steps_is_interpolated_and_held_beyond_them() -> None:
    found = answer_at(np.array([1.0, 0.8, 0.6, 0.5, 0.4, 0.1]), [ONE])
    np.testing.assert_allclose(found.along, [-1.0, -1.0, 0.0, 0.5, 1.0, 1.0], atol=1e-12)
    np.testing.assert_allclose(found.across, [3.0, 3.0, 2.0, 1.5, 1.0, 1.0])


def test_runs_count_by_their_mean_and_root_mean_square() -> None:
    found = answer_at(np.array([0.8, 0.6]), [ONE, ((0.7, 0.5, 1.0),), ()])
    np.testing.assert_allclose(found.along, [-0.25, 0.25])
    np.testing.assert_allclose(found.across, [5**0.5, 2.5**0.5])


@pytest.mark.parametrize("answers", [[], [()]])
def test_usual_answer_where_none_was_measured(answers: list[Answers]) -> None:
    found = answer_at(np.array([1.0, 0.5]), answers)
    np.testing.assert_allclose(found.along, [0.0, 0.0])
    np.testing.assert_allclose(found.across, [2.0, 1.0])


def test_run_that_begins_later_has_the_answers_of_its_part() -> None:
    whole = Moments(np.eye(4), EVEN, (ONE,))
    later = Moments(np.eye(2), np.ascontiguousarray(EVEN[2:, 2:]), (ONE,), reach=0.5)
    assert later.left.tolist() == pytest.approx([1.0, 0.5])
    np.testing.assert_allclose(later.answer.along, whole.answer.along[2:])
    np.testing.assert_allclose(later.answer.across, whole.answer.across[2:])


def test_plan_for_a_run_that_begins_later_takes_its_part() -> None:
    plan = made(answers=(ONE,))
    response = plan.moments.response
    half = np.ascontiguousarray(response[6:, 6:])
    same = apply_plan._moments(plan, plan.timesteps, response.tobytes(), 1.0)
    late = apply_plan._moments(plan, plan.timesteps[6:], half.tobytes(), 0.5)
    assert same.answers == late.answers == plan.answers
    assert (same.reach, late.reach) == (1.0, 0.5)
    np.testing.assert_allclose(same.answer.along, plan.moments.answer.along)
    np.testing.assert_allclose(late.answer.along, same.answer.along[6:])


# On pipelines


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_first_two_calls_tell_how_the_model_answers(name: str) -> None:
    family = present(name)
    plan = calibrate(few_blocks(family), given(family, 3), teacache=False, magnitudes=False)
    assert len(plan.answers) == len(plan.growth) == 2
    for answers, (disturbed, _) in zip(plan.answers, plan.growth, strict=True):
        left = [each for each, *_ in answers]
        assert left == sorted(left, reverse=True)
        assert disturbed > left[0]
        assert len(left) == sum(plan.moments.left < disturbed - 1e-9)
        assert all(across > 0 for *_, across in answers)
    assert plan.moments.answers == plan.answers


def test_nothing_is_measured_without_growth() -> None:
    family = present("flux")
    plan = calibrate(few_blocks(family), given(family, 1), teacache=False, magnitudes=False, growth=False)
    assert plan.answers == ()


def test_call_that_draws_its_noise_anew_tells_no_answer() -> None:
    family = present("flux")
    pipe = few_blocks(family)
    call = {name: value for name, value in given(family, 1)[0].items() if name not in ("latents", "generator")}
    prepare = pipe.prepare_latents
    pipe.prepare_latents = lambda *args: prepare(
        *[None if isinstance(each, torch.Generator) else each for each in args]
    )
    assert calibrate(pipe, [call], teacache=False, magnitudes=False).answers == ()


def test_the_same_elements_of_outputs_and_latents_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_record, "SKETCH", 16)
    monkeypatch.setattr(call_record, "LATENTS", 4)
    record = call_record.Recording()
    for step in range(3):
        output = torch.arange(100.0).view(1, 4, 25) + 1000 * step
        record.add(output, 3 - step, -output)
    seen = record.seen()
    assert seen is not None
    outputs, latents = seen
    assert torch.equal(outputs, -latents)
    assert outputs.shape == (3, 4)
    assert len(set(outputs[0].tolist())) == 4
    assert record.nbytes == 3 * (16 + 4) * 4


def test_latents_of_another_shape_than_the_outputs_are_not_compared() -> None:
    record = call_record.Recording()
    record.add(torch.ones(1, 8), 1, torch.ones(1, 4))
    assert record.seen() is None


def test_answers_that_a_file_is_without_are_measured_by_the_next_calls(tmp_path: Path) -> None:
    """Also where it has the growth, as files of before have."""
    family = present("flux")
    path = tmp_path / "plan.json"
    before = calibrate(few_blocks(family), given(family, 1), path, teacache=False, magnitudes=False)
    dataclasses.replace(before, answers=()).save(path)
    after = calibrate(few_blocks(family), given(family, 2), path, teacache=False, magnitudes=False)
    assert (len(after.growth), len(after.answers)) == (2, 1)
    assert after.answers[0][0][0] == pytest.approx(before.answers[0][0][0]), "at the first place"


# Kept


def test_answers_are_kept_and_merged(tmp_path: Path) -> None:
    plan = made(answers=[[list(each) for each in ONE]])
    assert plan.answers == (ONE,)
    plan.save(tmp_path / "plan.json")
    assert CachePlan.load(tmp_path / "plan.json") == plan
    other = made(answers=(((0.7, 0.0, 1.0),),))
    assert plan.merge(other, made()).answers == (ONE, *other.answers)


def test_file_of_before_has_no_answers_and_loses_its_checks(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = made(answers=(ONE,), checks=(Check(4, 0.01, 0.02, 1),))
    plan.save(path)
    assert CachePlan.load(path).checks == plan.checks
    fields = json.loads(path.read_text())
    del fields["answers"]
    path.write_text(json.dumps(fields))
    old = CachePlan.load(path)
    assert old == dataclasses.replace(plan, answers=(), checks=())


@pytest.mark.parametrize(
    "answers",
    [
        (((0.0, 0.0, 1.0),),),
        (((1.1, 0.0, 1.0),),),
        (((0.5, 0.0, 1.0), (0.6, 0.0, 1.0)),),
        (((0.5, 0.0, -0.1),),),
        (((0.5, float("nan"), 1.0),),),
        (((0.5, 0.0, float("inf")),),),
        (((0.5, 20.1, 1.0),),),
        (((0.5, -20.1, 1.0),),),
        (((0.5, 0.0, 20.1),),),
        (((0.5, 0.0),),),
        (((0.5, 0.0, 1.0, 2.0),),),
        ((),),
        (ONE, ()),
    ],
)
def test_answers_that_cannot_be_are_refused(answers: Any) -> None:
    with pytest.raises(ConfigError, match="answers"):
        made(answers=answers)


def test_answers_at_the_edge_of_what_is_allowed() -> None:
    edge = ((1.0, MOST, MOST), (1.0, -MOST, 0.0), (1e-6, 0.0, 0.0))
    assert made(answers=(edge,)).answers == (edge,)
