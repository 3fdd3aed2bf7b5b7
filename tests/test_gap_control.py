"""`apply_cache_dit(pipe, tolerance=…)` on whole pipelines: exact, shared by the branches, limited, and worth it."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import miniatures
from invariants import cross, families, family_params
from invariants.families import present
from sgl_diffusion_accel import CachePatch, apply_cache_dit
from zoo import FAMILIES, Family
from zoo.base import flow_euler, unipc_flow

STEPS = 20
LOOSE = 0.1  # these models are rougher than trained ones
KNOBS: dict[str, Any] = {"tolerance": LOOSE, "taylorseer_order": 1, "max_warmup_steps": 3}


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative distance."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def masks(patch: CachePatch) -> dict[str, tuple[bool, ...]]:
    return {name: branch.computed for name, branch in patch.stats.runs[-1].branches.items()}


@families("wan", "flux", matrix=FAMILIES)
def test_tolerance_0_changes_no_bit_in_a_long_run(family: Family) -> None:
    pipe = family.make()
    expected = family.run(pipe, steps=12)
    patch = apply_cache_dit(pipe, tolerance=0, taylorseer_order=1)
    assert torch.equal(family.run(pipe, steps=12), expected)
    assert patch.stats.runs[-1].compute_share == 1.0


@cross("family, fn", family_params("wan", "wan22", "flux", "zimage", matrix=FAMILIES), [1, 0])
def test_skips_at_every_family_and_stays_close(family: Family, fn: int) -> None:
    pipe = family.make()
    expected = family.run(pipe, steps=STEPS)
    patch = apply_cache_dit(pipe, fn_compute_blocks=fn, **KNOBS)
    output = family.run(pipe, steps=STEPS)
    assert len(set(masks(patch).values())) == 1, "the branches of a step share one decision"
    assert patch.stats.runs[-1].compute_share < 0.9
    assert 0 < off(output, expected) < 0.12
    assert patch.held_bytes() == 0


@cross("family, order", family_params("wan", "flux", matrix=["cogvideox"]), [1, 0, 2])
def test_larger_tolerance_computes_fewer_steps(family: Family, order: int) -> None:
    pipe = family.make()
    shares = []
    for tolerance in (1e-5, 1e-2, 1e-1, 1.0):
        patch = apply_cache_dit(pipe, **{**KNOBS, "tolerance": tolerance, "taylorseer_order": order})
        family.run(pipe, steps=STEPS)
        shares.append(patch.stats.runs[-1].compute_share)
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < shares[0]


@pytest.mark.parametrize("spacing", ["step", "sigma"])
@pytest.mark.parametrize("scheduler", [flow_euler, unipc_flow])
def test_either_clock_under_either_scheduler(spacing: str, scheduler: Any) -> None:
    family = present("wan")
    pipe = family.make(scheduler=scheduler())
    expected = family.run(pipe, steps=STEPS)
    patch = apply_cache_dit(pipe, taylorseer_spacing=spacing, **KNOBS)
    assert off(family.run(pipe, steps=STEPS), expected) < 0.05
    assert patch.stats.runs[-1].compute_share < 0.9


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # KDPM2 and NumPy 2
def test_tolerance_holds_where_every_second_output_leads_to_a_midpoint() -> None:
    family = present("cogvideox")
    pipe = family.make(scheduler=diffusers.KDPM2DiscreteScheduler())
    expected = family.run(pipe, steps=STEPS)
    shares, errors = [], []
    for tolerance in (1e-12, 1e-3, 1e-2):
        patch = apply_cache_dit(pipe, **{**KNOBS, "tolerance": tolerance})
        errors.append(off(family.run(pipe, steps=STEPS), expected))
        shares.append(patch.stats.runs[-1].compute_share)
    assert shares[0] == 1.0
    assert errors[0] == 0.0
    assert 1.0 > shares[1] > shares[2]


def test_no_first_block_runs_at_a_skipped_step_unless_it_is_asked_for() -> None:
    family = present("wan")
    for fn in (0, 2):
        pipe = family.make()
        calls: list[int] = []
        pipe.transformer.blocks[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        patch = apply_cache_dit(pipe, fn_compute_blocks=fn, **KNOBS)
        family.run(pipe, steps=STEPS)
        computed = sum(sum(mask) for mask in masks(patch).values())
        assert computed < 2 * STEPS
        assert len(calls) == (2 * STEPS if fn else computed)


def test_limits_and_a_dynamic_mask_hold() -> None:
    family = present("wan")
    pipe = family.make()
    mask = [int(step < 6 or step % 2 == 0) for step in range(STEPS)]
    limits: dict[str, Any] = {"max_continuous_cached_steps": 1, "max_cached_steps": 4}
    for knobs in ({**limits, "max_warmup_steps": 8}, {"steps_mask": mask}):
        patch = apply_cache_dit(pipe, **{**KNOBS, "tolerance": 1.0, **knobs})
        family.run(pipe, steps=STEPS)
        computed = masks(patch)["cond"]
        assert not all(computed)
        if "steps_mask" in knobs:
            assert all(flag for flag, wanted in zip(computed, mask, strict=True) if wanted)
        else:
            assert computed.count(False) == 4
            assert all(computed[:8])
            assert all(one or other for one, other in itertools.pairwise(computed))


def test_each_expert_learns_from_its_own_residuals_and_may_have_another_tolerance() -> None:
    family = present("wan22")
    pipe = family.make()
    expected = family.run(pipe, steps=30)
    for tolerance in (LOOSE, 0.0, None):
        patch = apply_cache_dit(pipe, **KNOBS, secondary={"tolerance": tolerance, "residual_diff_threshold": 0.0})
        assert off(family.run(pipe, steps=30), expected) < 0.05
        branch = patch.stats.runs[-1].branches["cond"]
        switch = branch.components.index("transformer_2")
        assert not all(branch.computed[:switch])
        assert all(branch.computed[switch : switch + 3])
        assert all(branch.computed[switch:]) == (tolerance != LOOSE)


def test_guidance_that_ends_and_comes_back_in_mid_run() -> None:
    family = present("wan")
    pipe = family.make()

    def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 1.0 if 4 <= step < 11 else 4.0
        return values

    expected = family.run(pipe, steps=STEPS, callback_on_step_end=callback)
    patch = apply_cache_dit(pipe, **KNOBS)
    assert off(family.run(pipe, steps=STEPS, callback_on_step_end=callback), expected) < 0.05
    assert masks(patch)["cond"].count(False) > 0
    assert patch.held_bytes() == 0


def test_batch_that_shrinks_in_mid_run() -> None:
    family = present("zimage")
    pipe = family.make()
    expected = family.run(pipe, steps=30, cfg_truncation=0.5)
    patch = apply_cache_dit(pipe, **KNOBS)
    assert off(family.run(pipe, steps=30, cfg_truncation=0.5), expected) < 0.12
    (branch,) = patch.stats.runs[-1].branches.values()
    switch = branch.reasons.index("nothing to reuse", 1)
    assert all(branch.computed[switch : switch + 3])
    assert patch.held_bytes() == 0


def test_values_that_are_not_finite_are_never_predicted_from() -> None:
    family = present("wan")
    pipe = family.make()
    patch = apply_cache_dit(pipe, **{**KNOBS, "tolerance": 1.0})
    latents = family.call(pipe)["latents"]
    latents[0, 0, 0, 0, 0] = float("nan")
    family.run(pipe, steps=STEPS, latents=latents)
    assert all(masks(patch)["cond"])


def test_title_says_what_decides() -> None:
    pipe = present("wan").make()
    patch = apply_cache_dit(pipe, tolerance=0.008, taylorseer_order=2, fn_compute_blocks=0)
    assert "(F0B0, TaylorSeer order 2, gap control, tolerance 0.008, warm-up 4)" in str(patch)
    assert "threshold" not in str(patch)


# What it is worth


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over the pictures of a batch, of pixels in [0, 1]."""
    errors = ((one - other).reshape(len(one), -1) ** 2).mean(1)
    return float((-10 * np.log10(np.maximum(errors, 1e-12))).mean())


@pytest.mark.parametrize(("name", "margin"), [("flux", 5), pytest.param("wan", 5, marks=pytest.mark.matrix)])
def test_tolerance_of_the_documentation_beats_fewer_steps_at_the_same_cost(name: str, margin: float) -> None:
    pipe = miniatures.load_miniature(name)
    shown = miniatures.captions(name, 1, 5)

    def run(steps: int) -> np.ndarray:
        return miniatures.to_frames(name, pipe(**miniatures.call_kwargs(name, shown, seed=100, steps=steps)))

    expected = run(50)
    with apply_cache_dit(pipe, tolerance=0.008, taylorseer_order=2, fn_compute_blocks=0) as patch:
        cached = run(50)
    computed = sum(masks(patch)["cond"])
    assert computed <= 22
    assert psnr(cached, expected) > psnr(run(computed), expected) + margin
