"""What runs by a plan were measured to be off, beside what the plan had expected of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sgl_diffusion_accel.validate import count, within


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
