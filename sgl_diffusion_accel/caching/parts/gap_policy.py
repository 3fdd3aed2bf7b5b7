"""Gap control for the block cache: how long a prediction may stand in is told by the error of the last one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

from sgl_diffusion_accel.caching.parts.gap_control import GapControl
from sgl_diffusion_accel.caching.parts.policies import Change, Decision, Policy, Position, Tally


@final
@dataclass(frozen=True)
class ResidualGrowth:
    """How the error of predicted residuals grows, in the clock of the predictor.

    At q past the last computed step it is q for residuals of unit slope that are reused, and q(q + d)/2 for those of
    unit curvature that are predicted, d being the distance to the computed step before. Second
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
class GapPolicy(Policy):
    """Skips as long as the error of the last predictions lets expect a good one, within limits.

    At each computed step the prediction that would have stood in is held against the residual. From how far it was off
    gap control (`GapControl`) tells how long the next gap may be. All branches of a step share one decision, and their
    errors are combined as guidance combines the branches. No signal is taken. Made for one run and one transformer.

    Args:
        gaps: Gap control. Where no step may be skipped, nothing needs to be compared.
        limits: What else may forbid a skip, a warm-up or a mask; it is never asked to measure.
    """

    is_shared: ClassVar[bool] = True

    def __init__(self, gaps: GapControl, limits: Policy) -> None:
        self.needs_error = gaps.needs_error
        self._gaps = gaps
        self._limits = limits
        self._tally = Tally()
        self._seen = 0
        self._step = -1
        self._decision = Decision(True, "first step")

    def prepare(self, total: int) -> str | None:
        return self._limits.prepare(total)

    def may_skip(self, position: Position) -> bool:
        """Whether gap control and the limits leave a step that may be skipped."""
        return self._gaps.needs_later(position.step) and self._limits.may_skip(position)

    def decide(self, position: Position, tally: Tally, change: Change) -> Decision:  # noqa: ARG002
        """See `Policy.decide`. The tally is that of the steps, not of the branch."""
        if position.step != self._step:
            self._enter(position.step, self._next(position, change))
        return self._decision

    def restart(self, position: Position) -> None:
        """See `Policy.restart`. From a step with a branch that is new, all are computed until it can be predicted."""
        if position.step != self._step:
            self._enter(position.step, Decision(True, "nothing to reuse"))
        # At the first step each branch is new in its turn, which takes nothing back.
        if self._seen == 1:
            self._gaps.compute(position.step)
        else:
            self._gaps.restart(position)

    def observe(self, step: int, error: float) -> None:
        self._gaps.observe(step, error)

    def _next(self, position: Position, change: Change) -> Decision:
        # A branch that comes late has seen fewer steps; the limits count those of the decision that all share.
        mine = replace(position, local_step=self._seen)
        decision = self._limits.decide(mine, self._tally, _unchanged)
        if not decision.compute:
            return self._gaps.decide(mine, self._tally, change)
        # Left out, the gap before this step would go on in gap control's memory, and end too early.
        self._gaps.compute(position.step)
        return decision

    def _enter(self, step: int, decision: Decision) -> None:
        self._step, self._decision = step, decision
        self._seen += 1
        self._tally = self._tally.after(decision)


def _unchanged() -> float:
    """A change that no limit minds."""
    return 0.0
