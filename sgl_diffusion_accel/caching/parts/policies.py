"""Turns positions, limits and measured changes into *compute* or *skip*."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, final

from sgl_diffusion_accel.caching.parts.masks import StepsMask

Change = Callable[[], float]
"""Measures the relative change of the signal. Calling it synchronises with the device, unless the signal is known."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where in a run a decision is due.

    Attributes:
        step: Index of the denoising step in the run.
        total: Number of denoising steps of the run.
        local_step: Index of the step among those that this transformer has seen; differs from `step` for the second
            expert of a two-expert model.
    """

    step: int
    total: int
    local_step: int


@dataclass(frozen=True, slots=True)
class Tally:
    """What was decided so far on one branch of one run.

    Attributes:
        cached: Steps skipped in all.
        consecutive: Steps skipped since the last computed one.
        accumulated: Sum of what was charged at those steps.
    """

    cached: int = 0
    consecutive: int = 0
    accumulated: float = 0.0

    def after(self, decision: Decision) -> Tally:
        """Returns the tally with one more decision."""
        if decision.compute:
            return replace(self, consecutive=0, accumulated=0.0)
        charge = decision.change if decision.charge is None else decision.charge
        return Tally(self.cached + 1, self.consecutive + 1, self.accumulated + (charge or 0.0))


@dataclass(frozen=True, slots=True)
class Decision:
    """Compute or skip, and why.

    Attributes:
        compute: Whether the span is computed.
        reason: A few words for the statistics.
        change: The change that was measured, if one was.
        charge: What a skip adds to the accumulated change; None for the change itself.
    """

    compute: bool
    reason: str
    change: float | None = None
    charge: float | None = None


class Policy(ABC):
    """Decides which denoising steps are computed.

    One of its own needs `decide` alone. It is asked once for each step and branch, in order, from the first step on
    at which something is known that could stand in. One that remembers nothing of a run (the mask, the threshold) may
    serve all runs and branches; one that does is made for each run, see `apply_block_cache`.

    Attributes:
        is_shared: Whether one policy decides for all branches of a run, which then ask it one after the other.
        needs_error: Whether it wants to know how far a prediction was from what a computed step gave (`observe`).
    """

    is_shared: ClassVar[bool] = False
    needs_error: bool = False

    @property
    def needs_signal(self) -> bool:
        """Whether it may ask for the change of the signal."""
        return False

    def prepare(self, total: int) -> str | None:  # noqa: ARG002  (most policies have nothing to check)
        """Checks, at the start of a run, that the policy fits a run of `total` steps.

        Returns:
            What the user should be told about it, or None.
        """
        return None

    def may_skip(self, position: Position) -> bool:  # noqa: ARG002  (most policies cannot know beforehand)
        """Whether this step or a later one may be skipped; if not, nothing needs to be kept for it."""
        return True

    def may_measure(self, position: Position) -> bool:  # noqa: ARG002  (most policies cannot know beforehand)
        """Whether the change may be asked for at this step; if not, the step before need not keep its signal."""
        return self.needs_signal

    @abstractmethod
    def decide(self, position: Position, tally: Tally, change: Change) -> Decision:
        """Decides one step.

        Args:
            position: Where it is.
            tally: What was decided before.
            change: Measures the change of the signal; called at most once, and only where the value is needed.
        """

    def observe(self, step: int, error: float) -> None:  # noqa: B027  (most policies remember nothing)
        """Learns the relative error ‖predicted - computed‖ / ‖computed‖ at a computed step, before the next one.

        Of the branches that it decides it is that of what guidance combines them to.
        """

    def restart(self, position: Position) -> None:  # noqa: B027
        """Learns that a step is computed because nothing is known of its branch; it is not asked to decide that."""


@final
@dataclass(frozen=True)
class ThresholdPolicy(Policy):
    """Skips while the signal has changed little, within limits: the policy of DBCache.

    Attributes:
        threshold: Skip while the relative L1 change stays below; 0 never skips.
        max_warmup_steps: Steps at the start that are computed.
        warmup_interval: Compute every n-th step of the warm-up only; the others may be skipped.
        max_continuous: Longest run of skipped steps, None for no limit.
        max_cached: Most skipped steps in a run, None for no limit.
        max_accumulated: Largest sum of changes since the last computed step, None for no limit.
    """

    threshold: float
    max_warmup_steps: int = 0
    warmup_interval: int = 1
    max_continuous: int | None = None
    max_cached: int | None = None
    max_accumulated: float | None = None

    @property
    def needs_signal(self) -> bool:
        """Unless the threshold is 0."""
        return self.threshold > 0

    def may_skip(self, position: Position) -> bool:  # noqa: ARG002
        """Unless the threshold is 0."""
        return self.threshold > 0

    def decide(self, position: Position, tally: Tally, change: Change) -> Decision:
        if position.local_step < self.max_warmup_steps and position.local_step % self.warmup_interval == 0:
            return Decision(True, "warm-up")
        if self.threshold <= 0:
            return Decision(True, "threshold 0")
        if self.max_continuous is not None and tally.consecutive >= self.max_continuous:
            return Decision(True, "longest run of skipped steps")
        if self.max_cached is not None and tally.cached >= self.max_cached:
            return Decision(True, "most skipped steps")
        # Behind all limits, since it waits for the device.
        moved = change()
        # NaN is not over the threshold: without this the step would be skipped.
        if not math.isfinite(moved):
            return Decision(True, "change not finite", moved)
        if moved >= self.threshold:
            return Decision(True, "change over threshold", moved)
        if self.max_accumulated is not None and tally.accumulated + moved >= self.max_accumulated:
            return Decision(True, "accumulated change", moved)
        return Decision(False, "change below threshold", moved)


@final
@dataclass(frozen=True)
class MaskPolicy(Policy):
    """Follows a step computation mask.

    Attributes:
        mask: 1 computes the step. A 0 skips it, or leaves it to `inner`.
        inner: Decides where the mask has a 0; None for a static mask.
    """

    mask: StepsMask
    inner: Policy | None = None

    @property
    def needs_signal(self) -> bool:
        """As `inner` does."""
        return self.inner is not None and self.inner.needs_signal

    def prepare(self, total: int) -> str | None:
        """Checks that the mask has an entry for each step."""
        self.mask.resolve(total)
        return None

    def may_skip(self, position: Position) -> bool:
        """Whether the mask has a 0 here or later that `inner`, if there is one, may follow."""
        left = self.mask.resolve(position.total)[position.step :]
        return 0 in left and (self.inner is None or self.inner.may_skip(position))

    def decide(self, position: Position, tally: Tally, change: Change) -> Decision:
        if self.mask.resolve(position.total)[position.step]:
            return Decision(True, "mask")
        if self.inner is None:
            return Decision(False, "mask")
        return self.inner.decide(position, tally, change)
