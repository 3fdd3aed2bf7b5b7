"""What is measured: unpatched runs of several lengths, this library's settings, and the peers' that are installed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from miniatures import call_kwargs, captions, load_miniature
from sgl_diffusion_accel import TeaCacheCoefficients, apply_cache_dit, apply_teacache, fit_teacache

from .peers import cache_dit, diffusers_caches
from .settings import (
    Setting,
    TeaCacheSetting,
    dbcache_settings,
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


def contenders(model: str, steps: int) -> list[Contender]:
    """All contenders for one miniature, the unpatched run first.

    Args:
        model: Name of the miniature.
        steps: Denoising steps of a run.
    """
    found = [Contender(UNPATCHED, f"{steps} steps")]
    found += [Contender(FEWER, f"{n} steps", steps=n) for n in _SHORTER if n < steps]
    settings = [one for one in dbcache_settings() + preset_settings() if one.fn <= _FIRST_LIST[model]]
    ours = settings + late_settings() + sigma_settings()
    found += [Contender(OURS, setting.name, partial(apply_ours, setting=setting)) for setting in ours]
    for teacache in teacache_settings(model):
        found.append(Contender(OURS, teacache.name, partial(apply_fitted_teacache, model, steps, teacache)))
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
    )


_FIT_CAPTIONS, _FIT_CAPTION_SEED, _FIT_NOISE_SEED = 6, 5, 0  # none of them is measured


@functools.cache
def teacache_fit(model: str, steps: int, use_ret_steps: bool | None) -> TeaCacheCoefficients:
    """Coefficients fitted to a miniature, on captions and noise that are not measured."""
    chosen = captions(model, _FIT_CAPTIONS, _FIT_CAPTION_SEED)
    calls = [call_kwargs(model, each, seed=_FIT_NOISE_SEED + i, steps=steps) for i, each in enumerate(chosen)]
    with torch.no_grad():
        return fit_teacache(load_miniature(model), calls, use_ret_steps)


def apply_fitted_teacache(
    model: str, steps: int, setting: TeaCacheSetting, pipe: Any
) -> AbstractContextManager[object]:
    """Applies TeaCache with fitted coefficients."""
    fit = teacache_fit(model, steps, setting.use_ret_steps)
    return apply_teacache(pipe, setting.speedup, coefficients=fit, taylorseer_order=setting.order)


def teacache_fits(model: str, steps: int) -> list[dict[str, Any]]:
    """The coefficients that were used, for the result's file."""
    choices = sorted({setting.use_ret_steps for setting in teacache_settings(model)}, key=bool)
    fits = [teacache_fit(model, steps, choice) for choice in choices]
    names = ("coefficients", "thresholds", "low", "high", "r_squared", "use_ret_steps")
    return [{name: getattr(fit, name) for name in names} for fit in fits]
