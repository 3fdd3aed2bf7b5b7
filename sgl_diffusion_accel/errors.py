"""The errors of this library. Each stays catchable as the built-in error that it specialises."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AccelError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigError(AccelError, ValueError):
    """A setting has a value that is not allowed."""


class ConfigTypeError(AccelError, TypeError):
    """A setting, or the object to be patched, has a wrong type."""


class UnsupportedModelError(AccelError, ValueError):
    """The model cannot be patched in the way that was asked for."""


class LosslessError(AccelError, RuntimeError):
    """What was left out of a call did matter: the outputs with it and without differ by more than rounding."""


class VariantError(AccelError, RuntimeError):
    """A variant that was to be compared failed; the cause is the error that it raised."""


class MissingPackageError(AccelError, ImportError):
    """An optional package is needed and not installed."""


def unknown_name(kind: str, name: str, known: Iterable[str], where: str = "") -> ConfigError:
    """Builds the error for a name that is not known, with the nearest known one.

    Args:
        kind: What is named, for example `"knob"`.
        name: The name that was seen.
        known: The names that are allowed.
        where: Where the name was seen, for example a file's path.

    Returns:
        The error, to be raised by the caller.
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(name.lower(), [n.lower() for n in names], n=1, cutoff=0.5)
    hint = ""
    if nearest:
        alike = [n for n in names if n.lower() == nearest[0]]  # a name and its alias may differ in case alone
        original = max(alike, key=lambda n: difflib.SequenceMatcher(None, name, n).ratio())
        hint = f" Did you mean {original!r}?"
    place = f" in {where}" if where else ""
    return ConfigError(f"unknown {kind} {name!r}{place}.{hint} Known: {', '.join(names)}.")
