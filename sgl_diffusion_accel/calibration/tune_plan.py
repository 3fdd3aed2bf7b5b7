"""`tune_plan`: tries several designs of a plan on the pipeline, and keeps the best."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from sgl_diffusion_accel.calibration.call_record import recording
from sgl_diffusion_accel.calibration.designs.tuned import USUAL, Tuned, designs_to_try
from sgl_diffusion_accel.calibration.paired_runs import PairedRuns, read_pairs
from sgl_diffusion_accel.calibration.plan import CachePlan
from sgl_diffusion_accel.targets import Pipeline
from sgl_diffusion_accel.validate import count, names_checked

logger = logging.getLogger(__name__)

_FEWEST = 2  # designs that are tried on every call


@names_checked
def tune_plan(
    pipe: Pipeline,
    plan: CachePlan,
    calls: Iterable[Mapping[str, Any]],
    speedups: Iterable[float],
    *,
    designs: int = 6,
) -> CachePlan:
    """Tries designs that are foreseen to be about equally good, and keeps the best for each speed-up.

    Designs that look alike to calibration differ by several dB on the model. So at each speed-up some of them are run:
    all on the first call, and after each call the better half of them goes on to the next one, two at least. With six
    designs and four calls that is 13 runs at each speed-up, each as much faster as the plan makes it, and an uncached
    run for each call; before them each design is searched for, about two seconds at 50 steps and eight at 100. The
    calls of the calibration will do.

    What is kept holds for runs of the plan's own timesteps and number of computed steps; others are designed as before.

    Args:
        pipe: The pipeline that the plan was made for, with no cache on it.
        plan: From `calibrate` or `CachePlan.load`.
        calls: Keyword arguments of `pipe(...)`, like those of the calibration. Two to six different prompts do.
        speedups: Those that the plan is to be used at: steps of a run for each computed one, over 1.
        designs: How many designs are tried for each speed-up, from 2. There are 10 of them, and where some compute the
            same steps, fewer.

    Returns:
        The plan with its choices, in the place of earlier ones at the same speed-ups, and without checks: `check_plan`
        is for what was chosen.

    Raises:
        ConfigError: No calls, no speed-ups or impossible ones, calls that are unlike those of the calibration, a cache
            is on the pipeline, or its latents were not finite.
        ConfigTypeError: Something has a wrong type.
        UnsupportedModelError: The plan is of another model.

    Example:
        >>> plan = tune_plan(pipe, calibrate(pipe, calls=[call]), calls=[call], speedups=[2.0])
        >>> patch = apply_cache_plan(pipe, plan, speedup=2.0)
        >>> patch.remove()
    """
    most = count("designs", designs, 2)
    asked = "tune_plan(pipe, plan, calls=…, speedups=[3.0])"
    read, budgets = read_pairs(pipe, plan, calls, speedups, asked=asked, purpose="tuning")
    races = [_Race(computed, plan, most) for computed in budgets]
    with recording(pipe) as watch:
        runs = PairedRuns(pipe, plan, watch)
        for number, call in enumerate(read, 1):
            runs.begin(call)
            for race in races:
                race.run(runs)
            logger.info("tuned: call %d of %d", number, len(read))
    found = {each.computed_steps: each for each in (*plan.tuned, *(race.result() for race in races))}
    return replace(plan, tuned=tuple(found[computed] for computed in sorted(found, reverse=True)), checks=())


class _Race:
    """The designs for one number of computed steps, fewer after each call.

    Args:
        computed: Steps computed.
        plan: The plan.
        most: How many designs at most.
    """

    def __init__(self, computed: int, plan: CachePlan, most: int) -> None:
        self._computed, self._plan = computed, plan
        self._errors: dict[str, list[float]] = {name: [] for name in designs_to_try(computed, plan.moments, most)}
        self._left = list(self._errors)

    def run(self, runs: PairedRuns) -> None:
        """Runs the present call by each design that is left, and leaves the better half."""
        if len(self._errors) == 1:  # there is nothing to choose
            return
        for name in self._left:
            tried = replace(self._plan, tuned=(Tuned(self._computed, name, 1.0, 1),))
            square = runs.square(tried, self._computed)
            # In logarithms, so that one call that all are far off on does not decide.
            self._errors[name].append(np.log(max(square, _TINY)) if np.isfinite(square) else _BROKEN)
        self._left.sort(key=self._mean)
        self._left = self._left[: max(_FEWEST, (len(self._left) + 1) // 2)]

    def result(self) -> Tuned:
        """The best of those that are left."""
        best = self._left[0]
        if len(self._errors) == 1:
            return Tuned(self._computed, USUAL, 1.0, 1)
        same = len(self._errors[USUAL])
        ahead = float(np.mean(self._errors[USUAL]) - np.mean(self._errors[best][:same])) / 2
        if ahead <= 0:  # also where neither is finite
            return Tuned(self._computed, USUAL, 1.0, same)
        return Tuned(self._computed, best, float(np.exp(min(ahead, _MOST))), len(self._errors[best]))

    def _mean(self, name: str) -> float:
        return float(np.mean(self._errors[name]))


_TINY = 1e-30
_BROKEN = 1e3  # stands for what is not finite, in logarithms
_MOST = 20.0  # logarithm of the largest gain that is told
