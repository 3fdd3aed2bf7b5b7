"""Gap control for the block cache: how long a prediction may stand in is told by the error of the last one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import numpy as np

from sgl_diffusion_accel.caching.parts.gap_control import GapControl, GapSettings
from sgl_diffusion_accel.caching.parts.policies import Change, Comparison, Decision, Policy, Position, Tally
from sgl_diffusion_accel.caching.parts.prediction_error import PredictionError
from sgl_diffusion_accel.caching.parts.predictors import Predictor
from sgl_diffusion_accel.caching.parts.signals import Reduce
from sgl_diffusion_accel.loop.runs import Kept, Run
from sgl_diffusion_accel.loop.scheduler_response import passing_influence, response_of


@final
@dataclass(frozen=True)
class ResidualGrowth:
    """How the error of predicted residuals grows, in the clock of the predictor.

    At q past the last computed step it is q for residuals of unit slope that are reused, and q(q + d)/2 for those of
    unit curvature that are predicted, d being the distance to the computed step before: the growth of the line. Second
    order has it too. Its own first term, qd/2 as the damped second difference does not follow a parabola, grows more
    slowly than its errors were seen to.

    Attributes:
        order: Order of the prediction, 0 for reuse.
        times: Time of each step, None where steps are counted.
    """

    order: int
    times: Sequence[float] | None = None

    def __call__(self, nodes: Sequence[int], step: int) -> float:
        """The error at a step after the computed ones, which come newest first."""
        now, newest, *before = (float(each) if self.times is None else self.times[each] for each in (step, *nodes[:2]))
        ahead = abs(now - newest)
        width = abs(newest - before[0]) if before else ahead
        return ahead * (ahead + width) / 2 if self.order else ahead


@final
class GapPolicy(Policy, Kept):
    """Skips as long as the error of the last predictions lets expect a good one, within limits.

    At each computed step the prediction that would have stood in is held against the residual. From how far it was off
    gap control (`GapControl`) tells how long the next gap may be. All branches of a step share one decision, and their
    errors are combined as guidance combines the branches. No signal is taken. Made for one run and one transformer.

    Args:
        pace: Gap control.
        limits: What else may forbid a skip, a warm-up or a mask; it is never asked to measure.
    """

    def __init__(self, pace: GapControl, limits: Policy) -> None:
        self._pace = pace
        self._limits = limits
        self._tally = Tally()
        self._seen = 0
        self._step = -1
        self._decision = Decision(True, "first step")
        self._error = PredictionError()
        self._reduce: Reduce | None = None

    @property
    def needs_signal(self) -> bool:
        """Never."""
        return False

    @property
    def needs_error(self) -> bool:
        """Whether a step may be skipped at all: else nothing needs to be compared."""
        return self._pace.needs_error

    def nbytes(self) -> int:
        """See `Kept.nbytes`."""
        return self._error.nbytes()

    def prepare(self, total: int) -> str | None:
        """See `Policy.prepare`."""
        return self._limits.prepare(total)

    def may_skip(self, position: Position) -> bool:
        """Whether gap control and the limits leave a step that may be skipped."""
        return self._pace.needs_later(position.step) and self._limits.may_skip(position)

    def decide(self, position: Position, tally: Tally, change: Change) -> Decision:  # noqa: ARG002
        """See `Policy.decide`. The tally is that of the steps, not of the branch."""
        if position.step != self._step:
            self._learn()
            self._enter(position.step, self._next(position))
        return self._decision

    def restart(self, position: Position) -> None:
        """See `Policy.restart`. From a step with a branch that is new, all are computed until it can be predicted."""
        self._error.forget()
        if position.step != self._step:
            self._enter(position.step, Decision(True, "nothing to reuse"))
        if self._seen == 1:
            self._pace.compute(position.step)
        else:
            self._pace.restart(position.step)

    def observe(self, seen: Comparison) -> None:
        """See `Policy.observe`."""
        self._reduce = seen.reduce
        self._error.add(seen.branch, seen.predicted, seen.computed, seen.guidance)

    def forget(self) -> None:
        """See `Policy.forget`."""
        self._error.forget()

    def _learn(self) -> None:
        error = self._error.take(self._reduce)
        if error is not None:
            self._pace.observe(self._step, error)

    def _next(self, position: Position) -> Decision:
        mine = replace(position, local_step=self._seen)
        decision = self._limits.decide(mine, self._tally, _unchanged)
        if not decision.compute:
            return self._pace.decide(position.step)
        self._pace.compute(position.step)
        return decision

    def _enter(self, step: int, decision: Decision) -> None:
        self._step, self._decision = step, decision
        self._seen += 1
        self._tally = self._tally.after(decision)


def _unchanged() -> float:
    """A change that no limit minds."""
    return 0.0


def gap_control(
    tolerance: float, limits: Policy, predictor: Predictor, spacing: Literal["step", "sigma"]
) -> Callable[[Run], Policy]:
    """Tells how to make the policy of a run.

    Args:
        tolerance: Largest error that a gap may leave in the final latents, as estimated, relative to their whole move.
        limits: What else may forbid a skip.
        predictor: What stands in for the residuals.
        spacing: Its clock.
    """
    # Nothing is put right: the whole error remains, and goes on to disturb the steps after the gap. The weight of that
    # was found by trying: at a compute ratio of 2.8, 3 was better than 1 on all three miniatures by 0.6 to 2.6 dB.
    settings = GapSettings(tolerance, warm_up=0, interpolation=1.0, propagation=3.0)

    def policy(run: Run) -> Policy:
        response = response_of(run.scheduler, run.total, run.first) if tolerance > 0 else None
        final = np.ones(run.total) if response is None else response[-1]
        passing = None if response is None else passing_influence(response)
        times = run.sigmas() if spacing == "sigma" and tolerance > 0 else None
        growth = ResidualGrowth(predictor.depth - 1, times)
        return GapPolicy(GapControl(settings, final, corrects=False, growth=growth, passing=passing), limits)

    return policy
