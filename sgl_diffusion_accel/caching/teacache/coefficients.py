"""The polynomials of TeaCache, from the change of a signal to that of the model's output, with their thresholds."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError
from sgl_diffusion_accel.validate import FrozenSettings, count, flag, of_type, real

logger = logging.getLogger(__name__)

DEGREE = 4

_SPEEDUP = re.compile(r"\s*(\d+(?:\.\d+)?)\s*x\s*", re.IGNORECASE)
_SLACK = 1.05  # how far a wanted speed-up may lie outside of those for which a threshold is known


@dataclass(frozen=True, repr=False)
class TeaCacheCoefficients:
    """A fitted polynomial of TeaCache, and the thresholds that go with it.

    Wherever coefficients are taken, five plain numbers do as well; see `fit_teacache` for how to get them for a model.
    To keep a fit, write `json.dumps(fit.to_json())`; `TeaCacheCoefficients.from_json(json.loads(text))` reads it.

    Attributes:
        coefficients: c₀ … c₄ of c₀x⁴ + c₁x³ + c₂x² + c₃x + c₄, highest degree first, as `numpy.polyfit` gives them.
            x is the relative L1 change of the signal from one step to the next, the value that of the model's output.
        thresholds: Speed-up to the threshold that gives about that speed-up.
        low: Smallest change in the data of the fit; a smaller one is taken as that. None if unknown.
        high: Largest one; a step with a larger one is computed. None if unknown.
        r_squared: Share of the variance of the output's change that the fit explains, at most 1. None if unknown.
        use_ret_steps: For Wan: the signal that they were fitted on; None if unknown, or where there is one only.
        secondary: The same for `transformer_2`, for models with two experts.
        steps: Denoising steps of the runs that they were fitted on; None if unknown.

    Raises:
        ConfigError: Not five finite numbers, or a range or threshold that cannot be.
        ConfigTypeError: Something is not a number.
    """

    coefficients: tuple[float, ...]
    thresholds: Mapping[float, float] = field(default_factory=dict)
    low: float | None = None
    high: float | None = None
    r_squared: float | None = None
    use_ret_steps: bool | None = None
    secondary: TeaCacheCoefficients | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "coefficients", _checked(self.coefficients))
        self._check_range()
        object.__setattr__(self, "thresholds", FrozenSettings(_checked_thresholds(self.thresholds)))
        if self.r_squared is not None:
            object.__setattr__(self, "r_squared", real("r_squared", self.r_squared))
        flag("use_ret_steps", self.use_ret_steps, or_none=True)
        if self.steps is not None:
            object.__setattr__(self, "steps", count("steps", self.steps, 1))
        other: Any = self.secondary
        if isinstance(other, Mapping):
            object.__setattr__(self, "secondary", TeaCacheCoefficients(**other))
        elif other is not None:
            of_type("secondary", other, TeaCacheCoefficients, "TeaCacheCoefficients for transformer_2")

    def _check_range(self) -> None:
        for name in ("low", "high"):
            end = getattr(self, name)
            object.__setattr__(self, name, None if end is None else real(f"{name} end of the fitted range", end))
        ends = [end for end in (self.low, self.high) if end is not None]
        if any(not math.isfinite(end) or end < 0 for end in ends) or ends != sorted(ends):
            raise ConfigError(
                f"the fitted range is {self.low} to {self.high}; allowed: two finite numbers from 0, the smaller first."
            )

    def __call__(self, change: float) -> float:
        """The estimate for one change. Below the fitted range it is that of the range's end: a fit says nothing there.

        Example:
            >>> TeaCacheCoefficients((0, 0, 0, 2, 0.5))(0.25)
            1.0
        """
        at = change if self.low is None else max(change, self.low)
        value = 0.0
        for coefficient in self.coefficients:
            value = value * at + coefficient
        return value

    def threshold(self, wanted: float | str | None, is_strict: bool = True) -> tuple[float, str]:
        """Finds a threshold.

        Args:
            wanted: The threshold itself; a speed-up such as `"2x"`, for the nearest one known, of two the more careful;
                or None for the most careful one known.
            is_strict: Whether a speed-up outside of those known is refused.

        Returns:
            The threshold, and a word on where it comes from.

        Raises:
            ConfigError: No threshold is known for that.
        """
        if wanted is not None and not isinstance(wanted, str):
            return real("teacache_thresh", wanted), ""
        known = ", ".join(f"'{speedup:g}x' ({threshold:g})" for speedup, threshold in self.thresholds.items())
        if not self.thresholds:
            raise ConfigError(
                f"no threshold is known for coefficients={list(self.coefficients)}. Give one as a number: "
                "teacache_thresh=0.1, smaller for a picture closer to the uncached one; or get thresholds by speed-up "
                "together with the coefficients from fit_teacache(pipe, calls)."
            )
        speedups = sorted(self.thresholds)
        speedup = speedups[0] if wanted is None else speedup_of(wanted)
        if is_strict and not speedups[0] / _SLACK <= speedup <= speedups[-1] * _SLACK:
            raise ConfigError(f"teacache_thresh={wanted!r}: none is known for that. Known: {known}; or give a number.")
        nearest = min(speedups, key=lambda each: (round(abs(each - speedup), 9), each))
        if not speedup / _SLACK <= nearest <= speedup * _SLACK:
            logger.warning("no threshold is known for %gx: taken is that for %gx. Known: %s.", speedup, nearest, known)
        return self.thresholds[nearest], f" for {nearest:g}x"

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON can hold them; the thresholds are pairs, since a key of JSON is a string."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "secondary"}
        fields["thresholds"] = sorted(map(list, self.thresholds.items()))
        return {**fields, "secondary": None if self.secondary is None else self.secondary.to_json()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> TeaCacheCoefficients:
        """Makes them of what `to_json` returned.

        Raises:
            ConfigError: A value that is not allowed, see the class.
            KeyError, TypeError, ValueError: They are no such fields.

        Example:
            >>> fit = TeaCacheCoefficients((0, 0, 0, 2, 0.5), thresholds={2.0: 0.1})
            >>> TeaCacheCoefficients.from_json(fit.to_json()) == fit
            True
        """
        other = fields["secondary"]
        secondary = None if other is None else cls.from_json(other)
        return cls(**{**fields, "thresholds": dict(fields["thresholds"]), "secondary": secondary})

    def __iter__(self) -> Iterator[float]:
        return iter(self.coefficients)

    def __len__(self) -> int:
        return len(self.coefficients)

    def __repr__(self) -> str:
        given = [f"{name}={value!r}" for name, value in vars(self).items() if value not in (None, {})]
        return f"TeaCacheCoefficients({', '.join(given)})"


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


def _checked_thresholds(given: Any) -> dict[float, float]:
    of_type("thresholds", given, Mapping, "a dict of speed-up to threshold, such as {2.0: 0.1}")
    found = {_key(speedup): real("thresholds", threshold) for speedup, threshold in given.items()}
    for value in (*found, *found.values()):
        if not 0 < value < float("inf"):
            raise ConfigError(f"thresholds has {value}; allowed: positive numbers, such as {{2.0: 0.1}}.")
    return found


def _key(speedup: Any) -> float:
    """A speed-up as a number; JSON has made a string of it."""
    if isinstance(speedup, str) and re.fullmatch(r"\d+(\.\d+)?", speedup):
        return float(speedup)
    return real("thresholds", speedup)


def speedup_of(wanted: str) -> float:
    """A speed-up such as `"1.6x"` as a number, or raises ConfigError."""
    match = _SPEEDUP.fullmatch(wanted)
    if match is None:
        raise ConfigError(
            f"teacache_thresh={wanted!r}; allowed: a positive number such as 0.1, or a speed-up such as '1.6x'."
        )
    return float(match[1])
