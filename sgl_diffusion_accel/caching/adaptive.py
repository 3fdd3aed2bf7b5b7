"""`apply_adaptive_cache`: step-size control for diffusion pipelines, as one line and with nothing to tune."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import numpy as np

from sgl_diffusion_accel.caching.cache_config import CacheConfig
from sgl_diffusion_accel.caching.cache_patch import CachePatch, put_around, targets_of_cache
from sgl_diffusion_accel.caching.parts.gap_control import GapControl, GapSettings
from sgl_diffusion_accel.loop.runs import Run
from sgl_diffusion_accel.loop.scheduler_response import passing_influence, share_of_schedule
from sgl_diffusion_accel.targets import Pipe
from sgl_diffusion_accel.validate import names_checked, names_shown, within

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ALLOWED = "a number from 0 (computes every step) to 1, such as 0.001"


@dataclass(frozen=True)
class AdaptiveConfig(CacheConfig):
    """Settings of the adaptive cache.

    Attributes:
        tolerance: Largest error that a gap may leave in the final latents, as estimated, relative to how far the
            latents move in the run, for runs of 50 steps; for S steps it is (50/S)^1.5 times as much, since such a run
            is itself as much farther from its goal. A third of it costs about half as many computed steps again; 0
            computes all.

    Raises:
        ConfigError: The tolerance is out of range.
        ConfigTypeError: It is no number.
    """

    tolerance: float = GapSettings.tolerance

    main: ClassVar[str] = "tolerance"
    function: ClassVar[tuple[str, str]] = ("apply_adaptive_cache", "apply_adaptive_cache(pipe, tolerance=0.001)")

    def __post_init__(self) -> None:
        object.__setattr__(self, "tolerance", within("tolerance", self.tolerance, _ALLOWED, highest=1.0))


class AdaptiveSettings(TypedDict, total=False):
    """The settings of `AdaptiveConfig`, as they are given by name."""

    tolerance: float


def settings_for(settings: GapSettings, run: Run) -> GapSettings:
    """The settings of gap control for a run: for as many steps as the user asked of the schedule that it is part of."""
    return settings.in_run_of(steps_of_schedule(run), share_of_schedule(run.scheduler, run.first))


def steps_of_schedule(run: Run) -> float:
    """How many steps the user asked of the schedule that a run is part of, stages of a step (Heun) counted as one."""
    return (run.total + (run.first or 0)) / _order(run.scheduler)


def _order(scheduler: Any) -> int:
    """Evaluations a step, as diffusers' schedulers say."""
    order = getattr(scheduler, "order", 1)
    return order if type(order) is int and order > 0 else 1


@names_shown(AdaptiveSettings, AdaptiveConfig)
@names_checked
def apply_adaptive_cache(
    pipe: Pipe, config: AdaptiveConfig | float | None = None, **settings: Unpack[AdaptiveSettings]
) -> CachePatch:
    """Skips whole denoising steps where the run is smooth, with an error control that needs no calibration.

    A skipped step follows the last two computed outputs of the transformer, by three quarters of their slope, branch by
    branch. At the next computed step the outputs between are known better, by interpolation, and what the prediction
    has done wrong to the latents is put right in that step's output: predictor and corrector. How far the prediction
    was from what was computed tells how rough the path is, and so how long the next gap may be, as step-size control
    does in solvers of differential equations. At the start of a run, where it is decided what the picture shows, errors
    grow until the end, and count up to three times. The transformer is not called at skipped steps at all, and nothing
    inside it is touched: it works for any model, compiled or not.

    Args:
        pipe: A diffusers pipeline with a diffusion transformer (two for Wan2.2), or the transformer itself.
        config: Settings, or the tolerance alone; None for a tolerance of 0.001.
        **settings: Single settings, by the names of `AdaptiveConfig`; they go over `config`.

    Returns:
        The patch: `patch.remove()` undoes it exactly, `patch.stats` tells what it did, `print(patch)` sums it up.

    Raises:
        ConfigError: A setting is unknown, or the tolerance is out of range.
        ConfigTypeError: `pipe` or the tolerance has a wrong type.
        UnsupportedModelError: The pipeline has no diffusion transformer, or another cache is on it.

    Source: step-size control as in E. Hairer, S. Nørsett, G. Wanner, "Solving Ordinary Differential Equations I", II.4;
    the correction by interpolation is this library's own.

    Example:
        >>> patch = apply_adaptive_cache(pipe)
        >>> picture = pipe(**call)
        >>> patch.remove()
    """
    config = AdaptiveConfig.of(config, {name: value for name, value in settings.items() if value is not None})
    policy = functools.partial(gap_control_of, GapSettings(tolerance=config.tolerance))
    title = f"adaptive cache (tolerance {config.tolerance:g})"
    return put_around(targets_of_cache(pipe), title, policy, config)


def gap_control_of(gaps: GapSettings, run: Run) -> GapControl:
    """What decides the steps of a run under the adaptive cache.

    Args:
        gaps: How it steers in runs of 50 steps.
        run: The run; its scheduler and its number of steps tell the rest.
    """
    response = run.response()
    skips = gaps.tolerance > 0 and run.total >= gaps.fewest_steps
    switch = run.switch() if skips else None
    mine = settings_for(gaps, run)
    if response is None:
        return GapControl(mine, np.ones(run.total), corrects=False, switch=switch)
    passing = passing_influence(response)
    # The second stage of a step (Heun) overwrites the latents that the first one leads to.
    ways = response if _order(run.scheduler) == 1 else None
    return GapControl(mine, response[-1], switch=switch, response=ways, passing=passing)
