"""What a plan is worth on calls that it was not made from: how far runs are off, and whether more calls would help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sgl_diffusion_accel.calibration.designs.design import Design, Moments
from sgl_diffusion_accel.calibration.designs.design_search import best_design
from sgl_diffusion_accel.validate import count, within

ENOUGH = 1.4
"""Below it, 3 dB, another call is not worth its run."""

_SPEEDUP = 3.0
_MOST_STEPS = 100  # the search takes seconds up to here, and a minute at 200


@dataclass(frozen=True)
class Check:
    """How far runs with some number of computed steps were off. Errors are relative to how far the latents move.

    Attributes:
        computed_steps: Steps computed.
        expected: Error that the design expects (root mean square).
        measured: Error that was found, over all runs (root mean square).
        calls: How many runs were made.

    Raises:
        ConfigError: No steps or no calls, or an error that is negative or not finite.
        ConfigTypeError: Something is not a number.
    """

    computed_steps: int
    expected: float
    measured: float
    calls: int

    def __post_init__(self) -> None:
        for name in ("computed_steps", "calls"):
            object.__setattr__(self, name, count(name, getattr(self, name), 1))
        for name in ("expected", "measured"):
            object.__setattr__(self, name, within(name, getattr(self, name), "a finite number from 0"))

    @property
    def factor(self) -> float:
        """How many times as large the error is as expected; 1 where it is smaller, since that may be luck."""
        return max(self.measured / self.expected, 1.0) if self.expected > 0 else 1.0


def factor_at(checks: Sequence[Check], computed_steps: float) -> float:
    """The factor for a number of computed steps, between checks by interpolation in logarithms.

    Args:
        checks: None or more.
        computed_steps: Steps computed; beyond the checks the nearest one holds.

    Returns:
        1 without checks.
    """
    if not checks or computed_steps <= 0:
        return 1.0
    known = sorted((check.computed_steps, check.factor) for check in checks)
    steps, factors = np.log(np.array(known, dtype=np.float64)).T
    return float(np.exp(np.interp(np.log(computed_steps), steps, factors)))


def held_out_ratio(before: Moments, after: Moments, last: Moments) -> float | None:
    """Error on the last call by the plan that had not seen it, over that by the plan that has.

    Both are designed for a third of the steps, and held against the moments of the last call alone; the model is not
    run.

    Args:
        before: Of all calls but the last.
        after: Of all calls.
        last: Of the last call.

    Returns:
        None for runs of so many steps that the search would take longer than it is worth, and of so few that there is
        nothing to choose.
    """
    computed = round(last.steps / _SPEEDUP)
    if last.steps > _MOST_STEPS or computed < 2:
        return None
    unseen, seen = (_error(best_design(computed, moments), last) for moments in (before, after))
    return unseen / seen if seen else None


def _error(design: Design, moments: Moments) -> float:
    """Root mean square of what a design leaves in the final latents, as far as the moments tell."""
    off = -np.eye(moments.steps)
    for step, weights in enumerate(design.weights):
        for node, weight in weights.items():
            off[step, node] += weight
    in_v = moments.response[-1] @ off
    return float(np.sqrt(max(in_v @ moments.gram @ in_v, 0.0)))
