"""The caches under test, each as a function of the pipeline alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sgl_diffusion_accel import CachePatch, apply_cache_dit

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


CACHES: dict[str, Apply] = {"reuse": reuse, "taylor": taylor, "static": static}
"""Caches that skip steps of a run of `STEPS` steps."""

NEVER_SKIPPING: dict[str, Apply] = {
    "threshold 0": lambda pipe: apply_cache_dit(pipe, residual_diff_threshold=0.0, max_warmup_steps=1),
    "threshold 0, Taylor": lambda pipe: apply_cache_dit(pipe, residual_diff_threshold=0.0, taylorseer_order=2),
    "mask of ones": lambda pipe: apply_cache_dit(pipe, steps_mask=[1] * STEPS, steps_policy="static"),
    "dynamic mask of ones": lambda pipe: apply_cache_dit(pipe, steps_mask=[1] * STEPS, residual_diff_threshold=10.0),
}
"""Caches that must leave every bit of the output as it is."""


def skips_some(patch: CachePatch) -> bool:
    """Whether the last run skipped a step on every branch, so that a comparison with it means something."""
    branches = patch.stats.runs[-1].branches.values()
    return bool(branches) and all(not all(branch.computed) for branch in branches)
