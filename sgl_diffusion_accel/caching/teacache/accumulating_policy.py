"""Compute or skip by the sum of the estimated changes: the policy of TeaCache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from sgl_diffusion_accel.caching.parts.policies import Change, Decision, Policy, Position, Tally
from sgl_diffusion_accel.caching.teacache.coefficients import TeaCacheCoefficients
from sgl_diffusion_accel.caching.teacache.skip_window import Window

_NEAR_ENOUGH = 0.2  # by which the number of steps may differ from that of the fit
_SHORTEST = 2  # steps of a run that has nothing but a first and a last one


@final
@dataclass(frozen=True)
class AccumulatingPolicy(Policy):
    """Skips until the rescaled changes since the last computed step sum up: the policy of TeaCache.

    Within the window each step adds max(p(change), 0), with p the polynomial that estimates the change of the model's
    output from that of the signal. When the sum reaches the threshold the step is computed, and the sum starts anew.

    Source: TeaCache, "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model",
    https://arxiv.org/abs/2411.19108.

    Attributes:
        threshold: Compute when the sum reaches it; positive.
        fit: The polynomial p, with what is known of its fit.
        window: Steps that may be skipped; the others are computed.
    """

    threshold: float
    fit: TeaCacheCoefficients
    window: Window

    @property
    def needs_signal(self) -> bool:
        """Always."""
        return True

    def prepare(self, total: int) -> str | None:
        """Tells where no step of a run may be skipped, or where the polynomial was fitted on other runs."""
        start, stop = self.window.bounds(total)
        if start < stop:
            fitted = self.fit.steps
            if fitted is None or abs(total - fitted) <= _NEAR_ENOUGH * fitted:
                return None
            return (
                f"the coefficients were fitted on runs of {fitted} steps, and this one has {total}: steps that change "
                "more than any seen there are computed. Fit with calls of as many steps as you run."
            )
        if total <= _SHORTEST:
            return f"a run of {total} steps has none that may be skipped: the first and the last are always computed."
        return (
            f"no step of a run of {total} steps may be skipped: skipping starts at step {start} and ends before step "
            f"{stop} ({self.window}). Give start_skipping and end_skipping for so few steps."
        )

    def may_skip(self, position: Position) -> bool:
        """Whether the window is not over."""
        start, stop = self.window.bounds(position.total)
        return max(start, position.step) < stop

    def may_measure(self, position: Position) -> bool:
        """Whether the step is inside the window."""
        start, stop = self.window.bounds(position.total)
        return start <= position.step < stop

    def decide(self, position: Position, tally: Tally, change: Change) -> Decision:
        if not self.may_measure(position):
            return Decision(True, "outside the window")
        moved = change()
        if not math.isfinite(moved):
            return Decision(True, "change not finite", moved)
        if self.fit.high is not None and moved > self.fit.high:
            return Decision(True, "change beyond the fitted range", moved)
        charge = max(self.fit(moved), 0.0)
        if tally.accumulated + charge >= self.threshold:
            return Decision(True, "accumulated change", moved, charge)
        return Decision(False, "accumulated change below threshold", moved, charge)
