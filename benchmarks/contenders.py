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
    MagnitudeRatios,
    TeaCacheCoefficients,
    apply_adaptive_cache,
    apply_cache_dit,
    apply_cache_plan,
    apply_magcache,
    apply_teacache,
    calibrate,
    check_plan,
    fit_teacache,
)

from .peers import cache_dit, diffusers_caches
from .settings import (
    PLANNED,
    SHOWN,
    TOLERANCES,
    MagCacheSetting,
    TeaCacheSetting,
    dbcache_settings,
    gap_settings,
    late_settings,
    magcache_settings,
    preset_settings,
    sigma_settings,
    teacache_settings,
)

OURS = "sgl-diffusion-accel"
FEWER = "fewer steps"
UNPATCHED = "unpatched"

_FIRST_LIST = {"wan": 12, "qwen": 12, "emoji": 12, "flux": 4}
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


def contenders(model: str, steps: int, scheduler: str = "euler", full: bool = True) -> list[Contender]:
    """The contenders for one miniature, the unpatched run first.

    Args:
        model: Name of the miniature.
        steps: Denoising steps of a run.
        scheduler: One of `miniatures.pipelines.SCHEDULERS`.
        full: Whether with every setting of this library's sweeps, and not those alone that tables show (`SHOWN`). Of
            peers always all.
    """
    found = [Contender(UNPATCHED, f"{steps} steps")]
    found += [Contender(FEWER, f"{n} steps", steps=n) for n in _SHORTER if n < steps]
    settings = [one for one in dbcache_settings() + preset_settings() if one.fn <= _FIRST_LIST[model]]
    ours = settings + late_settings() + sigma_settings() + gap_settings()
    apply: dict[str, Any] = {setting.name: partial(apply_cache_dit, **setting.knobs) for setting in ours}
    apply |= {f"adaptive, tolerance {each:g}": partial(apply_adaptive_cache, tolerance=each) for each in TOLERANCES}
    plans = [(_FIT_CAPTIONS, steps, scheduler, "plan"), *_carried_plans(steps, scheduler)]
    for calls, steps_of, scheduler_of, title in plans:
        for speedup in PLANNED:
            apply[f"{title}, {speedup:g}x"] = partial(planned, (model, steps_of, scheduler_of, calls), speedup)
    of = (model, steps, scheduler)
    apply |= {setting.name: partial(apply_fitted_teacache, of, setting) for setting in teacache_settings(model)}
    apply |= {setting.name: partial(apply_calibrated_magcache, of, setting) for setting in magcache_settings()}
    found += [
        Contender(OURS, name, apply_it)
        for name, apply_it in apply.items()
        if full or name in SHOWN or name.startswith(("adaptive", "plan"))
    ]
    if cache_dit.installed():
        theirs = {setting.name: partial(cache_dit.apply, setting=setting, steps=steps) for setting in settings}
        found += [Contender("cache-dit", name, apply_it) for name, apply_it in theirs.items()]
    configs = diffusers_caches.configs(model, steps)
    return found + [
        Contender("diffusers", name, partial(diffusers_caches.apply, config=each)) for name, each in configs
    ]


def _carried_plans(steps: int, scheduler: str) -> list[tuple[int, int, str, str]]:
    """Plans made for something else: (calls they were made from, their steps and scheduler, what they are called)."""
    one = "plan of one caption"
    if (steps, scheduler) == (_PLAN_STEPS, "euler"):
        return [(1, _PLAN_STEPS, "euler", one)]
    other = f"{_PLAN_STEPS} Euler steps"
    return [
        (_FIT_CAPTIONS, _PLAN_STEPS, "euler", f"plan of {other}"),
        (1, _PLAN_STEPS, "euler", f"{one} and {other}"),
    ]


Of = tuple[str, int, str]
"""A miniature, denoising steps and a scheduler."""

_FIT_CAPTIONS, _FIT_CAPTION_SEED, _FIT_NOISE_SEED = 6, 5, 0  # none of them is measured
_CHECK_SEED = 55  # of a caption and noise that are neither calibrated on nor measured
_PLAN_STEPS = 50


@functools.cache
def teacache_fit(model: str, steps: int, scheduler: str, use_ret_steps: bool | None) -> TeaCacheCoefficients:
    """Coefficients fitted to a miniature, on captions and noise that are not measured."""
    with torch.no_grad():
        return fit_teacache(load_miniature(model, scheduler=scheduler), _fit_calls(model, steps), use_ret_steps)


def _fit_calls(model: str, steps: int, count: int = _FIT_CAPTIONS) -> list[dict[str, Any]]:
    chosen = captions(model, _FIT_CAPTIONS, _FIT_CAPTION_SEED)[:count]
    return [call_kwargs(model, each, seed=_FIT_NOISE_SEED + i, steps=steps) for i, each in enumerate(chosen)]


@functools.cache
def plan_of(model: str, steps: int, scheduler: str, count: int) -> tuple[CachePlan, float]:
    """A plan for a miniature, from the same calls, and the CPU time that calibration took over that of the calls."""
    calls, pipe = _fit_calls(model, steps, count), load_miniature(model, scheduler=scheduler)
    with torch.no_grad():
        pipe(**calls[0])  # warm-up
        begin = time.thread_time()
        for call in calls:
            pipe(**call)
        middle = time.thread_time()
        plan = calibrate(pipe, calls, teacache=False, magnitudes=False)
        return plan, (time.thread_time() - middle) / (middle - begin)


@functools.cache
def magnitudes_of(model: str, steps: int, scheduler: str) -> MagnitudeRatios:
    """Magnitude ratios of a miniature, from the same calls."""
    with torch.no_grad():
        pipe = load_miniature(model, scheduler=scheduler)
        return calibrate(pipe, _fit_calls(model, steps), teacache=False).magnitude_ratios


def planned(of: tuple[str, int, str, int], speedup: float, pipe: Any) -> AbstractContextManager[object]:
    """Applies a plan. Its design is searched once in a process, as for a user who makes several runs."""
    return apply_cache_plan(pipe, plan_of(*of)[0], speedup=speedup)


def apply_fitted_teacache(of: Of, setting: TeaCacheSetting, pipe: Any) -> AbstractContextManager[object]:
    """Applies TeaCache with fitted coefficients."""
    fit = teacache_fit(*of, setting.use_ret_steps)
    return apply_teacache(pipe, setting.speedup, coefficients=fit, taylorseer_order=setting.order)


def apply_calibrated_magcache(of: Of, setting: MagCacheSetting, pipe: Any) -> AbstractContextManager[object]:
    """Applies MagCache with recorded ratios."""
    ratios = magnitudes_of(*of)
    return apply_magcache(
        pipe,
        ratios,
        threshold=setting.threshold,
        max_skip_steps=setting.skips,
        retention_ratio=setting.retention,
        taylorseer_order=setting.order,
    )


def teacache_fits(model: str, steps: int, scheduler: str = "euler") -> list[dict[str, Any]]:
    """The coefficients that were used, for the result's file."""
    choices = sorted({setting.use_ret_steps for setting in teacache_settings(model)}, key=bool)
    fits = [teacache_fit(model, steps, scheduler, choice) for choice in choices]
    names = ("coefficients", "thresholds", "low", "high", "r_squared", "use_ret_steps")
    return [{name: getattr(fit, name) for name in names} for fit in fits]


def calibration(model: str, steps: int, scheduler: str) -> dict[str, Any]:
    """What calibration cost and found, for the result's file; its expectations also after a check on one more call."""
    plan, cost = plan_of(model, steps, scheduler, _FIT_CAPTIONS)
    budgets = {f"{speedup:g}": max(1, round(steps / speedup)) for speedup in PLANNED}
    call = call_kwargs(model, captions(model, 1, _CHECK_SEED)[0], seed=_CHECK_SEED, steps=steps)
    with torch.no_grad():
        checked = check_plan(load_miniature(model, scheduler=scheduler), plan, [call])
    return {
        "calls": plan.calls,
        "cpu_time_in_calls": cost,
        "expected_relative_error": {name: plan.expected_error(computed) for name, computed in budgets.items()},
        "checked_relative_error": {name: checked.expected_error(computed) for name, computed in budgets.items()},
    }
