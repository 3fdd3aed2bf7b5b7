"""The caches under test, each as a function of the pipeline alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sgl_diffusion_accel import CachePatch, apply_cache_dit, apply_teacache

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


CACHES: dict[str, Apply] = {
    "reuse": reuse,
    "taylor": taylor,
    "static": static,
    "teacache": teacache,
    "teacache, Taylor": teacache_taylor,
}
"""Caches that skip steps of a run of `STEPS` steps."""

NEVER_SKIPPING: dict[str, Apply] = {
    "threshold 0": lambda pipe: apply_cache_dit(pipe, residual_diff_threshold=0.0, max_warmup_steps=1),
    "threshold 0, Taylor": lambda pipe: apply_cache_dit(pipe, residual_diff_threshold=0.0, taylorseer_order=2),
    "mask of ones": lambda pipe: apply_cache_dit(pipe, steps_mask=[1] * STEPS, steps_policy="static"),
    "dynamic mask of ones": lambda pipe: apply_cache_dit(pipe, steps_mask=[1] * STEPS, residual_diff_threshold=10.0),
    "teacache, always over": teacache_always_over,
    "teacache, empty window": teacache_empty_window,
}
"""Caches that must leave every bit of the output as it is."""

NEEDS_NO_VALUE = ("static", *(name for name in NEVER_SKIPPING if name != "teacache, always over"))
"""Names of the caches that decide without measuring a change, on every model."""

BY_TIME = ("wan", "wan22", "wan_v2v", "cogvideox")
"""Families whose signal for TeaCache is the time embedding; that of all others is the modulated input."""


def skips_some(patch: CachePatch) -> bool:
    """Whether the last run skipped a step on every branch, so that a comparison with it means something."""
    branches = patch.stats.runs[-1].branches.values()
    return bool(branches) and all(not all(branch.computed) for branch in branches)
