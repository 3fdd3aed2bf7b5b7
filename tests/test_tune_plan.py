"""Tuned plans: the best of the tried designs is kept and used, for the runs that it was tried on, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from invariants import Interrupted, Snapshot, assert_same
from invariants.families import present
from sgl_diffusion_accel import (
    CachePlan,
    ConfigError,
    ConfigTypeError,
    UnsupportedModelError,
    apply_adaptive_cache,
    apply_cache_plan,
    check_plan,
    tune_plan,
)
from sgl_diffusion_accel.calibration import apply_plan
from sgl_diffusion_accel.calibration.call_record import recording
from sgl_diffusion_accel.calibration.designs.answers import Answers
from sgl_diffusion_accel.calibration.designs.design import DesignSettings, as_foreseen
from sgl_diffusion_accel.calibration.designs.design_search import best_design
from sgl_diffusion_accel.calibration.designs.tuned import (
    NAMES,
    USUAL,
    Tuned,
    answers_for,
    design_named,
    designs_to_try,
    settings_named,
)
from sgl_diffusion_accel.calibration.paired_runs import PairedRuns
from sgl_diffusion_accel.calls import read_calls
from test_check_plan import calls, final, learned
from test_plan import made

COMPUTED = 4
"""Of twelve steps."""

LEARNED = (((0.8, -1.0, 3.0), (0.1, 1.0, 0.5)),)
"""Answers to the errors of the usual design."""


def answers_of(pipe: Any, plan: CachePlan, call: dict[str, Any]) -> tuple[Answers, ...]:
    """How the model answers to the errors of the usual design."""
    with recording(pipe) as watch, torch.no_grad():
        runs = PairedRuns(pipe, plan, watch)
        runs.begin(read_calls(pipe, [call], "")[0])
        runs.square(plan, COMPUTED)
        return (runs.answers(),)


def error_of(pipe: Any, plan: CachePlan, tuned: Tuned, call: dict[str, Any]) -> float:
    """How far a run by a design is off."""
    exact = final(pipe, call)
    with apply_cache_plan(pipe, dataclasses.replace(plan, tuned=(tuned,)), computed_steps=tuned.computed_steps):
        return float((final(pipe, call) - exact).square().mean().sqrt())


def test_best_of_the_tried_designs_is_kept() -> None:
    family = present("wan")
    pipe, plan = learned(family)
    found = []
    for call in calls(family, pipe, range(7, 10)):
        with torch.no_grad():
            (tuned,) = tune_plan(pipe, plan, [call], speedups=[3.0], designs=4).tuned
        answers = answers_of(pipe, plan, call)
        tried = designs_to_try(COMPUTED, plan.moments, 4, answers)
        errors = {
            name: error_of(pipe, plan, Tuned(COMPUTED, name, 1.0, 1, answers_for(name, answers)), call)
            for name in tried
        }
        assert tuned.computed_steps == COMPUTED
        assert errors[tuned.design] == min(errors.values())
        assert tuned.gain == pytest.approx(errors[USUAL] / errors[tuned.design], rel=1e-3)
        assert tuned.calls == 1
        found.append(tuned.design)
    assert set(found) != {USUAL}, "there is something to choose"


def test_tuned_design_is_the_one_that_runs() -> None:
    family = present("wan")
    pipe, plan = learned(family)
    designs = designs_to_try(COMPUTED, plan.moments, len(NAMES), LEARNED)
    assert any(answers_for(name, LEARNED) for name in designs)
    for name, design in designs.items():
        tuned = Tuned(COMPUTED, name, 2.0, 1, answers_for(name, LEARNED))
        chosen = dataclasses.replace(plan, tuned=(tuned,))
        assert chosen.design(COMPUTED) == design
        with apply_cache_plan(pipe, chosen, computed_steps=COMPUTED) as patch, torch.no_grad():
            pipe(**calls(family, pipe, range(1))[0])
            (branch,) = {each.computed for each in patch.stats.runs[0].branches.values()}
        assert branch == design.mask
    assert len({design.mask for design in designs.values()}) == len(designs) > 1


def test_other_speedups_and_schedules_are_designed_as_before() -> None:
    plan = made(steps=20)
    name = next(each for each in ("stiff", "loose") if design_named(each, 7, plan.moments) != plan.design(7))
    tuned = dataclasses.replace(plan, tuned=(Tuned(7, name, 2.0, 3),))
    response, moments = plan.moments.response.tobytes(), plan.moments
    assert tuned.design(7) != plan.design(7)
    assert tuned.design(6) == plan.design(6)
    assert apply_plan._design(tuned, plan.timesteps, response, 1.0, 7) == tuned.design(7)
    later = tuple(each * 0.97 for each in plan.timesteps)
    assert apply_plan._design(tuned, later, response, 1.0, 7) == apply_plan._design(plan, later, response, 1.0, 7)
    other = np.tril(moments.response, -1) * 1.1
    assert apply_plan._design(tuned, plan.timesteps, other.tobytes(), 1.0, 7) == apply_plan._design(
        plan, plan.timesteps, other.tobytes(), 1.0, 7
    )


def test_tuning_takes_the_place_of_an_earlier_one_and_drops_checks() -> None:
    family = present("flux")
    pipe, plan = learned(family)
    given = calls(family, pipe, range(1))
    with torch.no_grad():
        old = dataclasses.replace(
            check_plan(pipe, plan, given, [2.0]), tuned=(Tuned(9, "stiff", 1.5, 2), Tuned(6, "loose", 1e6, 2))
        )
        tuned = tune_plan(pipe, old, given, speedups=[2.0, 4.0], designs=2)
    assert [each.computed_steps for each in tuned.tuned] == [9, 6, 3]
    assert tuned.tuned[0] == old.tuned[0]
    assert tuned.tuned[1] != old.tuned[1]
    assert tuned.checks == ()
    assert dataclasses.replace(tuned, tuned=(), checks=()) == plan


def test_tuned_design_is_expected_to_err_by_what_is_usual() -> None:
    """Designs rest on other beliefs; what one of them expects of itself is no measure."""
    moments = made(steps=20).moments
    usual = DesignSettings.of(moments)
    for name in NAMES:
        found, own = design_named(name, 7, moments), best_design(7, moments, settings_named(name, moments))
        assert (found.mask, found.weights) == (own.mask, own.weights)
        if name == "little across":
            assert own.error < 0.9 * found.error
    again = as_foreseen(best_design(7, moments), moments, usual)
    np.testing.assert_allclose(again.errors, best_design(7, moments).errors, rtol=1e-9)


def test_all_that_was_measured_along_an_error_is_expected() -> None:
    plan = made(steps=20, answers=([(0.9, -2.0, 1.0), (0.1, -2.0, 1.0)],))
    best = best_design(7, plan.moments)
    wanted = as_foreseen(best, plan.moments, dataclasses.replace(DesignSettings(), along=1.0))
    assert plan.design(7).weights == best.weights
    assert plan.design(7).errors == wanted.errors
    assert plan.expected_error(7) > 1.05 * best.error


def broken(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "latents": values["latents"] * float("nan")}


@pytest.mark.parametrize("check", [tune_plan, check_plan])
def test_latents_that_are_not_finite_without_a_cache_are_refused(check: Any) -> None:
    pipe, plan = learned(present("wan"))
    (call,) = calls(present("wan"), pipe, range(1))
    with pytest.raises(ConfigError, match="not finite, without any cache"), torch.no_grad():
        check(pipe, plan, [{**call, "callback_on_step_end": broken}], [3.0])


@pytest.mark.parametrize("check", [tune_plan, check_plan])
def test_calls_that_draw_their_noise_anew_are_refused(check: Any) -> None:
    pipe, plan = learned(present("wan"))
    (call,) = calls(present("wan"), pipe, range(1))
    pipe.prepare_latents = lambda *_: torch.randn_like(call["latents"])
    with pytest.raises(ConfigError, match="draws other noise"), torch.no_grad():
        check(pipe, plan, [call], [3.0])


@pytest.mark.parametrize("check", [tune_plan, check_plan])
def test_other_scheduler_of_the_same_timesteps_is_refused(check: Any) -> None:
    family = present("wan")
    pipe, plan = learned(family)
    response = [weight * 1.01 for weight in plan.response]
    with pytest.raises(ConfigError, match="other settings"), torch.no_grad():
        check(pipe, dataclasses.replace(plan, response=response), calls(family, pipe, range(1)), [3.0])


@pytest.mark.parametrize("check", [tune_plan, check_plan])
def test_other_guidance_is_refused(check: Any) -> None:
    family = present("wan")
    pipe, plan = learned(family)
    (call,) = calls(family, pipe, range(1))
    with pytest.raises(ConfigError, match=r"the plan is for guidance .*, and a call has 3\.5"), torch.no_grad():
        check(pipe, plan, [{**call, "guidance_scale": 3.5}], [3.0])


def test_only_the_usual_design_runs_where_all_compute_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    family = present("wan")
    pipe, plan = learned(family)
    monkeypatch.setattr("sgl_diffusion_accel.calibration.tune_plan.designs_to_try", lambda *_: {USUAL: None})
    steps: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: steps.append(1))
    given = calls(family, pipe, range(2))
    with torch.no_grad():
        pipe(**given[0])
        of_one, steps[:] = len(steps), []
        tuned = tune_plan(pipe, plan, given, [3.0]).tuned
    assert tuned == (Tuned(COMPUTED, USUAL, 1.0, 2),)
    assert len(steps) == 2 * of_one + 2 * of_one * COMPUTED // 12


def test_designs_to_try_differ_in_their_steps_and_begin_with_the_usual_one() -> None:
    moments = made(steps=20).moments
    tried = designs_to_try(7, moments, len(NAMES))
    assert next(iter(tried)) == USUAL
    assert tried[USUAL] == best_design(7, moments)
    assert len({design.mask for design in tried.values()}) == len(tried) > 2
    assert list(designs_to_try(7, moments, 2)) == list(tried)[:2]
    assert settings_named(USUAL, moments) == DesignSettings.of(moments)
    assert len({settings_named(name, moments) for name in NAMES}) == len(NAMES) - 2, "two rest on other answers"


def test_file_keeps_what_was_tuned_and_files_of_before_have_none(tmp_path: Path) -> None:
    plan = dataclasses.replace(made(steps=20), tuned=(Tuned(7, "stiff", 1.7, 3),))
    plan.save(tmp_path / "plan.json")
    assert CachePlan.load(tmp_path / "plan.json") == plan
    fields = json.loads((tmp_path / "plan.json").read_text())
    assert fields["tuned"] == [{"computed_steps": 7, "design": "stiff", "gain": 1.7, "calls": 3, "answers": []}]
    del fields["tuned"]
    (tmp_path / "old.json").write_text(json.dumps(fields))
    assert CachePlan.load(tmp_path / "old.json").tuned == ()
    for damaged in ([{"computed_steps": 7}], [3], "stiff", [{**fields, "computed_steps": 7}]):
        (tmp_path / "bad.json").write_text(json.dumps({**fields, "tuned": damaged}))
        with pytest.raises(ConfigError, match=r"tuned|bad\.json"):
            CachePlan.load(tmp_path / "bad.json")


def test_merging_begins_anew_and_printing_tells() -> None:
    plan = dataclasses.replace(made(steps=20), tuned=(Tuned(9, "stiff", 1.7, 3),))
    assert plan.merge(plan).tuned == ()
    assert plan.merge() == plan
    assert "9 steps computed" in str(plan)
    assert "tuned: 1.70 times closer" in str(plan)
    assert "tuned" not in str(dataclasses.replace(plan, tuned=()))
    assert "tuned: the usual design is the best" in str(dataclasses.replace(plan, tuned=(Tuned(9, USUAL, 1.0, 3),)))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ((0, "stiff", 1.5, 1), ConfigError, "computed_steps"),
        ((7, "stiffer", 1.5, 1), ConfigError, "usual"),
        ((7, 3, 1.5, 1), ConfigTypeError, "design"),
        ((7, "stiff", 0.9, 1), ConfigError, "gain"),
        ((7, "stiff", float("nan"), 1), ConfigError, "gain"),
        ((7, "stiff", 1.5, 0), ConfigError, "calls"),
    ],
)
def test_choices_that_cannot_be_are_refused(values: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Tuned(*values)


def test_plan_refuses_choices_of_more_steps_than_it_has_and_two_for_one() -> None:
    plan = made(steps=20)
    for tuned in ((Tuned(21, USUAL, 1.0, 1),), (Tuned(7, USUAL, 1.0, 1), Tuned(7, "stiff", 1.0, 1))):
        with pytest.raises(ConfigError, match="tuned"):
            dataclasses.replace(plan, tuned=tuned)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda given: {**given, "speedups": []}, ConfigError, "speedups"),
        (lambda given: {**given, "speedups": [1.0]}, ConfigError, "speedups"),
        (lambda given: {**given, "speedups": ["fast"]}, ConfigTypeError, "speedups"),
        (lambda given: {**given, "speedups": 3.0}, ConfigTypeError, r"speedups is a float.*\[3.0\]"),
        (lambda given: {**given, "speedups": None}, ConfigTypeError, "speedups is a NoneType"),
        (lambda given: {**given, "designs": 1}, ConfigError, "designs"),
        (lambda given: {**given, "designs": 2.5}, ConfigTypeError, "designs"),
        (lambda given: {**given, "design": 3}, ConfigError, "Did you mean 'designs'"),
        (lambda given: {**given, "calls": []}, ConfigError, "calls"),
        (lambda given: {**given, "plan": "plan.json"}, ConfigTypeError, "plan"),
        (lambda given: {**given, "plan": made(steps=20)}, UnsupportedModelError, "plan"),
        (
            lambda given: {**given, "calls": [{**given["calls"][0], "num_inference_steps": 9}]},
            ConfigError,
            "the plan is for 12 steps",
        ),
    ],
)
def test_bad_input_is_refused(
    change: Callable[[dict[str, Any]], dict[str, Any]], error: type[Exception], message: str
) -> None:
    family = present("flux")
    pipe, plan = learned(family)
    given = {"plan": plan, "calls": calls(family, pipe, range(1)), "speedups": [2.0]}
    with pytest.raises(error, match=message), torch.no_grad():
        tune_plan(pipe, **change(given))


def test_pipeline_with_a_cache_is_refused() -> None:
    family = present("flux")
    pipe, plan = learned(family)
    with apply_adaptive_cache(pipe), pytest.raises(ConfigError, match="tuning"):
        tune_plan(pipe, plan, calls(family, pipe, range(1)), [2.0])


def test_pipeline_is_as_before() -> None:
    family = present("wan")
    pipe, plan = learned(family)
    family.run(pipe, steps=12)
    (call,) = calls(family, pipe, range(1))
    before = Snapshot(pipe)
    with torch.no_grad():
        tune_plan(pipe, plan, [call], [3.0], designs=2)
    assert_same(before, pipe)
    ran: list[int] = []

    def interrupt(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        ran.append(step)
        if len(ran) > 12 + 3:
            raise Interrupted
        return values

    with torch.no_grad(), pytest.raises(Interrupted):
        tune_plan(pipe, plan, [{**call, "callback_on_step_end": interrupt}], [3.0])
    family.run(pipe, steps=12)  # a run that is broken off leaves marks of the pipeline's own
    assert_same(before, pipe)
