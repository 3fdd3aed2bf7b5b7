"""Follows a plan through one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from sgl_diffusion_accel.caching.multistep import Weights
from sgl_diffusion_accel.caching.pacing import Pace
from sgl_diffusion_accel.caching.policies import Decision
from sgl_diffusion_accel.calibration.design import Design


@final
class PlanPace(Pace):
    """Computes the steps of a design, and weighs their outputs as it says.

    Args:
        design: For the steps of the run.
    """

    spans_models = True

    def __init__(self, design: Design) -> None:
        self._design = design
        computed = [step for step, each in enumerate(design.mask) if each]
        self._last_use = {
            step: max((later for later, weights in enumerate(design.weights) if step in weights), default=step)
            for step in computed
        }

    def decide(self, step: int) -> Decision:
        """See `Pace.decide`."""
        return Decision(self._design.mask[step], "plan", self._design.errors[step])

    def weights(self, step: int, nodes: Sequence[int]) -> Weights:  # noqa: ARG002
        """See `Pace.weights`."""
        return self._design.weights[step]

    def needs_later(self, step: int) -> bool:
        """See `Pace.needs_later`."""
        return self._last_use[step] > step
