"""`apply_cache_plan`: runs a pipeline by a calibrated plan."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sgl_diffusion_accel.caching.adaptive import settings_for
from sgl_diffusion_accel.caching.cache_patch import CachePatch, put_around, targets_of_cache
from sgl_diffusion_accel.caching.parts.gap_control import GapSettings
from sgl_diffusion_accel.calibration.calibrate import digest, no_plan
from sgl_diffusion_accel.calibration.designs.design import Design, Moments, carry_over
from sgl_diffusion_accel.calibration.designs.design_search import fewest_steps
from sgl_diffusion_accel.calibration.designs.tuned import design_tuned
from sgl_diffusion_accel.calibration.growth import early_growth
from sgl_diffusion_accel.calibration.plan import CachePlan
from sgl_diffusion_accel.calibration.plan_checks import factor_at
from sgl_diffusion_accel.calibration.plan_policy import PlanPolicy
from sgl_diffusion_accel.errors import ConfigError, UnsupportedModelError
from sgl_diffusion_accel.loop.runs import Run
from sgl_diffusion_accel.loop.scheduler_response import Response, adds_noise, share_of_schedule
from sgl_diffusion_accel.targets import Pipe, Target
from sgl_diffusion_accel.validate import count, names_checked, of_type, positive, real, within

logger = logging.getLogger(__name__)

_LATER = 0.95
_SAME = 1e-3  # by which timesteps may differ and still be the same schedule, relative to the first


@names_checked
def apply_cache_plan(
    pipe: Pipe,
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
    of_type("plan", plan, CachePlan, "a CachePlan: calibrate(pipe, calls), or CachePlan.load(path)")
    config = PlanConfig(speedup, computed_steps, max_error, guard)
    if computed_steps is not None:
        count("computed_steps", computed_steps, 1, plan.steps)
    targets = targets_of_cache(pipe)
    check_model(plan, targets)
    if adds_noise(getattr(pipe, "scheduler", None)):
        raise no_plan(getattr(pipe, "scheduler", None))
    policy = functools.partial(plan_policy_of, plan, config)
    return put_around(targets, f"cache plan ({config.budget})", policy, config)


def plan_policy_of(plan: CachePlan, config: PlanConfig, run: Run) -> PlanPolicy:
    """What decides the steps of a run by a plan.

    Args:
        plan: The plan.
        config: How much is computed.
        run: The run.

    Raises:
        UnsupportedModelError: No plan can be made for its scheduler, or its loop does not tell its timesteps.
    """
    response = run.response()
    if response is None or run.conversion is not None:
        raise no_plan(run.scheduler, run.conversion)
    timesteps = tuple(map(float, run.timesteps.tolist()))
    reach = share_of_schedule(run.scheduler, run.first)
    design = config.design(plan, timesteps, response, reach)
    moments = _moments(plan, timesteps, response.tobytes(), reach)
    settings = replace(settings_for(GapSettings(), run), early=moments.early)
    return PlanPolicy(design, moments, config.guard, settings)


@dataclass(frozen=True)
class PlanConfig:
    """Settings of `apply_cache_plan`: how much is computed, in one of three units, and the guard."""

    speedup: float | None = None
    computed_steps: int | None = None
    max_error: float | None = None
    guard: float | None = 6.0

    def __post_init__(self) -> None:
        given = [name for name in _BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"{', '.join(given) or 'nothing'} given; allowed: one of speedup, computed_steps and max_error, "
                "such as apply_cache_plan(pipe, plan, speedup=3.0)."
            )
        if self.computed_steps is not None:
            object.__setattr__(self, "computed_steps", count("computed_steps", self.computed_steps, 1))
        if self.speedup is not None:
            allowed = "a number from 1, such as 3.0"
            object.__setattr__(self, "speedup", within("speedup", self.speedup, allowed, lowest=1.0))
        if self.max_error is not None:
            object.__setattr__(
                self, "max_error", positive("max_error", self.max_error, "a positive number, such as 0.02")
            )
        if self.guard is not None:
            guard = real("guard", self.guard)
            if not guard > 1:
                raise ConfigError(f"guard={self.guard}; allowed: a number over 1, such as 6.0, or None.")
            object.__setattr__(self, "guard", guard)

    @property
    def budget(self) -> str:
        """How much is computed, in a few words."""
        name = next(name for name in _BUDGETS if getattr(self, name) is not None)
        return f"{name}={getattr(self, name):g}"

    def design(self, plan: CachePlan, timesteps: tuple[float, ...], response: Response, reach: float = 1.0) -> Design:
        """The design for a run; searched once for each schedule and budget, since it takes a second or two."""
        steps = len(timesteps)
        own = (plan, timesteps, response.tobytes(), reach)
        if self.computed_steps is not None:
            return _design(*own, min(self.computed_steps, steps))
        if self.speedup is not None:
            return _design(*own, max(1, round(steps / self.speedup)))

        def expected(computed: int) -> float:
            """With the factor that was measured at the same speed-up."""
            return _design(*own, computed).error * factor_at(plan.checks, computed * plan.steps / steps)

        return _design(*own, fewest_steps(expected, steps, self.max_error or 0.0))


_BUDGETS = ("speedup", "computed_steps", "max_error")


@functools.lru_cache(maxsize=256)
def _design(plan: CachePlan, timesteps: tuple[float, ...], response: bytes, reach: float, computed: int) -> Design:
    moments = _moments(plan, timesteps, response, reach)
    # What was tried is known of the plan's own runs alone.
    is_own = _is_same(plan, timesteps) and responds_alike(plan, moments.response)
    return design_tuned(plan.tuned if is_own else (), computed, moments)


@functools.lru_cache(maxsize=64)
def _moments(plan: CachePlan, timesteps: tuple[float, ...], response: bytes, reach: float) -> Moments:
    is_same = _is_same(plan, timesteps)
    gram = plan.gram_matrix if is_same else carry_over(plan.gram_matrix, plan.timesteps, timesteps)
    found = np.frombuffer(response).reshape(len(timesteps) + 1, len(timesteps))
    # A run that begins later than those of the calibration has passed the place where errors grow.
    begins_later = timesteps[0] < _LATER * plan.timesteps[0]
    reach = reach if begins_later else 1.0
    settings = GapSettings(early=early_growth(plan.growth)).in_run_of(len(timesteps), reach)
    return Moments(gram, found, plan.answers, settings.early, reach)


def _is_same(plan: CachePlan, timesteps: Sequence[float]) -> bool:
    """Whether a run has the timesteps of the plan."""
    near = _SAME * plan.timesteps[0]
    return len(timesteps) == plan.steps and all(
        abs(one - other) < near for one, other in zip(timesteps, plan.timesteps, strict=True)
    )


def responds_alike(plan: CachePlan, response: Response) -> bool:
    """Whether a scheduler makes of the outputs what that of the plan did, for the same number of steps."""
    return np.allclose(response, plan.moments.response, rtol=1e-3, atol=1e-6)


def check_model(plan: CachePlan, targets: Sequence[Target]) -> None:
    """Refuses a plan of another model, and warns of another config.

    Raises:
        UnsupportedModelError: The plan is of another model.
    """
    classes = tuple(target.model for target in targets)
    if classes != plan.transformers:
        raise UnsupportedModelError(
            f"the plan is for {' and '.join(plan.transformers)}, and this pipeline has {' and '.join(classes)}. Make "
            "one for it: calibrate(pipe, calls)"
        )
    if digest(targets) != plan.config:
        logger.warning(
            "the plan was made for a %s of another config (another size or version of the model): check the result, or "
            "calibrate again.",
            classes[0],
        )
