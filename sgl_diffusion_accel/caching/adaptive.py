"""`apply_adaptive_cache`: step-size control for diffusion pipelines, as one line and with nothing to tune."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from sgl_diffusion_accel.caching.cache_patch import CachePatch, apply_output_cache, refuse_foreign_cache
from sgl_diffusion_accel.caching.parts.gap_control import GapControl, GapSettings, Pace
from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.loop.runs import Run
from sgl_diffusion_accel.loop.scheduler_response import passing_influence, response_of
from sgl_diffusion_accel.targets import find_transformers
from sgl_diffusion_accel.validate import real

logger = logging.getLogger(__name__)

DEFAULT_TOLERANCE = GapSettings.tolerance
_ALLOWED = "a number from 0 (computes every step) to 1, such as 0.001"


def apply_adaptive_cache(pipe: object, tolerance: float | None = None) -> CachePatch:
    """Skips whole denoising steps where the run is smooth, with an error control that needs no calibration.

    A skipped step takes the line through the last two computed outputs of the transformer, branch by branch. At the
    next computed step the outputs between are known much better, by interpolation, and what the prediction has done
    wrong to the latents is put right in that step's output: predictor and corrector. How far the line was from what
    was computed tells how curved the path is, and so how long the next gap may be, as step-size control does in
    solvers of differential equations. The transformer is not called at skipped steps at all, and nothing inside it is
    touched: it works for any model, compiled or not.

    Args:
        pipe: A diffusers pipeline with a diffusion transformer (two for Wan2.2), or the transformer itself.
        tolerance: Largest error that a gap may leave in the final latents, as estimated, relative to how far the
            latents move in the run; None for 0.001. A tenth of it costs about half as many computed steps again; 0
            computes all.

    Returns:
        The patch: `patch.remove()` undoes it exactly, `patch.stats` tells what it did, `print(patch)` sums it up.

    Raises:
        ConfigError: The tolerance is out of range.
        ConfigTypeError: `pipe` or the tolerance has a wrong type.
        UnsupportedModelError: The pipeline has no diffusion transformer, or another cache is on it.

    Source: step-size control as in E. Hairer, S. Nørsett, G. Wanner, "Solving Ordinary Differential Equations I", II.4;
    the correction by interpolation is this library's own.

    Example:
        >>> patch = apply_adaptive_cache(pipe)
        >>> picture = pipe(**call)
        >>> patch.remove()
    """
    settings = GapSettings(tolerance=_tolerance(tolerance))
    transformers = find_transformers(pipe)
    refuse_foreign_cache(transformers)

    def pace(run: Run) -> Pace:
        response = response_of(run.scheduler, run.total, run.first)
        skips = settings.tolerance > 0 and run.total >= settings.fewest_steps
        switch = run.switch() if skips else None
        if response is None:
            return GapControl(settings, np.ones(run.total), corrects=False, switch=switch)
        return GapControl(settings, response[-1], switch=switch, passing=passing_influence(response))

    return apply_output_cache(f"adaptive cache (tolerance {settings.tolerance:g})", transformers, pace, pipe)


def _tolerance(given: Any) -> float:
    if given is None:
        return DEFAULT_TOLERANCE
    value = real("tolerance", given, _ALLOWED)
    if not 0 <= value <= 1:
        raise ConfigError(f"tolerance={given!r}; allowed: {_ALLOWED}.")
    return value
