"""Checks of what users hand over: each raises with what was seen, what is allowed, and what to type."""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeGuard, TypeVar

from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError, unknown_name

_P = ParamSpec("_P")
_R = TypeVar("_R")
_INFINITE = float("inf")


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


def count(name: str, value: Any, lowest: int, highest: int | None = None) -> int:
    """Returns a whole number from `lowest` (to `highest`), or raises."""
    allowed = f"a whole number from {lowest}" + ("" if highest is None else f" to {highest}")
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):  # numpy's integers are Integral
        raise ConfigTypeError(f"{name}={value!r} is a {type(value).__name__}; allowed: {allowed}.")
    number = int(value)
    if number < lowest or (highest is not None and number > highest):
        raise ConfigError(f"{name}={value}; allowed: {allowed}.")
    return number


def is_number(value: object) -> TypeGuard[Any]:
    """Whether something is a real number, Python's or NumPy's; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def real(name: str, value: Any, allowed: str = "a number") -> float:
    """Returns a number as a float, or raises; too large a whole number is infinity."""
    if not is_number(value):
        raise ConfigTypeError(f"{name} has {value!r}, a {type(value).__name__}; allowed: {allowed}.")
    try:
        return float(value)
    except OverflowError:
        return _INFINITE


def within(name: str, value: Any, allowed: str, lowest: float = 0.0, highest: float = _INFINITE) -> float:
    """Returns a finite number within bounds, which are allowed themselves, or raises.

    Args:
        name: What it is.
        value: What was given.
        allowed: What is allowed, in words, with an example.
        lowest: Lower bound.
        highest: Upper bound.
    """
    if not is_number(value):
        raise ConfigTypeError(f"{name}={value!r} is a {type(value).__name__}; allowed: {allowed}.")
    found = real(name, value)
    if not lowest <= found <= highest or abs(found) == _INFINITE:
        raise ConfigError(f"{name}={value!r}; allowed: {allowed}.")
    return found


def finite(name: str, value: Any, allowed: str = "a finite number") -> float:
    """Returns a finite number, or raises."""
    return within(name, value, allowed, lowest=-_INFINITE)


def positive(name: str, value: Any, allowed: str) -> float:
    """Returns a finite number over 0, or raises."""
    found = within(name, value, allowed)
    if found == 0:
        raise ConfigError(f"{name}={value!r}; allowed: {allowed}.")
    return found


def flag(name: str, value: Any, or_none: bool = False) -> Any:
    """Returns True or False (or None, where that is allowed), or raises."""
    if not isinstance(value, bool) and not (or_none and value is None):
        raise ConfigTypeError(f"{name}={value!r}: allowed are True{', False and None' if or_none else ' and False'}.")
    return value


def choice(name: str, value: Any, allowed: Sequence[str]) -> Any:
    """Returns one of the names that are allowed, or raises with the nearest one."""
    if value not in allowed:
        raise unknown_name(name, str(value), allowed)
    return value


def of_type(name: str, value: Any, kind: type | tuple[type, ...], allowed: str) -> Any:
    """Returns an object of a type, or raises."""
    if not isinstance(value, kind):
        raise ConfigTypeError(f"{name} is a {type(value).__name__}; allowed: {allowed}.")
    return value


def text(name: str, value: Any, allowed: str = "text") -> str:
    """Returns a string, or raises."""
    if not isinstance(value, str):
        raise ConfigTypeError(f"{name}={value!r} is a {type(value).__name__}; allowed: {allowed}.")
    return value


def listed(
    name: str, value: Any, each: Callable[[str, Any], _R], allowed: str, shortest: int = 0, longest: float = _INFINITE
) -> tuple[_R, ...]:
    """Returns what a list or a tuple holds as a tuple, or raises.

    Args:
        name: What it is.
        value: What was given.
        each: Checks one element, given its name, such as `"latents[0]"`, and the element; returns what is kept of it.
        allowed: What is allowed, in words.
        shortest: Fewest elements.
        longest: Most elements.
    """
    of_type(name, value, (list, tuple), allowed)
    if not shortest <= len(value) <= longest:
        raise ConfigError(f"{name} has {len(value)} elements; allowed: {allowed}.")
    return tuple(each(f"{name}[{index}]", element) for index, element in enumerate(value))


def check_names(kind: str, given: Sequence[str], known: Sequence[str], where: str) -> None:
    """Raises ConfigError for the first name that is not known, with the nearest one that is."""
    for name in given:
        if name not in known:
            raise unknown_name(kind, str(name), known, where)


def names_shown(settings: type, defaults: Any) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Shows the names that a function takes as `**` in its signature: for `help`, and for completion in a notebook.

    Args:
        settings: The typed dict of the names.
        defaults: A class with the same names that has their defaults as attributes, as dataclasses do.
    """

    def shown(function: Callable[_P, _R]) -> Callable[_P, _R]:
        known = inspect.signature(function)
        first = [each for each in known.parameters.values() if each.kind is not each.VAR_KEYWORD]
        rest = [each for each in known.parameters.values() if each.kind is each.VAR_KEYWORD]
        names = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=getattr(defaults, name),
                annotation=getattr(kind, "__forward_arg__", kind),
            )
            for name, kind in settings.__annotations__.items()
            if hasattr(defaults, name)
        ]
        signature = known.replace(parameters=[*first, *names, *rest])
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return shown


def names_checked(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A front door that says what to type where an argument is misspelt, or given by its place and has none.

    Where a function takes any names (`**`), it checks them itself.
    """
    parameters = inspect.signature(function).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    by_place = [name for name, each in parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD]

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not takes_any:
            check_names("argument", list(kwargs), list(parameters), function.__name__)
        twice = [name for name in by_place[: len(args)] if name in kwargs]
        if twice:
            raise ConfigError(f"{twice[0]} is given twice, by its place and by its name. Give it once.")
        if len(args) > len(by_place):
            raise ConfigTypeError(
                f"{function.__name__} takes {', '.join(by_place)} by their place, and got {len(args)} arguments. Give "
                f"the others by name: {function.__name__}({', '.join(by_place[:1])}, name=value)"
            )
        return function(*args, **kwargs)

    return checked
