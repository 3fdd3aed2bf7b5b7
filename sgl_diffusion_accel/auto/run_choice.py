"""What answers the calls of each run: a plan, the adaptive cache, or nothing at all where that would not pay.

A cache has to beat what costs nothing, *simply fewer steps*. Where it is not known to do that, it is left out: run by
run, since steps and scheduler may be others in each.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from sgl_diffusion_accel.auto.auto_config import AutoConfig
from sgl_diffusion_accel.caching.adaptive import gap_control_of, steps_of_schedule
from sgl_diffusion_accel.caching.parts.call_policy import CallPolicy
from sgl_diffusion_accel.caching.parts.gap_control import GapSettings
from sgl_diffusion_accel.caching.parts.multistep import Weights
from sgl_diffusion_accel.caching.parts.policies import Change, Decision, Position, Tally
from sgl_diffusion_accel.calibration.apply_plan import PlanConfig, plan_policy_of
from sgl_diffusion_accel.loop.runs import Run
from sgl_diffusion_accel.loop.scheduler_response import adds_noise

logger = logging.getLogger(__name__)

FEWEST_STEPS = 12
"""Runs with fewer steps are computed in full: a model that was distilled for them has no smooth path to follow, and
with 10 steps the adaptive cache computed 8 on Qwen-Image's miniature, for 41.3 dB where 8 plain steps have 43.3 dB."""

FEWEST_COMPUTED = 8
"""Steps that a plan computes at least. On the miniatures plans with seven or fewer were worse than as many plain steps
on most of them, in runs of 20 and 30 steps. With eight or more two were, by 0.7 and 0.5 dB: one made for another
scheduler, the other for another size."""

_MOST_IN_SHORT = ((20, 0.001), (30, 0.0015))
"""Runs of fewer steps than the first number to the largest tolerance in them. Over it nothing was gained on the
miniatures: 40.1 dB at 0.003 on Qwen-Image's with 20 steps, where as few plain steps have 40.0 dB, and 34.0 dB on Wan's
with 12 steps of UniPC, where plain ones have 34.5 dB."""


@final
class ComputesAll(CallPolicy):
    """Leaves a run as it is: every call goes through untouched, and nothing is kept."""

    def decide(self, position: Position, tally: Tally, change: Change) -> Decision:  # noqa: ARG002
        """See `Policy.decide`."""
        return Decision(True, "left out")

    def weights(self, step: int, nodes: Sequence[int]) -> Weights:  # noqa: ARG002
        """See `CallPolicy.weights`."""
        return {step: 1.0}

    def needs_later(self, step: int) -> bool:  # noqa: ARG002
        """See `CallPolicy.needs_later`."""
        return False


@dataclass(frozen=True)
class RunChoice:
    """Chooses what decides the steps of a run, and tells why in the run's remarks.

    Attributes:
        config: What the user asked for.
    """

    config: AutoConfig

    def __call__(self, run: Run) -> CallPolicy:
        """The policy of a run, at its start."""
        why = why_left_out(run)
        if why is not None:
            _tell(run, f"the cache is left out of this run, and every step computed: {why}")
            return ComputesAll()
        plan = self.config.plan
        if plan is None or not run.has_timesteps:
            return gap_control_of(self._gaps(run), run)
        return plan_policy_of(plan, self._budget(run), run)

    def _gaps(self, run: Run) -> GapSettings:
        steps = steps_of_schedule(run)
        for shorter, most in _MOST_IN_SHORT:
            if steps < shorter and self.config.tolerance > most:
                _tell(run, f"the tolerance is {most:g} at most in runs of fewer than {shorter} steps")
                return GapSettings(tolerance=most)
        return GapSettings(tolerance=self.config.tolerance)

    def _budget(self, run: Run) -> PlanConfig:
        config = PlanConfig(speedup=self.config.speedup)
        wanted = round(run.total / (self.config.speedup or 1.0))
        if wanted >= FEWEST_COMPUTED:
            return config
        _tell(
            run,
            f"{FEWEST_COMPUTED} of {run.total} steps are computed: as many plain steps may be better than a plan that "
            f"computes {max(wanted, 1)}",
        )
        return replace(config, speedup=None, computed_steps=FEWEST_COMPUTED)


def why_left_out(run: Run) -> str | None:
    """Why no step of a run should be skipped; None where some may be."""
    if run.total < FEWEST_STEPS:
        return (
            f"of {run.total} steps there are none to spare, least of all in a model that was distilled for so few "
            f"(from {FEWEST_STEPS} steps on some are skipped)"
        )
    scheduler = run.scheduler
    if scheduler is None:
        return (
            "the scheduler of this loop is not known. Type: for t in denoising_steps(scheduler.timesteps, "
            "scheduler=scheduler):"
        )
    return why_not_correctable(scheduler) if run.response() is None else None


def why_not_correctable(scheduler: Any) -> str:
    """Why what is predicted wrongly under a scheduler cannot be put right."""
    name = type(scheduler).__name__
    does = "adds noise of its own at each step" if adds_noise(scheduler) else "is not linear in what it is given"
    return (
        f"{name} {does}, so that what a prediction does wrong cannot be put right, and fewer steps may be better. "
        "Take a deterministic scheduler, or another cache at your own risk: apply_teacache(pipe)"
    )


def _tell(run: Run, remark: str) -> None:
    if run.stats is not None:
        run.stats.remark("auto", remark)
    logger.info("auto: %s", remark)
