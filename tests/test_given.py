"""What a transformer is given may turn into something else in mid-run: control that begins or ends, a new input."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from invariants import chosen, cross, families
from invariants.families import present
from sgl_diffusion_accel import (
    CachePatch,
    CachePlan,
    apply_adaptive_cache,
    apply_cache_dit,
    apply_cache_plan,
    apply_teacache,
    branch,
    calibrate,
    denoising_steps,
    remove,
)
from sgl_diffusion_accel.loop.given import switches_on, tensors_given
from zoo import Family
from zoo.base import assemble, build, quiet_rng, tiny_vae

STEPS = 30
ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("local", "on"),
    [
        ({}, set()),
        ({"cond_scale": 0.8}, {"control 0"}),
        ({"cond_scale": 0.0}, set()),
        ({"cond_scale": [0.0, 0.5]}, {"control 1"}),
        ({"cond_scale": [1, 0.5]}, {"control 0", "control 1"}),
        ({"cond_scale": None}, set()),
        ({"cond_scale": "0.8"}, set()),
        ({"block_state": SimpleNamespace(cond_scale=0.8)}, {"control 0"}),
        ({"block_state": SimpleNamespace()}, set()),
    ],
)
def test_control_is_on_where_its_scale_is_not_0(local: dict[str, Any], on: set[str]) -> None:
    assert switches_on(local) == on


@pytest.mark.parametrize(
    ("args", "kwargs", "given"),
    [
        ((), {}, set()),
        ((ONE, 2, None), {"text": ONE, "scale": 1.0}, {"0", "text"}),
        ((), {"residuals": None}, set()),
        ((), {"residuals": []}, set()),
        ((), {"residuals": [None, ONE]}, {"residuals"}),
        ((), {"residuals": ([ONE], [ONE])}, {"residuals"}),
        ((), {"more": {"picture": [ONE], "scale": 1.0}}, {"more.picture"}),
    ],
)
def test_tensors_are_named(args: tuple[Any, ...], kwargs: dict[str, Any], given: set[str]) -> None:
    assert tensors_given(args, kwargs) == given


def sd3_controlnet() -> tuple[Any, dict[str, Any]]:
    family = present("sd3")
    made = family.make()
    names = ("sample_size", "patch_size", "in_channels", "attention_head_dim", "num_attention_heads", "out_channels")
    more = ("joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "pos_embed_max_size")
    sizes = {name: made.transformer.config[name] for name in (*names, *more)}
    control = build("SD3ControlNetModel", 1000, **sizes, num_layers=3, force_zeros_for_pooled_projection=False)
    parts = {name: part for name, part in made.components.items() if name not in ("image_encoder", "feature_extractor")}
    pipe = assemble("StableDiffusion3ControlNetPipeline", **{**parts, "vae": tiny_vae(4, 0)}, controlnet=control)
    picture = present("flux_controlnet").call(None)["control_image"]
    return pipe, {"control_image": picture}


def controlled(name: str) -> Callable[..., torch.Tensor]:
    """A pipeline with a ControlNet, as what runs it."""
    if name == "flux":
        family = present("flux_controlnet")
        pipe, more = family.make(), {}
    else:
        family = present("sd3")
        pipe, more = sd3_controlnet()

    def run(steps: int = STEPS, **window: float) -> torch.Tensor:
        with quiet_rng(0):  # SD3 encodes the picture with the process's random numbers
            return family.run(pipe, steps=steps, controlnet_conditioning_scale=0.8, **more, **window)

    run.pipe = pipe  # type: ignore[attr-defined]
    run.call = lambda **window: family.call(  # type: ignore[attr-defined]
        pipe, steps=STEPS, controlnet_conditioning_scale=0.8, **{**more, **window}
    )
    return run


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative distance."""
    return float((one.double() - other.double()).norm() / other.double().norm())


WINDOWS: list[tuple[dict[str, float], int | None]] = [  # and the step at which it turns
    ({}, None),
    ({"control_guidance_start": 0.3}, 9),
    ({"control_guidance_end": 0.6}, 18),
    ({"control_guidance_start": 0.5, "control_guidance_end": 0.8}, 15),
]


WINDOW_PARAMS = chosen(
    [pytest.param(*case, id=", ".join(case[0]) or "always") for case in reversed(WINDOWS)],
    "control_guidance_start, control_guidance_end", "control_guidance_end", "always",
)  # fmt: skip
"""The window that begins and ends is first; one that only begins says nothing more."""


@cross("window, turn, name", WINDOW_PARAMS, ["flux", pytest.param("sd3", marks=pytest.mark.matrix)])
def test_control_that_begins_or_ends_costs_no_more_than_fewer_steps(
    name: str, window: dict[str, float], turn: int | None
) -> None:
    run = controlled(name)
    expected = run(**window)
    with apply_adaptive_cache(run.pipe, 0.003) as patch:  # type: ignore[attr-defined]
        cached = run(**window)
    (found,) = patch.stats.runs[-1].branches.values()
    turned = [step for step, reason in enumerate(found.reasons) if reason == "inputs changed"]
    assert turned[:1] == ([] if turn is None else [turn])
    assert len(turned) == len(window)
    for step in turned:
        assert all(found.computed[step : step + 2]), "the line is learned anew"
    computed = sum(found.computed)
    assert computed < 0.75 * STEPS
    assert off(cached, expected) < off(run(steps=computed, **window), expected)


BLOCK_CACHES: dict[str, Callable[[Any], CachePatch]] = {
    "threshold": lambda pipe: apply_cache_dit(pipe, residual_diff_threshold=10.0, max_warmup_steps=4),
    "mask": lambda pipe: apply_cache_dit(
        pipe,
        fn_compute_blocks=0,
        steps_mask=[int(step < 4 or step % 4 == 3) for step in range(STEPS)],
        steps_policy="static",
    ),
    "gaps": lambda pipe: apply_cache_dit(pipe, fn_compute_blocks=0, tolerance=1.0, taylorseer_order=1),
    "teacache": lambda pipe: apply_teacache(
        pipe, 10.0, coefficients=[0, 0, 0, 1, 0], start_skipping=2, end_skipping=-1
    ),
}


@pytest.mark.parametrize("cache", BLOCK_CACHES)
def test_block_caches_compute_the_step_at_which_control_begins(cache: str) -> None:
    run = controlled("flux")
    patch = BLOCK_CACHES[cache](run.pipe)  # type: ignore[attr-defined]
    run()
    always = patch.stats.runs[-1].branches["cond"]
    gone = next(step for step in range(8, STEPS - 4) if not always.computed[step])
    run(control_guidance_start=gone / STEPS - 1e-6)
    found = patch.stats.runs[-1].branches["cond"]
    assert found.computed[:gone] == always.computed[:gone]
    assert found.computed[gone]
    assert found.reasons[gone] == "nothing to reuse"
    assert not all(found.computed[gone:])


@functools.cache
def plan_from(window: tuple[tuple[str, float], ...]) -> CachePlan:
    """A plan that was learned from a run with this window of control."""
    run = controlled("flux")
    return calibrate(run.pipe, [run.call(**dict(window))], teacache=False, magnitudes=False)  # type: ignore[attr-defined]


def planned(guard: float | None, learned: dict[str, float], window: dict[str, float]) -> tuple[list[str], float, float]:
    """Reasons and error of a run by a plan, and the error of as many uncached steps."""
    run = controlled("flux")
    pipe: Any = run.pipe  # type: ignore[attr-defined]
    plan = plan_from(tuple(learned.items()))
    expected = run(**window)
    with apply_cache_plan(pipe, plan, speedup=2.5, guard=guard) as patch:
        cached = run(**window)
    found = patch.stats.runs[-1].branches["cond"]
    fewer = run(steps=sum(found.computed), **window)
    return list(found.reasons), off(cached, expected), off(fewer, expected)


@pytest.mark.parametrize("guard", [6.0, None])
def test_plan_that_knows_of_no_window_is_left_where_control_begins_at_a_skipped_step(guard: float | None) -> None:
    mask = plan_from(()).design(12).mask
    gone = next(step for step in range(8, STEPS) if not mask[step])
    reasons, error, fewer = planned(guard, {}, {"control_guidance_start": gone / STEPS - 1e-6})
    assert reasons[gone] == "inputs changed"
    assert set(reasons[:gone]) == {"plan"}
    assert "plan" not in reasons[gone:]
    assert "estimated error within tolerance" in reasons[gone:]
    assert error < fewer


def test_plan_from_runs_with_the_window_is_followed_through_it() -> None:
    window = {"control_guidance_start": 0.5}
    reasons, error, fewer = planned(None, window, window)
    assert set(reasons) == {"plan"}
    assert error < fewer


def test_input_that_appears_in_a_loop_of_ones_own() -> None:
    family = present("flux")
    pipe = family.make()
    given = family.bare(pipe)
    residuals = [0.5 * torch.ones_like(given["hidden_states"][..., :1]).expand(-1, -1, 32)]

    def run() -> None:
        pipe.scheduler.set_timesteps(STEPS, mu=0.5)
        latents = given["hidden_states"]
        for i, t in enumerate(denoising_steps(pipe.scheduler.timesteps, scheduler=pipe.scheduler)):
            more = {"controlnet_block_samples": residuals if i >= 13 else None}
            call = {**given, "hidden_states": latents, "timestep": t.expand(1) / 1000, **more}
            with torch.no_grad(), branch("cond"):
                output = pipe.transformer(**call)[0]
            latents = pipe.scheduler.step(output, t, latents, return_dict=False)[0]

    patch = apply_adaptive_cache(pipe, 0.05)
    run()
    found = patch.stats.runs[-1].branches["cond"]
    assert found.reasons[13] == "inputs changed"
    assert found.reasons.count("inputs changed") == 1
    assert not all(found.computed[13:])


@families()
def test_inputs_of_an_ordinary_run_stay_of_one_kind(family: Family) -> None:
    pipe = family.make()
    patch = apply_adaptive_cache(pipe, 0.1)
    family.run(pipe, steps=12)
    for each in patch.stats.runs[-1].branches.values():
        assert "inputs changed" not in each.reasons
    remove(pipe)
