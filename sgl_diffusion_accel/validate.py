"""What configs have in common: checks of their fields, and a dict that cannot be changed."""

from __future__ import annotations

import numbers
from typing import Any

from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError


class FrozenSettings(dict[Any, Any]):
    """A dict that cannot be changed, and can be hashed."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        """Raises TypeError: a config is never changed."""
        raise TypeError("a config is never changed; make another one: dataclasses.replace(config, secondary={...})")

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = __ior__ = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> Any:
        return FrozenSettings, (dict(self),)


def count(name: str, value: Any, lowest: int) -> int:
    """Returns a whole number from `lowest`, or raises."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):  # numpy's integers are Integral
        raise ConfigTypeError(f"{name}={value!r} is a {type(value).__name__}; allowed: a whole number from {lowest}.")
    if value < lowest:
        raise ConfigError(f"{name}={value}; allowed: a whole number from {lowest}.")
    return int(value)


def real(name: str, value: Any, allowed: str = "a number") -> float:
    """Returns a number as a float, or raises; too large a whole number is infinity."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigTypeError(f"{name} has {value!r}, a {type(value).__name__}; allowed: {allowed}.")
    try:
        return float(value)
    except OverflowError:
        return float("inf")
