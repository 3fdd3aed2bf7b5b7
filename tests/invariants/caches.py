"""The caches under test, each as a function of the pipeline alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from sgl_diffusion_accel import (
    CacheDiTConfig,
    CachePatch,
    CachePlan,
    apply_adaptive_cache,
    apply_cache_dit,
    apply_cache_plan,
    apply_magcache,
    apply_teacache,
    calibrate,
)
from sgl_diffusion_accel.caching.cache_dit.apply_cache_dit import parts_of
from sgl_diffusion_accel.caching.cache_patch import put_around, put_on_blocks
from sgl_diffusion_accel.caching.parts.gap_control import GapControl, GapSettings
from sgl_diffusion_accel.caching.parts.gap_policy import GapPolicy, ResidualGrowth
from sgl_diffusion_accel.caching.parts.policies import ThresholdPolicy
from sgl_diffusion_accel.loop.runs import Run
from sgl_diffusion_accel.targets import find_targets
from zoo import FAMILIES

Apply = Callable[[Any], CachePatch]

STEPS = 6
"""Denoising steps of the runs in these tests; masks are made for it."""


def reuse(pipe: Any) -> CachePatch:
    return apply_cache_dit(pipe, residual_diff_threshold=10.0, max_warmup_steps=1, max_continuous_cached_steps=2)


def taylor(pipe: Any) -> CachePatch:
    return apply_cache_dit(
        pipe,
        fn_compute_blocks=2,
        bn_compute_blocks=1,
        residual_diff_threshold=10.0,
        max_warmup_steps=2,
        max_continuous_cached_steps=1,
        taylorseer_order=1,
    )


def gaps(pipe: Any, tolerance: float = 10.0) -> CachePatch:
    """Gap control on runs of 6 steps, which by itself computes all of so few."""
    config = CacheDiTConfig(fn_compute_blocks=1, taylorseer_order=1, tolerance=1.0, max_warmup_steps=2)
    targets = find_targets(pipe)
    settings = GapSettings(tolerance, warm_up=0, longest_gap=2, fewest_steps=1, interpolation=1.0)

    def policy(run: Run, _: str) -> GapPolicy:
        # An estimate to begin with, as for `adaptive`.
        pace = GapControl(settings, np.ones(run.total), corrects=False, growth=ResidualGrowth(1), _roughness=1.0)
        return GapPolicy(pace, ThresholdPolicy(math.inf, max_warmup_steps=2))

    parts = {each.name: replace(parts_of(each.module, config), policy=policy) for each in targets}
    return put_on_blocks(targets, "gap control, loosened", parts)


def static(pipe: Any) -> CachePatch:
    return apply_cache_dit(pipe, fn_compute_blocks=0, steps_mask=[1, 0, 1, 0, 0, 1], steps_policy="static")


def teacache(pipe: Any) -> CachePatch:
    """The signal decides, step by step and branch by branch: every family skips some steps, and most compute some."""
    return apply_teacache(pipe, 0.25, coefficients=[0, 0, 0, 1, 0])


def teacache_taylor(pipe: Any) -> CachePatch:
    """Takes the signal at each step and computes every third one, whatever the signal says."""
    return apply_teacache(pipe, 0.25, coefficients=[0, 0, 0, 0, 0.1], taylorseer_order=1)


def teacache_always_over(pipe: Any) -> CachePatch:
    """Takes the signal at each step, and skips none."""
    return apply_teacache(pipe, 0.5, coefficients=[0, 0, 0, 0, 1])


def teacache_empty_window(pipe: Any) -> CachePatch:
    """No step lies between the first one that may be skipped and the last one of the run."""
    return apply_teacache(pipe, 0.5, coefficients=[0, 0, 0, 0, 0], start_skipping=STEPS - 1)


def magcache(pipe: Any) -> CachePatch:
    """The magnitude ratios decide: errors of 0.1 and 0.21, which together are too many."""
    return apply_magcache(pipe, [1.1] * STEPS, threshold=0.25)


def magcache_taylor(pipe: Any) -> CachePatch:
    """The limit decides, where nothing seems to change; two of six steps are retained."""
    return apply_magcache(pipe, [1.0] * STEPS, max_skip_steps=1, retention_ratio=0.3, taylorseer_order=1)


def adaptive(pipe: Any, tolerance: float = 10.0) -> CachePatch:
    """Gap control on runs of 6 steps; `apply_adaptive_cache` computes all of so few, and offers no way round that."""
    settings = GapSettings(tolerance, warm_up=2, longest_gap=1, fewest_steps=1)

    def policy(run: Run) -> GapControl:
        response = run.response()
        final = [1.0] * run.total if response is None else response[-1]
        # An estimate to begin with: else three steps go by before a gap, which is all that an expert of Wan2.2 has.
        return GapControl(settings, np.asarray(final), response is not None, _roughness=1.0)

    return put_around(find_targets(pipe), "adaptive cache, loosened", policy)


@functools.cache
def plan_for(name: str, steps: int = STEPS) -> CachePlan:
    """A plan of a family, calibrated on another prompt than that of its usual run."""
    family = FAMILIES[name]
    pipe = family.make()
    return calibrate(pipe, [family.call(pipe, steps=steps, seed=3)], teacache=False)


@functools.cache
def _transformers(name: str) -> list[str]:
    """The classes of a family's transformers."""
    return [] if FAMILIES[name].missing else _classes(FAMILIES[name].make())


def _classes(pipe: Any) -> list[str]:
    return [target.model for target in find_targets(pipe)]


def _family_of(pipe: Any) -> str:
    """The first family with such transformers."""
    return next(name for name in FAMILIES if _transformers(name) == _classes(pipe))


def planned(pipe: Any) -> CachePatch:
    return apply_cache_plan(pipe, plan_for(_family_of(pipe)), speedup=2.0)


CACHES: dict[str, Apply] = {
    "reuse": reuse,
    "taylor": taylor,
    "gap control": gaps,
    "static": static,
    "teacache": teacache,
    "teacache, Taylor": teacache_taylor,
    "magcache": magcache,
    "magcache, Taylor": magcache_taylor,
    "adaptive": adaptive,
    "plan": planned,
}
"""Caches that skip steps of a run of `STEPS` steps."""

NEVER_SKIPPING: dict[str, Apply] = {
    "threshold 0": lambda pipe: apply_cache_dit(pipe, residual_diff_threshold=0.0, max_warmup_steps=1),
    "threshold 0, Taylor": lambda pipe: apply_cache_dit(pipe, residual_diff_threshold=0.0, taylorseer_order=2),
    "gap control, tolerance 0": lambda pipe: apply_cache_dit(pipe, tolerance=0.0, taylorseer_order=1),
    "gap control, too few steps": lambda pipe: apply_cache_dit(pipe, tolerance=1.0, taylorseer_order=1),
    "mask of ones": lambda pipe: apply_cache_dit(pipe, steps_mask=[1] * STEPS, steps_policy="static"),
    "dynamic mask of ones": lambda pipe: apply_cache_dit(pipe, steps_mask=[1] * STEPS, residual_diff_threshold=10.0),
    "teacache, always over": teacache_always_over,
    "teacache, empty window": teacache_empty_window,
    "magcache, threshold 0": lambda pipe: apply_magcache(pipe, [1.0] * STEPS, threshold=0.0),
    "magcache, all retained": lambda pipe: apply_magcache(pipe, [1.0] * STEPS, retention_ratio=1.0),
    "adaptive, too few steps": apply_adaptive_cache,
    "adaptive, tolerance 0": lambda pipe: adaptive(pipe, 0.0),
    "plan, all steps": lambda pipe: apply_cache_plan(pipe, plan_for(_family_of(pipe)), computed_steps=STEPS),
}
"""Caches that must leave every bit of the output as it is."""

KINDS = ("taylor", "teacache", "adaptive")
"""Names of the caches that stand for the others: by residuals, with blocks at both ends; by TeaCache's signal, which is
another one for each family; by whole calls."""

KINDS_NEVER_SKIPPING = ("threshold 0, Taylor", "teacache, always over", "adaptive, tolerance 0")
"""The same of those that never skip."""

WHOLE_CALLS = ("adaptive", "plan")
"""Names of the caches that skip whole calls of a transformer, its first blocks, norms and projections included."""

NEEDS_NO_VALUE = (
    "static",
    "magcache",
    "magcache, Taylor",
    *(
        name
        for name in NEVER_SKIPPING
        if name
        not in ("gap control, too few steps", "teacache, always over", "adaptive, tolerance 0", "plan, all steps")
    ),
)
"""Names of the caches that decide without measuring a change, on every model."""

BY_TIME = ("wan", "wan22", "wan_v2v", "cogvideox")
"""Families whose signal for TeaCache is the time embedding; that of all others is the modulated input."""


def skips_some(patch: CachePatch) -> bool:
    """Whether the last run skipped a step on every branch, so that a comparison with it means something."""
    branches = patch.stats.runs[-1].branches.values()
    return bool(branches) and all(not all(branch.computed) for branch in branches)
