"""Every cache at a setting that never skips, and at one that skips steps whatever the model's numbers are.

With random weights nothing can be said about when a cache should skip; what a computed and a skipped step cost does not
depend on that. The thresholds are therefore out of reach, and the limits on skipping alone decide.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.peers import cache_dit
from benchmarks.settings import Setting
from sgl_diffusion_accel import (
    CachePatch,
    apply_adaptive_cache,
    apply_cache_dit,
    apply_cache_plan,
    apply_magcache,
    apply_teacache,
    calibrate,
)

from .models import Built

STEPS = 12
"""Denoising steps of a run that skips: the adaptive cache leaves runs of fewer than 10 alone."""

NEVER_STEPS = 4
"""Of a run that computes every step."""

_MASK = "xxx..x...x.x"
_OUT_OF_REACH = 1e9
_SELDOM, _ALWAYS = (0.0, 0.0, 0.0, 1e-6, 0.0), (0.0, 0.0, 0.0, 0.0, 1.0)
"""TeaCache's polynomials: hardly any increment, so that the window alone decides; and one above any threshold."""

Apply = Callable[[Any], CachePatch]

NEVER: dict[str, Apply] = {
    "DBCache F1": partial(apply_cache_dit, max_warmup_steps=1_000_000),
    "adaptive": partial(apply_adaptive_cache, tolerance=0),
    "TeaCache": partial(apply_teacache, teacache_thresh=1e-9, coefficients=_ALWAYS),
    "MagCache": partial(apply_magcache, magnitude_ratios=[1.0] * NEVER_STEPS, threshold=0),
}
"""Settings that never skip, by name."""

_DBCACHE = Setting(fn=1, warmup=3, threshold=_OUT_OF_REACH, continuous=3)
_DBCACHE_1 = replace(_DBCACHE, order=1)


SKIPPING: dict[str, Apply] = {
    "adaptive": partial(apply_adaptive_cache, tolerance=1.0),
    "static mask F0, TaylorSeer 2": partial(
        apply_cache_dit,
        fn_compute_blocks=0,
        steps_mask=[mark == "x" for mark in _MASK],
        steps_policy="static",
        taylorseer_order=2,
    ),
    "DBCache F1": partial(apply_cache_dit, **_DBCACHE.knobs),
    "DBCache F1, TaylorSeer 1": partial(apply_cache_dit, **_DBCACHE_1.knobs),
    "TeaCache": partial(apply_teacache, teacache_thresh=_OUT_OF_REACH, coefficients=_SELDOM, start_skipping=3),
    "MagCache": partial(
        apply_magcache, magnitude_ratios=[1.0] * STEPS, threshold=_OUT_OF_REACH, retention_ratio=0.25, max_skip_steps=3
    ),
}
"""Settings that skip, by name."""


def plan(built: Built) -> Apply:
    """A plan from one call, at twice the speed."""
    call = built.call | {"num_inference_steps": STEPS}
    made = calibrate(built.pipe, [call], teacache=False, magnitudes=False, progress=False)
    return partial(apply_cache_plan, plan=made, speedup=2.0, guard=None)


def peers() -> dict[str, Callable[[Any], AbstractContextManager[object]]]:
    """cache-dit at the same settings, if it is installed; to be applied last, since it leaves things behind."""
    if not cache_dit.installed():
        return {}
    settings = {
        "cache-dit DBCache F1": _DBCACHE,
        "cache-dit DBCache F1, TaylorSeer 1": _DBCACHE_1,
    }
    return {name: partial(cache_dit.apply, setting=setting, steps=STEPS) for name, setting in settings.items()}


def computed_steps(patch: CachePatch, steps: int) -> list[bool]:
    """Whether each step of the last run was computed, in any branch."""
    branches = patch.stats.runs[-1].branches.values()
    return [any(branch.computed[step] for branch in branches) for step in range(steps)]
