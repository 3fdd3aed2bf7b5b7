"""What is measured: unpatched runs of several lengths, this library's settings, and the peers' that are installed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from sgl_diffusion_accel import (
    apply_adaptive_cache,
    apply_cache_dit,
    apply_cache_plan,
    apply_magcache,
    apply_teacache,
)

from .calibrated import CAPTIONS, Calibrated, Of
from .peers import cache_dit, diffusers_caches, easycache, spectrum, taylorseer
from .settings import (
    SHOWN,
    TOLERANCES,
    MagCacheSetting,
    Setting,
    TeaCacheSetting,
    calibrator_settings,
    dbcache_settings,
    gap_settings,
    late_settings,
    magcache_settings,
    planned_speedups,
    preset_settings,
    sigma_settings,
    teacache_settings,
)

OURS = "sgl-diffusion-accel"
FEWER = "fewer steps"
UNPATCHED = "unpatched"

_FIRST_LIST = {"wan": 12, "qwen": 12, "emoji": 12, "flux": 4}
"""Blocks in the first list of each miniature: as many can be computed at each step."""

_PLAN_STEPS = 50
"""Denoising steps of the plans that are used for other runs too."""

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


def contenders(made: Calibrated, full: bool = True) -> list[Contender]:
    """The contenders for one miniature, the unpatched run first.

    Args:
        made: What is calibrated for the runs that are measured.
        full: Whether with every setting of this library's sweeps, and not those alone that tables show (`SHOWN`). Of
            peers always all.
    """
    model, steps = made.of.model, made.of.steps
    found = [Contender(UNPATCHED, f"{steps} steps")]
    found += [Contender(FEWER, f"{n} steps", steps=n) for n in _SHORTER if n < steps]
    settings = [one for one in dbcache_settings() + preset_settings() if one.fn <= _FIRST_LIST[model]]
    ours = settings + late_settings() + sigma_settings() + gap_settings()
    apply: dict[str, Any] = {setting.name: partial(apply_cache_dit, **setting.knobs) for setting in ours}
    apply |= {f"adaptive, tolerance {each:g}": partial(apply_adaptive_cache, tolerance=each) for each in TOLERANCES}
    for of, count, title in [(made.of, CAPTIONS, "plan"), *_carried_plans(made.of)]:
        for speedup in planned_speedups(steps):
            apply[f"{title}, {speedup:g}x"] = partial(planned, made, of, count, speedup)
    apply |= {f"tuned plan, {speedup:g}x": partial(tuned, made, speedup) for speedup in planned_speedups(steps)}
    apply |= {setting.name: partial(apply_fitted_teacache, made, setting) for setting in teacache_settings(model)}
    apply |= {setting.name: partial(apply_calibrated_magcache, made, setting) for setting in magcache_settings()}
    found += [
        Contender(OURS, name, apply_it)
        for name, apply_it in apply.items()
        if full or name in SHOWN or name.startswith(("adaptive", "plan", "tuned plan"))
    ]
    return found + _peers(settings, made)


def _peers(settings: list[Setting], made: Calibrated) -> list[Contender]:
    """Others' caches, each family with a sweep of its own; cache-dit with ours too."""
    steps = made.of.steps
    found: list[Contender] = []
    if cache_dit.installed():
        found += [
            Contender("cache-dit", one.name, partial(cache_dit.apply, setting=one, steps=steps))
            for one in (*settings, *calibrator_settings())
            if cache_dit.has(one)
        ]
    configs = diffusers_caches.configs(
        made.of.model, steps, lambda: made.once("mag_ratios", partial(diffusers_caches.mag_ratios, made.of))
    )
    found += [Contender("diffusers", name, partial(diffusers_caches.apply, config=each)) for name, each in configs]
    found += [
        Contender(easycache.FAMILY, one.name, partial(easycache.apply, setting=one, steps=steps))
        for one in easycache.settings(steps)
    ]
    found += [
        Contender(spectrum.FAMILY, one.name, partial(spectrum.apply, setting=one, steps=steps))
        for one in spectrum.SETTINGS
    ]
    return found + [
        Contender(taylorseer.FAMILY, one.name, partial(taylorseer.apply, setting=one)) for one in taylorseer.SETTINGS
    ]


def _carried_plans(of: Of) -> list[tuple[Of, int, str]]:
    """Plans made for something else: what for, the calls they were made from, what they are called."""
    usual = of._replace(steps=_PLAN_STEPS, scheduler="euler")
    if of == usual:
        return [(usual, 1, "plan of one caption")]
    other = f"{_PLAN_STEPS} Euler steps"
    return [(usual, CAPTIONS, f"plan of {other}"), (usual, 1, f"plan of one caption and {other}")]


def planned(made: Calibrated, of: Of, count: int, speedup: float, pipe: Any) -> AbstractContextManager[object]:
    """Applies a plan. Its design is searched once in a process, as for a user who makes several runs."""
    return apply_cache_plan(pipe, made.plan(of, count)[0], speedup=speedup)


def tuned(made: Calibrated, speedup: float, pipe: Any) -> AbstractContextManager[object]:
    """Applies a plan whose designs were tried."""
    return apply_cache_plan(pipe, made.tuned_plan()[0], speedup=speedup)


def apply_fitted_teacache(made: Calibrated, setting: TeaCacheSetting, pipe: Any) -> AbstractContextManager[object]:
    """Applies TeaCache with fitted coefficients."""
    fit = made.teacache_fit(setting.use_ret_steps)
    return apply_teacache(pipe, setting.speedup, coefficients=fit, taylorseer_order=setting.order)


def apply_calibrated_magcache(made: Calibrated, setting: MagCacheSetting, pipe: Any) -> AbstractContextManager[object]:
    """Applies MagCache with recorded ratios."""
    return apply_magcache(
        pipe,
        made.magnitudes(),
        threshold=setting.threshold,
        max_skip_steps=setting.skips,
        retention_ratio=setting.retention,
        taylorseer_order=setting.order,
    )
