"""`apply_magcache`: the cache that goes by magnitudes, as one line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from sgl_diffusion_accel.caching.blocks.cached_model import Parts
from sgl_diffusion_accel.caching.blocks.layout import divide
from sgl_diffusion_accel.caching.cache_patch import CachePatch, apply_cache, refuse_foreign_cache
from sgl_diffusion_accel.caching.magcache.magnitude_policy import MagnitudePolicy
from sgl_diffusion_accel.caching.magcache.magnitudes import MagnitudeRatios, Ratios
from sgl_diffusion_accel.caching.parts.predictors import Reuse, Taylor
from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError
from sgl_diffusion_accel.targets import find_transformers, unwrap
from sgl_diffusion_accel.validate import count, real


def apply_magcache(
    pipe: object,
    magnitude_ratios: MagnitudeRatios | Sequence[float],
    threshold: float = 0.06,
    max_skip_steps: int = 3,
    retention_ratio: float = 0.2,
    taylorseer_order: int = 0,
) -> CachePatch:
    """Caches whole denoising steps of a pipeline: MagCache, for each branch and each expert on its own.

    How much larger or smaller what all blocks add is at each step than at the step before, γ, hardly depends on the
    prompt. So it is known beforehand how far the magnitude of a residual that is reused is off: at step s by
    |1 - γ_c+1 · … · γ_s|, with c the last computed step. As long as these errors sum up to less than `threshold`, all
    transformer blocks are skipped and what they added at the last computed step is added again (refiners and other
    lists beside the stack run as always). Nothing is measured, so that the device is never waited for, and the steps of
    a run are the same whatever the prompt. The first and the last step are always computed.

    Args:
        pipe: A diffusers pipeline with a diffusion transformer (two for Wan2.2), or the transformer itself.
        magnitude_ratios: `plan.magnitude_ratios` of a plan by `calibrate`; or one number for each denoising step, the
            same for all branches, such as the `mag_ratios` of diffusers (the first one is not used). For runs with
            another number of steps those of the nearest steps are taken.
        threshold: Compute a step when the errors since the last computed step sum up to it; larger is faster and less
            faithful, 0 never skips.
        max_skip_steps: Longest run of skipped steps.
        retention_ratio: Share of the steps, at the start, that are computed.
        taylorseer_order: Order of a Taylor prediction of what the blocks add, 0 reuses the last computed.

    Returns:
        The patch: `patch.remove()` undoes it exactly, `patch.stats` tells what it did, `print(patch)` sums it up.

    Raises:
        ConfigError: A setting is not allowed, or the ratios are not those of this pipeline's transformers.
        ConfigTypeError: `pipe` or a setting has a wrong type.
        UnsupportedModelError: The pipeline has no transformer whose blocks could be cached.

    Source: MagCache, https://arxiv.org/abs/2506.09045; names and defaults as in diffusers.

    Example:
        >>> plan = calibrate(pipe, calls=[call])
        >>> patch = apply_magcache(pipe, plan.magnitude_ratios, threshold=0.12, taylorseer_order=1)
        >>> patch.remove()
    """
    transformers = find_transformers(pipe)
    refuse_foreign_cache(transformers)
    ratios = _ratios(magnitude_ratios, list(transformers))
    order = count("taylorseer_order", taylorseer_order, 0)
    make = functools.partial(
        MagnitudePolicy,
        threshold=_within("threshold", threshold, float("inf"), "0 never skips"),
        max_skip_steps=count("max_skip_steps", max_skip_steps, 0),
        retention_ratio=_within("retention_ratio", retention_ratio, 1.0, "a share of the steps, such as 0.2"),
    )
    parts = {name: _parts(unwrap(module), ratios, name, make, order) for name, module in transformers.items()}
    title = (
        f"MagCache (ratios of {ratios.steps} steps, threshold {threshold:g}, at most {max_skip_steps} steps in a row, "
        f"retention {retention_ratio:.0%}, " + (f"TaylorSeer order {order})" if order else "reuse)")
    )
    return apply_cache(title, transformers, parts, pipe)


def _parts(
    module: nn.Module, ratios: MagnitudeRatios, component: str, make: Callable[[Ratios], MagnitudePolicy], order: int
) -> Parts:
    def by_branch(branch: str) -> MagnitudePolicy:
        return make(ratios.of(component, branch))

    return Parts(
        layout=divide(module, 0, 0),
        policy=by_branch(""),
        predictor=Taylor(order) if order else Reuse(),
        signal=None,
        by_branch=by_branch,
    )


def _ratios(given: Any, components: Sequence[str]) -> MagnitudeRatios:
    """What the user has given, as ratios by component and branch."""
    if isinstance(given, MagnitudeRatios):
        return given
    values = given.tolist() if callable(getattr(given, "tolist", None)) else given  # diffusers' are a tensor
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise ConfigTypeError(
            f"magnitude_ratios is a {type(given).__name__}; allowed: plan.magnitude_ratios of a plan by "
            "calibrate(pipe, calls), or a list with a number for each denoising step."
        )
    if len(values) < 2:
        raise ConfigError(
            f"magnitude_ratios has {len(values)} numbers; allowed: one for each denoising step, two or more."
        )
    return MagnitudeRatios({name: {"all": [None, *values[1:]]} for name in components})


def _within(name: str, value: Any, highest: float, meaning: str) -> float:
    number = real(name, value)
    if not 0 <= number <= highest or number == float("inf"):
        limit = "" if highest == float("inf") else f" to {highest:g}"
        raise ConfigError(f"{name}={value}; allowed: a finite number from 0{limit} ({meaning}).")
    return number
