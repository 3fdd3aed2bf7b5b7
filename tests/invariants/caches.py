"""The caches under test, each as a function of the pipeline alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sgl_diffusion_accel import (
    CachePatch,
    CachePlan,
    apply_adaptive_cache,
    apply_cache_dit,
    apply_cache_plan,
    apply_teacache,
)
from sgl_diffusion_accel.caching.cache_patch import apply_output_cache
from sgl_diffusion_accel.caching.pacing import GapControl, GapSettings, Pace
from sgl_diffusion_accel.caching.response import response_of
from sgl_diffusion_accel.caching.runs import Run
from sgl_diffusion_accel.calibration.calibrate import digest
from sgl_diffusion_accel.targets import find_transformers, unwrap

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


def adaptive(pipe: Any) -> CachePatch:
    """Gap control as `apply_adaptive_cache` has it, but for runs as short as these, which that computes in full."""

    def pace(run: Run) -> Pace:
        response = response_of(run.scheduler, run.total)
        final = np.ones(run.total) if response is None else response[-1]
        settings = GapSettings(tolerance=1e9, warm_up=2, fewest_steps=2)
        return GapControl(settings, final, corrects=response is not None)

    return apply_output_cache("adaptive cache for short runs", find_transformers(pipe), pace)


def plan_for(pipe: Any, steps: int = 20) -> CachePlan:
    """A plan as if outputs changed smoothly, for a pipeline with any schedule."""
    transformers = find_transformers(pipe)
    times = np.linspace(1000, 20, steps)
    gram = np.exp(-(((times[:, None] - times) / 400) ** 2))
    response = np.tril(np.full((steps, steps), -1 / steps))
    return CachePlan(
        pipeline=type(pipe).__name__,
        transformers=tuple(type(unwrap(module)).__name__ for module in transformers.values()),
        config=digest(transformers),
        scheduler="FlowMatchEulerDiscreteScheduler",
        timesteps=tuple(times.tolist()),
        guidance=None,
        latents=(1,),
        calls=1,
        gram=tuple(gram[np.triu_indices(steps)].tolist()),
        response=tuple(response[np.tril_indices(steps)].tolist()),
    )


def plan(pipe: Any) -> CachePatch:
    return apply_cache_plan(pipe, plan_for(pipe), computed_steps=3, guard=None)


CACHES: dict[str, Apply] = {
    "reuse": reuse,
    "taylor": taylor,
    "static": static,
    "teacache": teacache,
    "teacache, Taylor": teacache_taylor,
    "adaptive": adaptive,
    "plan": plan,
}
"""Caches that skip steps of a run of `STEPS` steps."""

NEVER_SKIPPING: dict[str, Apply] = {
    "threshold 0": lambda pipe: apply_cache_dit(pipe, residual_diff_threshold=0.0, max_warmup_steps=1),
    "threshold 0, Taylor": lambda pipe: apply_cache_dit(pipe, residual_diff_threshold=0.0, taylorseer_order=2),
    "mask of ones": lambda pipe: apply_cache_dit(pipe, steps_mask=[1] * STEPS, steps_policy="static"),
    "dynamic mask of ones": lambda pipe: apply_cache_dit(pipe, steps_mask=[1] * STEPS, residual_diff_threshold=10.0),
    "teacache, always over": teacache_always_over,
    "teacache, empty window": teacache_empty_window,
    "adaptive, tolerance 0": lambda pipe: apply_adaptive_cache(pipe, 0.0),
    "plan of all steps": lambda pipe: apply_cache_plan(pipe, plan_for(pipe), speedup=1.0, guard=None),
}
"""Caches that must leave every bit of the output as it is."""

_READS = ("teacache, always over", "plan of all steps")
NEEDS_NO_VALUE = ("static", *(name for name in NEVER_SKIPPING if name not in _READS))
"""Names of the caches that decide without measuring a change, on every model; a plan reads the timesteps once a run."""

BY_TIME = ("wan", "wan22", "wan_v2v", "cogvideox")
"""Families whose signal for TeaCache is the time embedding; that of all others is the modulated input."""


def skips_some(patch: CachePatch) -> bool:
    """Whether the last run skipped a step on every branch, so that a comparison with it means something."""
    branches = patch.stats.runs[-1].branches.values()
    return bool(branches) and all(not all(branch.computed) for branch in branches)
