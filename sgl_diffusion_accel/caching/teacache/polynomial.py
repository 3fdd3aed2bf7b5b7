"""The polynomial that estimates the change of a model's output from the change of a signal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError
from sgl_diffusion_accel.validate import real

DEGREE = 4


@dataclass(frozen=True)
class Polynomial:
    """A polynomial of degree 4, c₀x⁴ + c₁x³ + c₂x² + c₃x + c₄, and the range on which it was fitted.

    Below the range it is taken at the range's end, since a fit says nothing about what lies outside.

    Attributes:
        coefficients: Five numbers, highest degree first, as `numpy.polyfit` gives them.
        low: Smallest change in the data of the fit, None if unknown.
        high: Largest one, None if unknown.

    Raises:
        ConfigError: Not five numbers, one that is not finite, or an empty range.
        ConfigTypeError: Not a sequence of numbers.

    Example:
        >>> Polynomial((0, 0, 0, 2, 0.5))(0.25)
        1.0
    """

    coefficients: tuple[float, ...]
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "coefficients", _checked(self.coefficients))
        for name in ("low", "high"):
            end = getattr(self, name)
            object.__setattr__(self, name, None if end is None else real(f"{name} end of the fitted range", end))
        ends = [end for end in (self.low, self.high) if end is not None]
        if any(not math.isfinite(end) or end < 0 for end in ends) or ends != sorted(ends):
            raise ConfigError(
                f"the fitted range is {self.low} to {self.high}; allowed: two finite numbers from 0, the smaller first."
            )

    def __call__(self, change: float) -> float:
        """The estimate for one change."""
        at = change if self.low is None else max(change, self.low)
        value = 0.0
        for coefficient in self.coefficients:
            value = value * at + coefficient
        return value

    def __iter__(self) -> Iterator[float]:
        return iter(self.coefficients)

    def __len__(self) -> int:
        return len(self.coefficients)


def _checked(given: Any) -> tuple[float, ...]:
    unordered = isinstance(given, (str, bytes, Set, Mapping)) or not isinstance(given, Iterable)
    if unordered or getattr(given, "ndim", 1) == 0:
        raise ConfigTypeError(
            f"coefficients is a {type(given).__name__}; allowed: {DEGREE + 1} numbers, highest degree first."
        )
    values = tuple(given)
    numbers = tuple(real("coefficients", value, f"{DEGREE + 1} numbers, highest degree first") for value in values)
    if len(values) != DEGREE + 1:
        raise ConfigError(
            f"coefficients has {len(values)} numbers; allowed: {DEGREE + 1}, highest degree first, as "
            f"numpy.polyfit(changes, output_changes, {DEGREE}) gives them."
        )
    wrong = [value for value in numbers if not math.isfinite(value)]
    if wrong:
        raise ConfigError(f"coefficients has {wrong[0]}; allowed: finite numbers.")
    return numbers
