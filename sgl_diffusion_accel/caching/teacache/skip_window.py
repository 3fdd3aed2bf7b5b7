"""Which denoising steps of a run a cache may skip."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError
from sgl_diffusion_accel.validate import is_number

_ROUNDING = 1e-6  # 0.29 of 100 steps are 29, though the product is a little less


@dataclass(frozen=True)
class Window:
    """The steps that may be skipped: `start` to `end`, without `end`, never the first and never the last step.

    Attributes:
        start: A step index; negative counts from the end; a float is a share of the run's steps.
        end: The same; the first step that is computed again.

    Raises:
        ConfigError: A share below 0 or above 1, or a window that is empty whatever the number of steps.
        ConfigTypeError: Neither a whole number nor a float.

    Example:
        >>> Window(5, -1).bounds(50)
        (5, 49)
        >>> Window(0.1, 0.9).bounds(50)
        (5, 45)
    """

    start: int | float = 1
    end: int | float = -1

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", _bound("start_skipping", self.start))
        object.__setattr__(self, "end", _bound("end_skipping", self.end))
        same_kind = isinstance(self.start, int) == isinstance(self.end, int)
        same_side = same_kind and (self.start < 0) == (self.end < 0)
        is_integer = isinstance(self.start, int)
        only_last = (is_integer and self.start == -1) or (not is_integer and self.start == 1)
        only_first = self.end == 0 or (isinstance(self.end, int) and self.end == 1)
        if (same_side and self.start >= self.end) or only_first or only_last:
            raise ConfigError(
                f"start_skipping={self.start} and end_skipping={self.end} leave no step to skip. Allowed: a start "
                "before the end, such as start_skipping=5, end_skipping=-1 or start_skipping=0.1, end_skipping=0.95."
            )

    def bounds(self, total: int) -> tuple[int, int]:
        """The first step that may be skipped and the one behind the last, in a run of `total` steps."""
        return max(_resolve(self.start, total), 1), min(_resolve(self.end, total), total - 1)

    def __str__(self) -> str:
        return f"start_skipping={self.start}, end_skipping={self.end}"


def _bound(name: str, value: object) -> int | float:
    if not is_number(value):
        raise ConfigTypeError(
            f"{name}={value!r} is a {type(value).__name__}; allowed: a step as a whole number (negative from the end) "
            "or a share of the steps as a float from 0.0 to 1.0."
        )
    if isinstance(value, numbers.Integral):
        return int(value)
    if not 0 <= float(value) <= 1:
        raise ConfigError(
            f"{name}={value!r} is a share of the steps; allowed: 0.0 to 1.0. A step is a whole number: {name}=5, or "
            f"{name}=-1 for the last one."
        )
    return float(value)


def _resolve(bound: int | float, total: int) -> int:
    if isinstance(bound, float):
        return math.floor(bound * total + _ROUNDING)
    return bound if bound >= 0 else total + bound
