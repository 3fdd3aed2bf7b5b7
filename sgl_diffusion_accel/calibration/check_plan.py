"""`check_plan`: measures how far runs by a plan are really off."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from sgl_diffusion_accel.calibration.call_record import recording
from sgl_diffusion_accel.calibration.paired_runs import SPEEDUPS, PairedRuns, read_pairs
from sgl_diffusion_accel.calibration.plan import CachePlan
from sgl_diffusion_accel.calibration.plan_checks import Check
from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.targets import Pipeline
from sgl_diffusion_accel.validate import names_checked

logger = logging.getLogger(__name__)


@names_checked
def check_plan(
    pipe: Pipeline, plan: CachePlan, calls: Iterable[Mapping[str, Any]], speedups: Iterable[float] = SPEEDUPS
) -> CachePlan:
    """Runs calls with and without a plan, and enters into it how far its runs were off.

    What a plan expects comes from uncached runs and from how the model answered to a disturbance: under strong guidance
    the error may be several times as large. After a check `plan.expected_error`, `plan.steps_for`, `print(plan)` and
    `apply_cache_plan(pipe, plan, max_error=...)` take it into account: the expected error times the factor by which it
    was exceeded, between the checked speed-ups by interpolation; it is not lowered where runs were nearer, which may be
    luck. The steps that are computed at a given speed-up stay.

    Args:
        pipe: The pipeline that the plan was made for, with no cache on it.
        plan: From `calibrate` or `CachePlan.load`.
        calls: Keyword arguments of `pipe(...)`, best with prompts that calibration has not seen. Each is run once
            uncached and once for each speed-up.
        speedups: Steps of a run for each computed one, over 1.

    Returns:
        The plan with its checks, in the place of earlier ones.

    Raises:
        ConfigError: No calls, no speed-ups or impossible ones, calls that are unlike those of the calibration, a cache
            is on the pipeline, or its latents were not finite.
        ConfigTypeError: Something has a wrong type.
        UnsupportedModelError: The plan is of another model.

    Example:
        >>> plan = check_plan(pipe, calibrate(pipe, calls=[call]), calls=[call], speedups=[2.0])
        >>> patch = apply_cache_plan(pipe, plan, max_error=0.05)
        >>> patch.remove()
    """
    asked = "check_plan(pipe, plan, calls=…)"
    read, budgets = read_pairs(pipe, plan, calls, speedups, asked=asked, purpose="a check")
    squares: dict[int, list[float]] = {computed: [] for computed in budgets}
    with recording(pipe) as watch:
        runs = PairedRuns(pipe, plan, watch)
        for number, call in enumerate(read, 1):
            runs.begin(call)
            for computed, found in squares.items():
                found.append(runs.square(plan, computed))
                if not np.isfinite(found[-1]):
                    raise ConfigError(
                        f"a run by the plan with {computed} computed steps has ended with latents that are not finite. "
                        "Check smaller speedups, or run it in float32."
                    )
            logger.info("checked: call %d of %d", number, len(read))
    moved = plan.moments.moved
    checks = [
        Check(computed, plan.design(computed).error, float(np.sqrt(np.mean(found) / moved)), len(read))
        for computed, found in squares.items()
    ]
    return replace(plan, checks=tuple(checks))
