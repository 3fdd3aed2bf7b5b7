"""Checked plans: what is measured, what it changes, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from invariants import Interrupted, Snapshot, assert_same, chosen, families
from invariants.families import few_blocks, present
from sgl_diffusion_accel import (
    CachePlan,
    ConfigError,
    ConfigTypeError,
    UnsupportedModelError,
    apply_adaptive_cache,
    apply_cache_plan,
    calibrate,
    check_plan,
)
from sgl_diffusion_accel.calibration.plan_checks import Check, factor_at
from test_plan import made
from zoo import Family

STEPS = 12


def calls(family: Family, pipe: Any, seeds: range, steps: int = STEPS) -> list[dict[str, Any]]:
    return [family.call(pipe, steps=steps, seed=seed) for seed in seeds]


def learned(family: Family) -> tuple[Any, CachePlan]:
    return few_blocks(family), _plan(family.name)


@functools.cache
def _plan(name: str) -> CachePlan:
    pipe = few_blocks(present(name))
    with torch.no_grad():
        return calibrate(pipe, calls(present(name), pipe, range(2)), teacache=False)


def final(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        output = pipe(**call)
    latents = output if isinstance(output, torch.Tensor) else output[0]
    return latents.double()


@families("wan", matrix=["flux", "qwen"])
def test_measured_error_is_that_of_the_final_latents(family: Family) -> None:
    pipe, plan = learned(family)
    shown = calls(family, pipe, range(7, 9))
    with torch.no_grad():
        checked = check_plan(pipe, plan, shown, speedups=[3.0])
    exact = [final(pipe, call) for call in shown]
    with apply_cache_plan(pipe, plan, speedup=3.0):
        cached = [final(pipe, call) for call in shown]
    square = sum(float((one - other).square().mean()) for one, other in zip(cached, exact, strict=True)) / 2
    (check,) = checked.checks
    assert (check.computed_steps, check.calls) == (4, 2)
    assert check.measured == pytest.approx((square / plan.moments.moved) ** 0.5, rel=1e-3)
    assert check.expected == plan.design(4).error
    assert checked == dataclasses.replace(plan, checks=checked.checks)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # KDPM2 and NumPy 2
@pytest.mark.parametrize(
    "scheduler",
    chosen(
        ["KDPM2DiscreteScheduler", "HeunDiscreteScheduler", "EulerDiscreteScheduler"],
        "KDPM2DiscreteScheduler",
    ),
)
def test_large_noise_levels_and_midpoints_are_planned_for(scheduler: str) -> None:
    """At half of the steps a plan keeps near what it expects, and far from what fewer steps cost."""
    family = present("cogvideox")
    pipe = family.make(scheduler=getattr(diffusers, scheduler)())
    given, steps = calls(family, pipe, range(3), steps=25), 25 if "Euler" not in scheduler else 49
    given = [{**call, "num_inference_steps": steps} for call in given]
    with torch.no_grad():
        plan = check_plan(pipe, calibrate(pipe, given[1:], teacache=False, magnitudes=False), given[:1], [2.0])
        fewer = final(pipe, {**given[0], "num_inference_steps": steps // 2}) - final(pipe, given[0])
    assert plan.steps == 49
    (check,) = plan.checks
    assert 0.3 < check.measured / check.expected < 3
    assert check.measured < 0.025 * float(fewer.square().mean().sqrt()) / plan.moments.moved**0.5


def test_speedups_become_numbers_of_computed_steps() -> None:
    family = present("flux")
    pipe, plan = learned(family)
    with torch.no_grad():
        checked = check_plan(pipe, plan, calls(family, pipe, range(1)), speedups=(5.0, 2.0, 2.05, 100))
    assert [check.computed_steps for check in checked.checks] == [6, 2, 1]


def test_check_takes_the_place_of_an_earlier_one() -> None:
    family = present("flux")
    pipe, plan = learned(family)
    old = dataclasses.replace(plan, checks=(Check(3, 0.1, 0.2, 5),))
    with torch.no_grad():
        assert [check.computed_steps for check in check_plan(pipe, old, calls(family, pipe, range(1)), [2]).checks] == [
            6
        ]


def test_factor_is_interpolated_and_held_beyond_the_checks() -> None:
    checks = (Check(16, 0.01, 0.02, 1), Check(4, 0.01, 0.08, 1))
    assert factor_at(checks, 4) == pytest.approx(8)
    assert factor_at(checks, 8) == pytest.approx(4)
    assert factor_at(checks, 16) == pytest.approx(2)
    assert factor_at(checks, 1) == pytest.approx(8)
    assert factor_at(checks, 50) == pytest.approx(2)


def test_luck_does_not_lower_what_is_expected() -> None:
    assert factor_at((Check(4, 0.01, 0.001, 1),), 4) == 1
    assert factor_at((Check(4, 0.0, 0.001, 1),), 4) == 1
    assert factor_at((), 4) == 1


def test_checks_raise_what_is_expected() -> None:
    plain = made()
    checked = made(checks=(Check(6, 1.0, 3.0, 2),))
    assert plain.expected_error(4) == plain.design(4).error
    assert checked.expected_error(4) == pytest.approx(3 * plain.design(4).error)
    assert checked.design(4) == plain.design(4)
    assert "checked on 2" in str(checked)
    assert "checked" not in str(plain)


def test_an_error_asked_for_takes_more_steps_after_a_check() -> None:
    family = present("flux")
    pipe, plan = learned(family)
    wanted = plan.design(4).error * 1.01
    assert plan.steps_for(wanted) <= 4
    checked = dataclasses.replace(plan, checks=(Check(4, 1.0, 10.0, 1),))
    assert checked.steps_for(wanted) > 4
    assert checked.expected_error(checked.steps_for(wanted)) <= wanted
    with apply_cache_plan(pipe, checked, max_error=wanted, guard=None) as patch:
        family.run(pipe, steps=STEPS)
        assert sum(patch.stats.runs[-1].branches["cond"].computed) == checked.steps_for(wanted)


def test_factor_is_that_of_the_speedup_where_the_run_has_other_steps() -> None:
    family = present("flux")
    pipe, plan = learned(family)
    checked = dataclasses.replace(plan, checks=(Check(6, 1.0, 1.0, 1), Check(3, 1.0, 1e6, 1)))
    with apply_cache_plan(pipe, checked, max_error=plan.design(6).error * 2, guard=None) as patch:
        family.run(pipe, steps=2 * STEPS)
    assert sum(patch.stats.runs[-1].branches["cond"].computed) > 6  # 6 of 24 are checked as 3 of 12, and those fail


def test_merged_plans_are_to_be_checked_anew() -> None:
    checked = made(checks=(Check(6, 1.0, 3.0, 2),))
    assert checked.merge() == checked
    assert checked.merge(made(seed=1)).checks == ()


@pytest.mark.parametrize("error", chosen([Interrupted, KeyboardInterrupt], "KeyboardInterrupt"))
def test_pipeline_is_as_before(error: type[BaseException]) -> None:
    family = present("wan")
    pipe, plan = learned(family)
    family.run(pipe, steps=STEPS)
    shown = calls(family, pipe, range(1))
    before = Snapshot(pipe)
    with torch.no_grad():
        check_plan(pipe, plan, shown, speedups=[2.0])
    assert_same(before, pipe)

    def interrupt(*_: Any) -> dict[str, Any]:
        raise error

    with torch.no_grad(), pytest.raises(error):
        check_plan(pipe, plan, [{**shown[0], "callback_on_step_end": interrupt}], speedups=[2.0])
    family.run(pipe, steps=STEPS)  # a run that is broken off leaves marks of the pipeline's own
    assert_same(before, pipe)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda kw: {**kw, "calls": []}, ConfigError, "calls is empty"),
        (lambda kw: {**kw, "calls": [3]}, ConfigTypeError, "calls holds a int"),
        (lambda kw: {**kw, "plan": 3}, ConfigTypeError, "plan is a int"),
        (lambda kw: {**kw, "speedups": []}, ConfigError, "allowed: numbers over 1"),
        (lambda kw: {**kw, "speedups": [1.0]}, ConfigError, "allowed: numbers over 1"),
        (lambda kw: {**kw, "speedups": [2.0, float("nan")]}, ConfigError, "allowed: numbers over 1"),
        (lambda kw: {**kw, "speedups": [1.01]}, ConfigError, "leave out a step"),
        (lambda kw: {**kw, "speedups": ["2x"]}, ConfigTypeError, "speedups"),
        (lambda kw: {**kw, "plan": made(transformers=("Other",))}, UnsupportedModelError, "the plan is for Other"),
        (lambda kw: {**kw, "calls": [{**kw["calls"][0], "num_inference_steps": 9}]}, ConfigError, "has made 9 steps"),
    ],
)
def test_what_cannot_be_checked_is_refused(
    change: Callable[[dict[str, Any]], dict[str, Any]], error: type[Exception], told: str
) -> None:
    family = present("wan")
    pipe, plan = learned(family)
    with torch.no_grad(), pytest.raises(error, match=told):
        check_plan(pipe, **change({"plan": plan, "calls": calls(family, pipe, range(1)), "speedups": [2.0]}))


def test_cache_on_the_pipeline_is_refused() -> None:
    family = present("wan")
    pipe, plan = learned(family)
    with apply_adaptive_cache(pipe), pytest.raises(ConfigError, match="cache"):
        check_plan(pipe, plan, calls(family, pipe, range(1)))
