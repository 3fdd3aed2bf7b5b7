"""Compute or skip by how the magnitude of what the blocks add changes: the policy of MagCache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from sgl_diffusion_accel.caching.magcache.magnitudes import Ratios, nearest
from sgl_diffusion_accel.caching.parts.policies import Change, Decision, Policy, Position, Tally

_NEAR_ENOUGH = 0.2  # by which the number of steps may differ from that of the recording


@final
@dataclass(frozen=True)
class MagnitudePolicy(Policy):
    """Skips until the expected errors since the last computed step sum up: the policy of MagCache.

    After the retention steps each step s adds |1 - γ_c+1 · … · γ_s|, with c the last computed step: how far the
    magnitude of the residual that is reused is off. When the sum reaches the threshold the step is computed, and the
    sum starts anew. Nothing is measured, so that the device is never waited for. Of a run with another number of steps
    than the ratios were recorded in, each step has the ratio of the nearest step.

    Source: MagCache, https://arxiv.org/abs/2506.09045.

    Attributes:
        ratios: γ of each denoising step of a run, of one branch; None where it is unknown, as at the first step.
        threshold: Compute when the sum reaches it; 0 never skips.
        max_skip_steps: Longest run of skipped steps.
        retention_ratio: Share of the steps, at the start, that are computed.
    """

    ratios: Ratios
    threshold: float
    max_skip_steps: int = 3
    retention_ratio: float = 0.2

    @property
    def needs_signal(self) -> bool:
        """Never."""
        return False

    def prepare(self, total: int) -> str | None:
        """Tells where no step of a run may be skipped, or where the ratios were recorded in other runs."""
        start, stop = self._bounds(total)
        if start >= stop:
            return (
                f"no step of a run of {total} steps may be skipped: the first {start} are computed "
                f"(retention_ratio={self.retention_ratio:g}), and the last one always is."
            )
        recorded = len(self.ratios)
        if abs(total - recorded) <= _NEAR_ENOUGH * recorded:
            return None
        return (
            f"the magnitude ratios are those of {recorded} steps, and this run has {total}: each step takes that of "
            "the nearest. Calibrate with as many steps as you run."
        )

    def may_skip(self, position: Position) -> bool:
        """Unless the last step has come, or the settings forbid it."""
        start, stop = self._bounds(position.total)
        return self.threshold > 0 and self.max_skip_steps > 0 and max(start, position.step) < stop

    def decide(self, position: Position, tally: Tally, change: Change) -> Decision:  # noqa: ARG002
        start, stop = self._bounds(position.total)
        if not start <= position.step < stop:
            return Decision(True, "retention step" if position.step < start else "last step")
        if tally.consecutive >= self.max_skip_steps:
            return Decision(True, "longest run of skipped steps")
        known = nearest(self.ratios, position.total)
        # From the step behind the last computed one, c + 1 = s - consecutive.
        product = math.prod(known[position.step - tally.consecutive : position.step + 1])
        error = abs(1.0 - product)
        if tally.accumulated + error >= self.threshold:
            return Decision(True, "accumulated error of magnitude", charge=error)
        return Decision(False, "accumulated error below threshold", charge=error)

    def _bounds(self, total: int) -> tuple[int, int]:
        """The first step that may be skipped and the one behind the last, never the first and never the last step."""
        # Rounded as diffusers does; `round` would take the even neighbour of a half.
        return max(math.floor(self.retention_ratio * total + 0.5), 1), total - 1
