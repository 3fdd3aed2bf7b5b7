"""`tune_plan`: tries several designs of a plan on the pipeline, and keeps the best."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from sgl_diffusion_accel.calibration.call_record import recording
from sgl_diffusion_accel.calibration.designs.answers import Answers
from sgl_diffusion_accel.calibration.designs.tuned import USUAL, Tuned, answers_for, designs_to_try
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

    Designs that look alike to calibration differ by several dB on the model. So at each speed-up the usual one is run
    on every call. How the model answered to the errors that these runs left is what two further designs rest on, in the
    place of how it answered to a disturbance; they are left out where guidance is so far from linear that it cannot be
    told. Then the designs are run: all on the first call, and after each call the better half of them goes on to the
    next one, two at least. With six designs and four calls that is 13 to 16 runs at each speed-up, each as much faster
    as the plan makes it, and an uncached run for each call; each design is searched for, about two seconds at 50 steps
    and eight at 100. The calls of the calibration will do.

    What is kept holds for runs of the plan's own timesteps and number of computed steps; others are designed as before.

    Args:
        pipe: The pipeline that the plan was made for, with no cache on it.
        plan: From `calibrate` or `CachePlan.load`.
        calls: Keyword arguments of `pipe(...)`, like those of the calibration. Two to six different prompts do.
        speedups: Those that the plan is to be used at: steps of a run for each computed one, over 1.
        designs: How many designs are tried for each speed-up, from 2. There are 12 of them, and where some compute the
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
        runs, begun = PairedRuns(pipe, plan, watch), []
        for number, call in enumerate(read, 1):
            begun.append(runs.begin(call))
            for race in races:
                race.learn(runs)
            logger.info("learned from the usual designs: call %d of %d", number, len(read))
        for race in races:
            race.enter()
        for number, each in enumerate(begun):
            runs.go_on(each)
            for race in races:
                race.run(runs, number)
            logger.info("tuned: call %d of %d", number + 1, len(read))
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
        self._computed, self._plan, self._most = computed, plan, most
        self._answers: list[Answers] = []
        self._errors: dict[str, list[float]] = {USUAL: []}
        self._left: list[str] = []

    def learn(self, runs: PairedRuns) -> None:
        """Runs the present call by the usual design, and looks at how the model answered to what that left."""
        self._errors[USUAL].append(self._error(runs, USUAL))
        answers = runs.answers()
        if answers:
            self._answers.append(answers)
        else:
            logger.info(
                "how the model answers to the errors of %d computed steps cannot be told: the run left its plan, or "
                "guidance is not linear",
                self._computed,
            )

    def enter(self) -> None:
        """Takes the designs that are to be run, once all is learned."""
        self._left = list(designs_to_try(self._computed, self._plan.moments, self._most, self._answers))
        self._errors.update({name: [] for name in self._left if name != USUAL})

    def run(self, runs: PairedRuns, call: int) -> None:
        """Runs a call, counted from 0, by each design that is left, and leaves the better half."""
        for name in self._left:
            if name != USUAL:
                self._errors[name].append(self._error(runs, name))
        self._left.sort(key=lambda name: float(np.mean(self._errors[name][: call + 1])))
        self._left = self._left[: max(_FEWEST, (len(self._left) + 1) // 2)]

    def result(self) -> Tuned:
        """The best of those that are left, the usual one where none of them is ahead of it."""
        best, usual = self._left[0], self._errors[USUAL]
        ahead = float(np.mean(usual) - np.mean(self._errors[best])) / 2
        if best == USUAL or ahead <= 0:  # also where neither is finite
            return Tuned(self._computed, USUAL, 1.0, len(usual))
        return replace(self._named(best), gain=float(np.exp(min(ahead, _MOST))), calls=len(usual))

    def _named(self, name: str) -> Tuned:
        return Tuned(self._computed, name, 1.0, 1, answers_for(name, self._answers))

    def _error(self, runs: PairedRuns, name: str) -> float:
        """In logarithms, so that one call that all are far off on does not decide."""
        square = runs.square(replace(self._plan, tuned=(self._named(name),)), self._computed)
        return float(np.log(max(square, _TINY))) if np.isfinite(square) else _BROKEN


_TINY = 1e-30
_BROKEN = 1e3  # stands for what is not finite, in logarithms
_MOST = 20.0  # logarithm of the largest gain that is told
