"""How a model answers to the errors that a plan leaves, and the designs that rest on it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from invariants.families import few_blocks, present
from sgl_diffusion_accel import CachePlan, ConfigError, ConfigTypeError, apply_cache_plan, calibrate, tune_plan
from sgl_diffusion_accel.caching.parts.multistep import Weights
from sgl_diffusion_accel.calibration.call_record import Recording, recording
from sgl_diffusion_accel.calibration.designs.answers import Answers, answers_of_plan
from sgl_diffusion_accel.calibration.designs.design import DesignSettings
from sgl_diffusion_accel.calibration.designs.design_search import best_design
from sgl_diffusion_accel.calibration.designs.tuned import NAMES, USUAL, Tuned, design_named, designs_to_try
from sgl_diffusion_accel.calibration.paired_runs import PairedRuns
from sgl_diffusion_accel.calls import read_calls
from sgl_diffusion_accel.loop.scheduler_response import left_at
from test_answers import STEPS, response_for, sd_euler
from test_check_plan import calls, learned
from test_plan import made
from test_record import pipe_of
from zoo.base import flow_euler, unipc_flow

OWN = ("own errors", "own errors, all along")
LEARNED: tuple[Answers, ...] = (((0.8, -3.0, 5.0), (0.1, 1.0, 0.5)),)
SKIPPED = (4, 5, 8, 9, 10, 13, 14, 18)


def weights_of(step: int, last_weight: float = 1.2) -> Weights:
    """A line through the two computed steps before a skipped one; computed steps make up for it afterwards."""
    nodes = [each for each in range(step, -1, -1) if each not in SKIPPED]
    if step in SKIPPED:
        return {nodes[0]: 1.5, nodes[1]: -0.5}
    return {step: 1.0} if step < min(SKIPPED) else {step: last_weight, nodes[1]: 1 - last_weight}


def loop(scheduler: Any, along: float, across: float, weights: list[Weights] | None) -> None:
    """A run of a model that answers along·x + across·R x and a part of its own, with or without a plan."""
    generator = torch.Generator().manual_seed(1)
    own = torch.randn(STEPS, 1, 4096, generator=generator).cumsum(0) / STEPS
    sample = torch.randn(1, 4096, generator=generator)
    scheduler.set_timesteps(STEPS)
    outputs: dict[int, torch.Tensor] = {}
    for step, (timestep, part) in enumerate(zip(scheduler.timesteps, own, strict=True)):
        one, other = sample.chunk(2, -1)
        outputs[step] = along * sample + across * torch.cat([-other, one], -1) + part
        used = {step: 1.0} if weights is None else weights[step]
        given = sum(weight * outputs[node] for node, weight in used.items())
        sample = scheduler.step(given, timestep, sample, return_dict=False)[0]


def runs_of(scheduler: Any, along: float, across: float, weights: list[Weights]) -> list[Recording]:
    with recording(pipe_of(scheduler)) as watch:
        loop(scheduler, along, across, None)
        loop(scheduler, along, across, weights)
    return watch.runs


def measured(scheduler: Any, along: float, across: float, weights: list[Weights]) -> Answers:
    response = response_for(scheduler)
    plain, run = (each.seen() for each in runs_of(scheduler, along, across, weights))
    assert plain is not None
    assert run is not None
    return answers_of_plan(response, plain, run, weights)


@pytest.mark.parametrize("make", [flow_euler, unipc_flow, sd_euler])
@pytest.mark.parametrize(("along", "across"), [(0.0, 0.0), (0.8, 0.0), (-1.5, 0.0), (-0.5, 0.4)])
def test_answer_is_that_of_the_model_at_computed_steps(make: Any, along: float, across: float) -> None:
    """The outputs are told from what the scheduler was given, where they are mixed with those of earlier steps."""
    scheduler = make()
    response = response_for(scheduler)
    scale = np.abs(response[-1]).sum()
    found = np.array(measured(scheduler, along / scale, across / scale, [weights_of(each) for each in range(STEPS)]))
    steps = [each for each in range(min(SKIPPED), STEPS) if each not in SKIPPED]
    left = left_at(response[-1])[steps]
    np.testing.assert_allclose(found[:, 0], left, rtol=1e-9)
    np.testing.assert_allclose(found[:, 1], along * left, atol=5e-3)
    np.testing.assert_allclose(found[:, 2], across * left, atol=5e-3)


def test_nothing_is_told_from_a_step_on_whose_own_output_hardly_counts() -> None:
    weights = [weights_of(each, 0.01 if each == 11 else 1.2) for each in range(STEPS)]
    found = measured(flow_euler(), -1.0, 0.5, weights)
    left = left_at(response_for(flow_euler())[-1])
    assert [share for share, *_ in found] == pytest.approx(left[[6, 7]].tolist())


def test_run_that_leaves_out_nothing_tells_nothing() -> None:
    assert measured(flow_euler(), -1.0, 0.5, [{each: 1.0} for each in range(STEPS)]) == ()


# On pipelines


def answers_of(pipe: Any, plan: CachePlan, call: dict[str, Any], computed: int = 6) -> Answers:
    with recording(pipe) as watch, torch.no_grad():
        runs = PairedRuns(pipe, plan, watch)
        runs.begin(read_calls(pipe, [call], "")[0])
        runs.square(plan, computed)
        return runs.answers()


def test_answers_of_a_run_are_those_of_the_model_at_the_steps_that_its_plan_computed() -> None:
    """Held against what the transformer itself returned, with and without the prompt."""
    pipe, plan = learned(present("wan"))
    (call,) = calls(present("wan"), pipe, range(1))
    shown: list[torch.Tensor] = []
    pipe.transformer.proj_out.register_forward_hook(lambda *given: shown.append(given[-1].flatten().clone()))
    steps = [step for step, computed in enumerate(plan.design(6).mask) if computed]
    with recording(pipe) as watch, torch.no_grad():
        pipe(**call)
        plain = _guided(shown, call, list(range(12)))
        shown.clear()
        with apply_cache_plan(pipe, plan, computed_steps=6):
            pipe(**call)
    cached = _guided(shown, call, steps)
    found = answers_of(pipe, plan, call)
    later = [step for step in steps if step > plan.design(6).mask.index(False)]
    assert [share for share, *_ in found] == pytest.approx(plan.moments.left[later].tolist())
    one, other = (run.seen() for run in watch.runs)
    assert one is not None
    assert other is not None
    for step, (left, along, across) in zip(later, found, strict=True):
        change = float((cached[step] - plain[step]).norm() / (other[1][step] - one[1][step]).norm())
        assert left * change == pytest.approx((along**2 + across**2) ** 0.5, rel=1e-3)


def _guided(shown: list[torch.Tensor], call: dict[str, Any], steps: list[int]) -> dict[int, torch.Tensor]:
    pairs = zip(shown[::2], shown[1::2], strict=True)
    scale = call["guidance_scale"]
    return dict(zip(steps, [without + scale * (cond - without) for cond, without in pairs], strict=True))


def test_run_that_left_its_plan_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """From there on other steps are computed, with other weights; tuning goes on with the other designs."""
    pipe, plan = learned(present("wan"))
    (call,) = calls(present("wan"), pipe, range(1))
    tame = dataclasses.replace(plan, gram=tuple(1e-3 * each for each in np.ones(len(plan.gram))))
    with torch.no_grad(), apply_cache_plan(pipe, tame, computed_steps=6) as patch:
        pipe(**call)
    assert "left in mid-run" in str(patch.stats.runs[0].remarks), "its outputs are foreseen never to change"
    assert answers_of(pipe, tame, call) == ()
    with torch.no_grad(), caplog.at_level("INFO"):
        (tuned,) = tune_plan(pipe, tame, [call], speedups=[2.0], designs=2).tuned
    assert tuned.answers == ()
    assert "errors of 6 computed steps cannot be told" in caplog.text


def test_guidance_that_changes_from_step_to_step_tells_nothing() -> None:
    """Outputs of other steps, weighed in both branches, are not what the scheduler is given."""
    family = present("cogvideox")
    pipe = few_blocks(family)
    found = []
    for dynamic in (False, True):
        call = {**family.call(pipe, steps=12), "use_dynamic_cfg": dynamic}
        with torch.no_grad():
            plan = calibrate(pipe, [call], teacache=False, magnitudes=False)
        found.append(answers_of(pipe, plan, call))
    constant, dynamic = found
    assert constant
    assert dynamic == ()


def test_short_runs_tell_as_well() -> None:
    """Though they are remarked upon."""
    family = present("wan")
    pipe = few_blocks(family)
    call = family.call(pipe, steps=8)
    with torch.no_grad():
        plan = calibrate(pipe, [call], teacache=False, magnitudes=False)
    assert answers_of(pipe, plan, call, 4)


def test_other_weights_than_those_of_the_plan_are_seen() -> None:
    weights = [weights_of(each) for each in range(STEPS)]
    plain, run = (each.seen() for each in runs_of(flow_euler(), -1.0, 0.5, weights))
    assert plain is not None
    assert run is not None
    response = response_for(flow_euler())
    assert answers_of_plan(response, plain, run, weights)
    for share, told in ((0.02, True), (0.1, False), (float("nan"), False)):
        given = run[0].clone()
        given[9] += share * given[9].norm() * torch.nn.functional.normalize(torch.ones_like(given[9]), dim=0)
        assert bool(answers_of_plan(response, plain, (given, run[1]), weights)) is told


def test_answers_of_no_run_are_refused() -> None:
    pipe, plan = learned(present("wan"))
    with recording(pipe) as watch, pytest.raises(RuntimeError, match="come first"):
        PairedRuns(pipe, plan, watch).answers()


def test_call_that_was_begun_before_another_is_held_against_itself() -> None:
    pipe, plan = learned(present("wan"))
    given = read_calls(pipe, calls(present("wan"), pipe, range(2)), "")
    with recording(pipe) as watch, torch.no_grad():
        runs = PairedRuns(pipe, plan, watch)
        begun, wanted = [], []
        for call in given:
            begun.append(runs.begin(call))
            wanted.append(runs.square(plan, 6))
        for each, square in zip(begun, wanted, strict=True):
            runs.go_on(each)
            assert runs.square(plan, 6) == pytest.approx(square, rel=1e-6)
            with pytest.raises(RuntimeError, match="come first"):
                runs.answers()
    assert wanted[0] != pytest.approx(wanted[1], rel=0.1)


def test_tuning_tries_designs_on_the_plan_s_own_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the answers of all calls, and it keeps them with a design that rests on them."""
    family = present("qwen")
    pipe, plan = learned(family)
    given = calls(family, pipe, range(2))
    tried: list[Tuned] = []
    square = PairedRuns.square

    def seen(runs: PairedRuns, plan: CachePlan, computed: int) -> float:
        tried.append(plan.tuned[0])
        found = square(runs, plan, computed)
        return found / 1e9 if tried[-1].design in OWN else found

    monkeypatch.setattr(PairedRuns, "square", seen)
    with torch.no_grad():
        (tuned,) = tune_plan(pipe, plan, given, speedups=[2.0]).tuned
    assert [each.design for each in tried[:2]] == [USUAL, USUAL]
    assert tuned.design in OWN
    assert len(tuned.answers) == len(given)
    assert {each.answers for each in tried} == {(), tuned.answers}
    kept = dataclasses.replace(plan, tuned=(tuned,))
    assert kept.design(6) == design_named(tuned.design, 6, plan.moments, tuned.answers) != plan.design(6)
    with torch.no_grad(), apply_cache_plan(pipe, kept, computed_steps=6) as patch:
        pipe(**given[0])
    assert {each.computed for each in patch.stats.runs[0].branches.values()} == {kept.design(6).mask}


def test_design_rests_on_the_answers_and_is_expected_to_err_by_what_is_usual() -> None:
    moments = made(steps=20).moments
    known = dataclasses.replace(moments, answers=LEARNED)
    for name, settings in zip(OWN, (DesignSettings(), DesignSettings(along=1.0)), strict=True):
        found, own = design_named(name, 7, moments, LEARNED), best_design(7, known, settings)
        assert (found.mask, found.weights) == (own.mask, own.weights)
        assert found.errors != own.errors
    assert design_named(OWN[0], 7, moments, LEARNED).weights != design_named(USUAL, 7, moments).weights


def test_designs_on_own_errors_come_after_the_usual_one_and_only_with_answers() -> None:
    moments = made(steps=20).moments
    assert list(designs_to_try(7, moments, 2, LEARNED)) == [USUAL, OWN[0]]
    assert not set(OWN) & set(designs_to_try(7, moments, len(NAMES)))


# In the file


def test_answers_are_kept_with_the_choice(tmp_path: Path) -> None:
    listed: Any = [[list(each) for each in LEARNED[0]]]
    plan = dataclasses.replace(made(steps=20), tuned=(Tuned(7, OWN[0], 1.7, 3, listed),))
    assert plan.tuned[0].answers == LEARNED
    plan.save(tmp_path / "plan.json")
    assert CachePlan.load(tmp_path / "plan.json") == plan
    fields = json.loads((tmp_path / "plan.json").read_text())
    (choice,) = fields["tuned"]
    for damaged in ({**choice, "answers": [[3.0]]}, {**choice, "answers": []}, {**choice, "design": "stiff"}):
        (tmp_path / "bad.json").write_text(json.dumps({**fields, "tuned": [damaged]}))
        with pytest.raises(ConfigError, match=r"tuned\[0\] is damaged: .*answers"):
            CachePlan.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("design", "answers", "error"),
    [
        (OWN[0], (), ConfigError),
        (OWN[1], ((),), ConfigError),
        ("stiff", LEARNED, ConfigError),
        (USUAL, LEARNED, ConfigError),
        (OWN[0], 3.0, ConfigTypeError),
        (OWN[0], (((0.5, 0.0, float("nan")),),), ConfigError),
    ],
)
def test_answers_without_need_and_missing_ones_are_refused(design: str, answers: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="answers"):
        Tuned(7, design, 1.5, 1, answers)
