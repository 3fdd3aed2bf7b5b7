"""`apply_cache_plan`: what is computed, on which schedules it holds, what it refuses."""

from __future__ import annotations

import copy
import gc
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import miniatures
from invariants import Snapshot, assert_same, chosen, families
from invariants.caches import plan_for
from invariants.families import present
from sgl_diffusion_accel import (
    CachePlan,
    ConfigError,
    ConfigTypeError,
    UnsupportedModelError,
    apply_cache_dit,
    apply_cache_plan,
    calibrate,
    remove,
)
from zoo import FAMILIES, Family
from zoo.base import flow_euler, unipc_flow

STEPS = 12


def wan() -> tuple[Family, Any, CachePlan]:
    family = present("wan")
    return family, family.make(), plan_for("wan", STEPS)


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative distance."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def computed(patch: Any) -> list[tuple[bool, ...]]:
    return [branch.computed for branch in patch.stats.runs[-1].branches.values()]


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"computed_steps": 1}, 1),
        ({"computed_steps": 5}, 5),
        ({"computed_steps": np.int64(STEPS)}, STEPS),
        ({"speedup": 1}, STEPS),
        ({"speedup": 2.0}, 6),
        ({"speedup": np.float32(5)}, 2),
        ({"speedup": 1000}, 1),
        ({"max_error": 1e-12}, STEPS),
        ({"max_error": 10.0}, 1),
    ],
)
def test_budget_in_every_unit(budget: dict[str, Any], steps: int) -> None:
    family, pipe, plan = wan()
    patch = apply_cache_plan(pipe, plan, **budget)
    assert f"{next(iter(budget))}={float(next(iter(budget.values()))):g}" in str(patch)
    family.run(pipe, steps=STEPS)
    cond, uncond = computed(patch)
    assert cond == uncond
    assert sum(cond) == steps
    assert cond[0]
    assert patch.stats.runs[-1].compute_share == pytest.approx(steps / STEPS)
    assert set(patch.stats.runs[-1].branches["cond"].reasons) <= {"plan", "first step"}


def test_error_that_is_asked_for_is_expected() -> None:
    family, pipe, plan = wan()
    for error in (0.003, 0.01, 0.05):
        patch = apply_cache_plan(pipe, plan, max_error=error)
        family.run(pipe, steps=STEPS)
        count = sum(computed(patch)[0])
        assert plan.design(count).error <= error
        assert count == plan.steps_for(error)


@pytest.mark.parametrize(
    "budget",
    [
        {},
        {"speedup": 2, "computed_steps": 5},
        {"speedup": 0.5},
        {"speedup": 0},
        {"speedup": -2},
        {"speedup": float("nan")},
        {"speedup": float("inf")},
        {"computed_steps": 0},
        {"computed_steps": STEPS + 1},
        {"max_error": 0},
        {"max_error": -0.1},
        {"max_error": float("nan")},
    ],
)
def test_budget_out_of_range_is_refused(budget: dict[str, Any]) -> None:
    _, pipe, plan = wan()
    before = Snapshot(pipe)
    with pytest.raises(ConfigError, match="allowed"):
        apply_cache_plan(pipe, plan, **budget)
    assert_same(before, pipe)


@pytest.mark.parametrize(
    "budget",
    [
        {"speedup": True},
        {"speedup": "2"},
        {"computed_steps": 2.0},
        {"computed_steps": True},
        {"max_error": "0.1"},
        {"speedup": np.array([2.0])},
        {"max_error": torch.tensor(0.1)},
    ],
)
def test_budget_of_a_wrong_type_is_refused(budget: dict[str, Any]) -> None:
    _, pipe, plan = wan()
    with pytest.raises(ConfigTypeError, match=next(iter(budget))):
        apply_cache_plan(pipe, plan, **budget)


@pytest.mark.parametrize("plan", [None, "plan.json", {}, 3])
def test_something_that_is_no_plan_is_refused(plan: Any) -> None:
    with pytest.raises(ConfigTypeError, match=r"CachePlan\.load"):
        apply_cache_plan(present("wan").make(), plan, speedup=2)


@pytest.mark.parametrize("other", ["flux", "wan22", "qwen"])
def test_plan_of_another_model_is_refused(other: str) -> None:
    pipe = present(other).make()
    before = Snapshot(pipe)
    with pytest.raises(UnsupportedModelError, match="the plan is for WanTransformer3DModel"):
        apply_cache_plan(pipe, plan_for("wan", STEPS), speedup=2)
    assert_same(before, pipe)


def test_model_of_another_size_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    family = present("wan")
    pipe = family.make(num_layers=3)
    patch = apply_cache_plan(pipe, plan_for("wan", STEPS), speedup=2)
    assert "another config" in caplog.text
    family.run(pipe, steps=STEPS)
    assert sum(computed(patch)[0]) == 6


def test_refused_plan_leaves_the_cache_in_place() -> None:
    _family, pipe, _ = wan()
    patch = apply_cache_dit(pipe)
    with pytest.raises(UnsupportedModelError):
        apply_cache_plan(pipe, plan_for("flux", STEPS), speedup=2)
    assert patch.active


@families("wan", "wan22", "flux", matrix=FAMILIES)
def test_all_steps_computed_change_no_bit(family: Family) -> None:
    pipe = family.make()
    expected = family.run(pipe, steps=STEPS)
    patch = apply_cache_plan(pipe, plan_for(family.name, STEPS), computed_steps=STEPS)
    assert torch.equal(family.run(pipe, steps=STEPS), expected)
    assert patch.stats.runs[-1].compute_share == 1.0


@families(
    "wan", "wan22", "flux",
    matrix=["wan_v2v", "qwen", "flux_img2img", "hunyuan", "sd3", "ltx", "cogvideox", "kandinsky5"],
)  # fmt: skip
def test_half_of_the_steps_are_better_than_a_run_of_half_the_steps(family: Family) -> None:
    pipe = family.make()
    expected, fewer = family.run(pipe, steps=STEPS), family.run(pipe, steps=STEPS // 2)
    patch = apply_cache_plan(pipe, plan_for(family.name, STEPS), speedup=2)
    assert off(family.run(pipe, steps=STEPS), expected) < 0.7 * off(fewer, expected)
    assert patch.held_bytes() == 0
    assert patch.stats.outside == 0


@pytest.mark.parametrize("steps", chosen([1, 2, 3, 4, 7, 20, 30], "1", "2", "7", "30"))
def test_other_numbers_of_steps(steps: int) -> None:
    family, pipe, plan = wan()
    expected = family.run(pipe, steps=steps)
    patch = apply_cache_plan(pipe, plan, speedup=2)
    output = family.run(pipe, steps=steps)
    assert sum(computed(patch)[0]) == max(1, round(steps / 2))
    if steps >= 7:
        assert off(output, expected) < 0.03
    assert output.isfinite().all()


@pytest.mark.parametrize(("guard", "is_left"), [(1.0001, True), (None, False)])
def test_plan_that_is_left_in_mid_run_says_why(guard: float | None, is_left: bool) -> None:
    family, pipe, plan = wan()
    patch = apply_cache_plan(pipe, plan, speedup=1.5, guard=guard)
    family.run(pipe, steps=STEPS, seed=5)
    reasons = set(patch.stats.runs[-1].branches["cond"].reasons)
    assert (reasons != {"plan"}) == is_left
    assert ("the plan was left in mid-run" in str(patch)) == is_left
    assert ("over 1.0001 times as far off as calibration foresaw" in str(patch)) == is_left


def test_more_computed_steps_than_the_run_has_are_all_of_them() -> None:
    family, pipe, plan = wan()
    expected = family.run(pipe, steps=4)
    apply_cache_plan(pipe, plan, computed_steps=9)
    assert torch.equal(family.run(pipe, steps=4), expected)


@pytest.mark.parametrize("scheduler", [unipc_flow, lambda: flow_euler(shift=7.0)], ids=["unipc", "other shift"])
def test_other_schedulers(scheduler: Any) -> None:
    family, pipe, plan = wan()
    patch = apply_cache_plan(pipe, plan, speedup=2)
    for made in (scheduler(), flow_euler()):  # replaced after the patch, and back
        pipe.scheduler = made
        unpatched = family.make(scheduler=copy.deepcopy(made))
        expected = family.run(unpatched, steps=STEPS)
        fewer = family.run(unpatched, steps=STEPS // 2)
        assert off(family.run(pipe, steps=STEPS), expected) < 0.5 * off(fewer, expected)
        assert sum(computed(patch)[0]) == 6


@pytest.mark.parametrize("kw", [{"size": (64, 96, 9)}, {"batch": 2}, {"guidance": 1.0}, {"guidance": 7.0}])
def test_other_calls(kw: dict[str, Any]) -> None:
    family, pipe, plan = wan()
    expected = family.run(pipe, steps=STEPS, **kw)
    patch = apply_cache_plan(pipe, plan, speedup=2)
    assert off(family.run(pipe, steps=STEPS, **kw), expected) < 0.03
    assert sum(computed(patch)[0]) == 6


def test_stochastic_scheduler_is_refused_in_the_run() -> None:
    family, pipe, plan = wan()
    patch = apply_cache_plan(pipe, plan, speedup=2)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    with pytest.raises(UnsupportedModelError, match="apply_adaptive_cache"):
        family.run(pipe, steps=STEPS)
    gc.collect()
    assert patch.held_bytes() == 0
    pipe.scheduler = flow_euler()
    family.run(pipe, steps=STEPS)
    assert sum(computed(patch)[0]) == 6


def test_stochastic_scheduler_is_refused_at_the_call() -> None:
    _, pipe, plan = wan()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    with pytest.raises(UnsupportedModelError):
        apply_cache_plan(pipe, plan, speedup=2)


@pytest.mark.parametrize("strength", [0.75, 0.5])
def test_video_to_video_with_part_of_the_steps(strength: float) -> None:
    family = present("wan_v2v")
    pipe = family.make()
    patch = apply_cache_plan(pipe, plan_for("wan_v2v", STEPS), speedup=2)
    family.run(pipe, steps=STEPS, strength=strength)
    assert sum(computed(patch)[0]) == round(strength * STEPS / 2)


def test_transformer_by_itself() -> None:
    family, pipe, plan = wan()
    other = family.make()
    apply_cache_plan(other, plan, speedup=2)
    patch = apply_cache_plan(pipe.transformer, plan, speedup=2)
    assert torch.equal(family.run(pipe, steps=STEPS), family.run(other, steps=STEPS))
    assert patch.components == ["transformer"]
    remove(pipe)
    assert not patch.active


def test_experts_share_one_plan() -> None:
    family = present("wan22")
    for scheduler in (None, flow_euler()):
        pipe = family.make(scheduler=scheduler)
        expected, fewer = family.run(pipe, steps=STEPS), family.run(pipe, steps=STEPS // 2)
        patch = apply_cache_plan(pipe, plan_for("wan22", STEPS), speedup=2)
        assert off(family.run(pipe, steps=STEPS), expected) < 0.75 * off(fewer, expected)
        assert computed(patch)[0] == computed(patch)[1]
        assert sum(computed(patch)[0]) == 6
        components = patch.stats.runs[-1].branches["cond"].components
        assert list(components) == sorted(components)
        assert len(set(components)) == 2


def test_guidance_that_ends_in_mid_run_by_two_calls() -> None:
    family = present("lumina2")
    pipe = family.make()
    patch = apply_cache_plan(pipe, plan_for("lumina2", STEPS), speedup=2)
    assert family.run(pipe, steps=STEPS, cfg_trunc_ratio=0.5).isfinite().all()
    branches = patch.stats.runs[-1].branches
    assert len(branches["cond"].computed) == STEPS
    assert len(branches["uncond"].computed) < STEPS


def test_guidance_that_ends_in_mid_run_in_one_batched_call() -> None:
    family = present("zimage")
    pipe = family.make()
    apply_cache_plan(pipe, plan_for("zimage", STEPS), speedup=2)
    family.run(pipe, steps=STEPS, cfg_truncation=0.5)


def test_guidance_that_comes_back_in_mid_run() -> None:
    """A branch whose earlier outputs are missing is computed where the plan would skip it."""
    family, pipe, plan = wan()

    def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 4.0 if step + 1 >= first else 1.0
        return values

    for first in range(2, 9):  # noqa: B007
        patch = apply_cache_plan(pipe, plan, computed_steps=4)
        assert family.run(pipe, steps=STEPS, callback_on_step_end=callback).isfinite().all()
        assert len(patch.stats.runs[-1].branches["cond"].computed) == STEPS


def test_third_branch_that_begins_later() -> None:
    family = present("hunyuan15")
    if not hasattr(diffusers, "SkipLayerGuidance"):
        pytest.fail("this diffusers has no SkipLayerGuidance", pytrace=False)

    class Third(diffusers.SkipLayerGuidance):  # type: ignore[misc]
        def prepare_models(self, denoiser: Any) -> None:
            self._count_prepared += 1

        def cleanup_models(self, denoiser: Any) -> None:
            pass

    pipe = family.make()
    pipe.guider = Third(
        guidance_scale=4.0,
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
        skip_layer_config=diffusers.LayerSkipConfig(indices=[2], fqn="transformer_blocks"),
    )
    apply_cache_plan(pipe, plan_for("hunyuan15", STEPS), computed_steps=3)
    family.run(pipe, steps=STEPS)


def test_plan_that_is_applied_in_mid_run() -> None:
    family, pipe, plan = wan()
    first = plan.design(4).mask.index(False)

    def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == first - 1:
            apply_cache_plan(pipe, plan, computed_steps=4)
        return values

    family.run(pipe, steps=STEPS, callback_on_step_end=callback)


def test_designs_are_made_once_for_a_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    from sgl_diffusion_accel.calibration import apply_plan as apply

    made: list[int] = []
    design = apply.design_tuned

    def counted(tuned: Any, count: int, *rest: Any) -> Any:
        made.append(count)
        return design(tuned, count, *rest)

    monkeypatch.setattr(apply, "design_tuned", counted)
    apply._design.cache_clear()
    family, pipe, plan = wan()
    apply_cache_plan(pipe, plan, speedup=2)
    for steps in (STEPS, STEPS, 6, STEPS, 6):
        family.run(pipe, steps=steps)
    assert made == [6, 3]


@pytest.mark.parametrize("scheduler", [flow_euler, unipc_flow])
def test_what_a_plan_has_shown_is_not_searched_for_again_in_its_run(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sgl_diffusion_accel.calibration.designs import design_search

    family = present("wan")
    pipe = family.make()
    pipe.scheduler = scheduler()
    plan = calibrate(pipe, [family.call(pipe, steps=STEPS)], teacache=False, magnitudes=False)
    shown = plan.design(5)
    monkeypatch.setattr(design_search, "_descend", lambda draft: pytest.fail("searched for again"))
    patch = apply_cache_plan(pipe, plan, computed_steps=5)
    family.run(pipe, steps=STEPS)
    assert computed(patch) == [shown.mask] * len(computed(patch))


def test_plan_of_a_file_is_the_plan(tmp_path: Any) -> None:
    family, pipe, plan = wan()
    apply_cache_plan(pipe, plan, speedup=3)
    expected = family.run(pipe, steps=STEPS)
    plan.save(tmp_path / "plan.json")
    apply_cache_plan(pipe, CachePlan.load(tmp_path / "plan.json"), speedup=3)
    assert torch.equal(family.run(pipe, steps=STEPS), expected)


def held_in_a_run() -> tuple[list[int], int]:
    """Bytes that are held after each step of a run, and those of an output of both branches."""
    family, pipe, plan = wan()
    patch = apply_cache_plan(pipe, plan, computed_steps=5)
    held: list[int] = []

    def look(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        held.append(patch.held_bytes())
        return values

    family.run(pipe, steps=STEPS, callback_on_step_end=look)
    assert patch.held_bytes() == 0
    assert len(held) == STEPS
    return held, 2 * 4 * family.call(pipe)["latents"].numel()


def test_four_outputs_of_a_branch_are_kept_at_most() -> None:
    held, size = held_in_a_run()
    assert max(held) == 4 * size


def test_nothing_is_kept_after_the_last_step() -> None:
    held, _ = held_in_a_run()
    assert held[-1] == 0


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over the pictures of a batch, of pixels in [0, 1]."""
    errors = ((one - other).reshape(len(one), -1) ** 2).mean(1)
    return float((-10 * np.log10(errors)).mean())


def test_plan_beats_fewer_steps_on_a_miniature() -> None:
    """With other captions and seeds than in the calibration."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pipe = miniatures.load_miniature("flux")
    learned, shown = miniatures.captions("flux", 2, 7), miniatures.captions("flux", 4, 5)
    plan = calibrate(pipe, [miniatures.call_kwargs("flux", learned, seed=7, steps=30)], teacache=False)

    def run(steps: int) -> np.ndarray:
        return miniatures.to_frames("flux", pipe(**miniatures.call_kwargs("flux", shown, seed=100, steps=steps)))

    expected, fewer = run(30), run(10)
    patch = apply_cache_plan(pipe, plan, speedup=3)
    assert psnr(run(30), expected) >= psnr(fewer, expected) + 5
    assert sum(computed(patch)[0]) == 10
    torch.set_num_threads(threads)


def test_calls_that_leave_out_layers_are_computed() -> None:
    family = present("sd3")
    extra = {"skip_guidance_layers": [2], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    pipe = family.make()
    expected = family.run(pipe, steps=STEPS, **extra)
    patch = apply_cache_plan(pipe, plan_for("sd3", STEPS), speedup=2)
    assert off(family.run(pipe, steps=STEPS, **extra), expected) < 0.12
    assert sorted(map(all, computed(patch))) == [False, True]
