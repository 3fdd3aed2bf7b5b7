"""What is measured: unpatched runs of several lengths, this library's settings, and the peers' that are installed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from miniatures import call_kwargs, captions, load_miniature
from sgl_diffusion_accel import (
    CachePlan,
    TeaCacheCoefficients,
    apply_adaptive_cache,
    apply_cache_dit,
    apply_cache_plan,
    apply_teacache,
    calibrate,
    fit_teacache,
)

from .peers import cache_dit, diffusers_caches
from .settings import (
    PLANNED,
    TOLERANCES,
    Setting,
    TeaCacheSetting,
    dbcache_settings,
    gap_settings,
    late_settings,
    preset_settings,
    sigma_settings,
    teacache_settings,
)

OURS = "sgl-diffusion-accel"
FEWER = "fewer steps"
UNPATCHED = "unpatched"

_FIRST_LIST = {"wan": 12, "qwen": 12, "flux": 4}
"""Blocks in the first list of each miniature: as many can be computed at each step."""

_SHORTER = (45, 40, 35, 30, 27, 25, 22, 20, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8)


@dataclass(frozen=True)
class Contender:
    """One way to run a pipeline.

    Attributes:
        family: Whose it is.
        name: Which setting.
        apply: Patches a pipeline until the context ends.
        steps: Denoising steps, if fewer than the unpatched run's.
    """

    family: str
    name: str
    apply: Callable[[Any], AbstractContextManager[object]] = nullcontext
    steps: int | None = None


def contenders(model: str, steps: int, scheduler: str = "euler") -> list[Contender]:
    """All contenders for one miniature, the unpatched run first.

    Args:
        model: Name of the miniature.
        steps: Denoising steps of a run.
        scheduler: "euler" or "unipc".
    """
    found = [Contender(UNPATCHED, f"{steps} steps")]
    found += [Contender(FEWER, f"{n} steps", steps=n) for n in _SHORTER if n < steps]
    settings = [one for one in dbcache_settings() + preset_settings() if one.fn <= _FIRST_LIST[model]]
    ours = settings + late_settings() + sigma_settings() + gap_settings()
    found += [Contender(OURS, setting.name, partial(apply_ours, setting=setting)) for setting in ours]
    for tolerance in TOLERANCES:
        found.append(Contender(OURS, f"adaptive, tolerance {tolerance:g}", partial(adaptive, tolerance)))
    for speedup in PLANNED:
        found.append(Contender(OURS, f"plan, {speedup:g}x", partial(planned, model, steps, scheduler, speedup)))
    if (steps, scheduler) != (_PLAN_STEPS, "euler"):
        for speedup in PLANNED:
            carried = partial(planned, model, _PLAN_STEPS, "euler", speedup)
            found.append(Contender(OURS, f"plan of {_PLAN_STEPS} Euler steps, {speedup:g}x", carried))
    for teacache in teacache_settings(model):
        found.append(Contender(OURS, teacache.name, partial(apply_fitted_teacache, model, steps, scheduler, teacache)))
    if cache_dit.installed():
        apply = partial(cache_dit.apply, steps=steps)
        found += [Contender("cache-dit", setting.name, partial(apply, setting=setting)) for setting in settings]
    for name, config in diffusers_caches.configs(model, steps):
        found.append(Contender("diffusers", name, partial(diffusers_caches.apply, config=config)))
    return found


def apply_ours(pipe: Any, setting: Setting) -> AbstractContextManager[object]:
    """Applies one setting of this library."""
    return apply_cache_dit(
        pipe,
        fn_compute_blocks=setting.fn,
        bn_compute_blocks=setting.bn,
        max_warmup_steps=setting.warmup,
        residual_diff_threshold=setting.threshold,
        max_continuous_cached_steps=setting.continuous,
        taylorseer_order=setting.order,
        steps_mask=setting.preset,
        steps_policy=setting.policy,
        taylorseer_spacing=setting.spacing,
        tolerance=setting.tolerance,
    )


_FIT_CAPTIONS, _FIT_CAPTION_SEED, _FIT_NOISE_SEED = 6, 5, 0  # none of them is measured
_PLAN_STEPS = 50


@functools.cache
def teacache_fit(model: str, steps: int, scheduler: str, use_ret_steps: bool | None) -> TeaCacheCoefficients:
    """Coefficients fitted to a miniature, on captions and noise that are not measured."""
    with torch.no_grad():
        return fit_teacache(load_miniature(model, scheduler=scheduler), _fit_calls(model, steps), use_ret_steps)


def _fit_calls(model: str, steps: int) -> list[dict[str, Any]]:
    chosen = captions(model, _FIT_CAPTIONS, _FIT_CAPTION_SEED)
    return [call_kwargs(model, each, seed=_FIT_NOISE_SEED + i, steps=steps) for i, each in enumerate(chosen)]


@functools.cache
def plan_of(model: str, steps: int, scheduler: str) -> tuple[CachePlan, float]:
    """A plan for a miniature, from the same calls, and the CPU time that calibration took over that of the calls."""
    calls, pipe = _fit_calls(model, steps), load_miniature(model, scheduler=scheduler)
    with torch.no_grad():
        pipe(**calls[0])  # warm-up
        begin = time.thread_time()
        for call in calls:
            pipe(**call)
        middle = time.thread_time()
        plan = calibrate(pipe, calls, teacache=False)
        return plan, (time.thread_time() - middle) / (middle - begin)


def adaptive(tolerance: float, pipe: Any) -> AbstractContextManager[object]:
    """Applies the adaptive cache."""
    return apply_adaptive_cache(pipe, tolerance)


def planned(model: str, steps: int, scheduler: str, speedup: float, pipe: Any) -> AbstractContextManager[object]:
    """Applies a plan. Its design is searched once in a process, as for a user who makes several runs."""
    plan, _ = plan_of(model, steps, scheduler)
    return apply_cache_plan(pipe, plan, speedup=speedup)


def apply_fitted_teacache(
    model: str, steps: int, scheduler: str, setting: TeaCacheSetting, pipe: Any
) -> AbstractContextManager[object]:
    """Applies TeaCache with fitted coefficients."""
    fit = teacache_fit(model, steps, scheduler, setting.use_ret_steps)
    return apply_teacache(pipe, setting.speedup, coefficients=fit, taylorseer_order=setting.order)


def teacache_fits(model: str, steps: int, scheduler: str = "euler") -> list[dict[str, Any]]:
    """The coefficients that were used, for the result's file."""
    choices = sorted({setting.use_ret_steps for setting in teacache_settings(model)}, key=bool)
    fits = [teacache_fit(model, steps, scheduler, choice) for choice in choices]
    names = ("coefficients", "thresholds", "low", "high", "r_squared", "use_ret_steps")
    return [{name: getattr(fit, name) for name in names} for fit in fits]


def calibration(model: str, steps: int, scheduler: str) -> dict[str, Any]:
    """What calibration cost and found, for the result's file."""
    plan, cost = plan_of(model, steps, scheduler)
    expected = {f"{speedup:g}": plan.design(max(1, round(steps / speedup))).error for speedup in PLANNED}
    return {"calls": plan.calls, "cpu_time_in_calls": cost, "expected_relative_error": expected}
