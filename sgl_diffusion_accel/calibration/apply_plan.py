"""`apply_cache_plan`: runs a pipeline by a calibrated plan."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from sgl_diffusion_accel.caching.cache_patch import CachePatch, apply_output_cache, refuse_foreign_cache
from sgl_diffusion_accel.calibration.calibrate import digest, no_plan
from sgl_diffusion_accel.calibration.design import Design, Moments
from sgl_diffusion_accel.calibration.design_search import best_design, fewest_steps
from sgl_diffusion_accel.calibration.moments import carry_over
from sgl_diffusion_accel.calibration.plan import CachePlan
from sgl_diffusion_accel.calibration.plan_checks import factor_at
from sgl_diffusion_accel.calibration.plan_pace import PlanPace
from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError, UnsupportedModelError
from sgl_diffusion_accel.loop.runs import Run
from sgl_diffusion_accel.loop.scheduler_response import Response, adds_noise, response_of
from sgl_diffusion_accel.targets import find_transformers, model_class, unwrap
from sgl_diffusion_accel.validate import count, real

logger = logging.getLogger(__name__)

_SAME = 1e-3  # by which timesteps may differ and still be the same schedule, relative to the first


def apply_cache_plan(
    pipe: object,
    plan: CachePlan,
    *,
    speedup: float | None = None,
    computed_steps: int | None = None,
    max_error: float | None = None,
    guard: float | None = 6.0,
) -> CachePatch:
    """Computes only the denoising steps that a calibrated plan asks for, and makes the others from them.

    Which steps are computed, and with which weights their outputs stand in for the others and put right what was
    predicted before, is designed for the scheduler and the timesteps of each run: other steps, schedules and schedulers
    than those of the calibration are carried over by interpolation in the timestep. The transformer is not called at
    skipped steps.

    Args:
        pipe: The pipeline that the plan was made for, or one with the same transformer.
        plan: From `calibrate` or `CachePlan.load`.
        speedup: Steps of a run for each computed one, such as 3.0. One of the three is to be given.
        computed_steps: Computed steps of a run.
        max_error: Largest expected error of the final latents, relative to how far they move, root mean square; what is
            expected is nearer to what comes after `check_plan`.
        guard: How many times worse than calibration foresaw a prediction may be at a computed step, where that is seen
            for free; then gap control (`apply_adaptive_cache`) takes over for the rest of the run. It asks the device
            once for each computed step; None never asks.

    Returns:
        The patch: `patch.remove()` undoes it exactly, `patch.stats` tells what it did, `print(patch)` sums it up.

    Raises:
        ConfigError: Not exactly one of the three, or out of range.
        ConfigTypeError: Something has a wrong type.
        UnsupportedModelError: The plan is of another model, or the scheduler is one that no plan can be made for.

    Example:
        >>> patch = apply_cache_plan(pipe, plan, speedup=3.0)
        >>> picture = pipe(**call)
        >>> patch.remove()
    """
    if not isinstance(plan, CachePlan):
        raise ConfigTypeError(
            f"plan is a {type(plan).__name__}; allowed: a CachePlan: calibrate(pipe, calls), or CachePlan.load(path)."
        )
    budget = _Budget(plan, speedup, computed_steps, max_error)
    limit = None if guard is None else real("guard", guard)
    if limit is not None and not limit > 1:
        raise ConfigError(f"guard={guard}; allowed: a number over 1, such as 6.0, or None.")
    transformers = find_transformers(pipe)
    refuse_foreign_cache(transformers)
    check_model(plan, transformers)
    if adds_noise(getattr(pipe, "scheduler", None)):
        raise no_plan(getattr(pipe, "scheduler", None))

    def pace(run: Run) -> PlanPace:
        response = response_of(run.scheduler, run.total, run.first)
        if response is None:
            raise no_plan(run.scheduler)
        timesteps = tuple(map(float, run.timesteps.tolist()))
        return PlanPace(budget.design(timesteps, response), _moments(plan, timesteps, response.tobytes()), limit)

    return apply_output_cache(f"cache plan ({budget})", transformers, pace, pipe)


class _Budget:
    """How much may be computed, in one of three units."""

    def __init__(self, plan: CachePlan, speedup: Any, computed_steps: Any, max_error: Any) -> None:
        given = {"speedup": speedup, "computed_steps": computed_steps, "max_error": max_error}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            raise ConfigError(
                f"{', '.join(given) or 'nothing'} given; allowed: one of speedup, computed_steps and max_error, "
                "such as apply_cache_plan(pipe, plan, speedup=3.0)."
            )
        self._plan = plan
        ((self._unit, value),) = given.items()
        if self._unit == "computed_steps":
            self._value: float = count(self._unit, value, 1)
            if self._value > plan.steps:
                raise ConfigError(f"computed_steps={value}; allowed: a whole number from 1 to {plan.steps}.")
        else:
            self._value = real(self._unit, value)
            allowed = "a number from 1, such as 3.0" if self._unit == "speedup" else "a positive number, such as 0.02"
            if not np.isfinite(self._value) or self._value <= 0 or (self._unit == "speedup" and self._value < 1):
                raise ConfigError(f"{self._unit}={value}; allowed: {allowed}.")

    def __str__(self) -> str:
        return f"{self._unit}={self._value:g}"

    def design(self, timesteps: tuple[float, ...], response: Response) -> Design:
        """The design for a run; searched once for each schedule and budget, since it takes a second or two."""
        steps = len(timesteps)
        own = (self._plan, timesteps, response.tobytes())
        if self._unit == "computed_steps":
            return _design(*own, min(int(self._value), steps))
        if self._unit == "speedup":
            return _design(*own, max(1, round(steps / self._value)))

        def expected(computed: int) -> float:
            """With the factor that was measured at the same speed-up."""
            return _design(*own, computed).error * factor_at(self._plan.checks, computed * self._plan.steps / steps)

        return _design(*own, fewest_steps(expected, steps, self._value))


@functools.lru_cache(maxsize=256)
def _design(plan: CachePlan, timesteps: tuple[float, ...], response: bytes, computed: int) -> Design:
    return best_design(computed, _moments(plan, timesteps, response))


@functools.lru_cache(maxsize=64)
def _moments(plan: CachePlan, timesteps: tuple[float, ...], response: bytes) -> Moments:
    near = _SAME * plan.timesteps[0]
    is_same = len(timesteps) == plan.steps and all(
        abs(one - other) < near for one, other in zip(timesteps, plan.timesteps, strict=True)
    )
    gram = plan.gram_matrix if is_same else carry_over(plan.gram_matrix, plan.timesteps, timesteps)
    return Moments(gram, np.frombuffer(response).reshape(len(timesteps) + 1, len(timesteps)))


def check_model(plan: CachePlan, transformers: Mapping[str, nn.Module]) -> None:
    """Refuses a plan of another model, and warns of another config.

    Raises:
        UnsupportedModelError: The plan is of another model.
    """
    classes = tuple(model_class(unwrap(module)).__name__ for module in transformers.values())
    if classes != plan.transformers:
        raise UnsupportedModelError(
            f"the plan is for {' and '.join(plan.transformers)}, and this pipeline has {' and '.join(classes)}. Make "
            "one for it: calibrate(pipe, calls)"
        )
    if digest(transformers) != plan.config:
        logger.warning(
            "the plan was made for a %s of another config (another size or version of the model): check the result, or "
            "calibrate again.",
            classes[0],
        )
