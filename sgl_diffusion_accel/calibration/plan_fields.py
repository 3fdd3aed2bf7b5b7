"""What the fields of a plan may hold. Each check raises with what was seen and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from sgl_diffusion_accel.caching.magcache.magnitudes import MagnitudeRatios
from sgl_diffusion_accel.caching.teacache.coefficients import TeaCacheCoefficients
from sgl_diffusion_accel.calibration.designs.answers import MOST_STEPS, checked_answers
from sgl_diffusion_accel.calibration.designs.design import Matrix
from sgl_diffusion_accel.calibration.designs.tuned import Tuned
from sgl_diffusion_accel.calibration.plan_checks import Check
from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.validate import count, finite, listed, of_type, text

_LEAST_LEFT = 0.05


def checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a plan as they are kept: lists as tuples, numbers as Python's.

    Raises:
        ConfigError: A value that is not allowed.
        ConfigTypeError: Something has a wrong type.
    """
    found = dict(fields)
    for name in ("pipeline", "config", "scheduler", "library"):
        found[name] = text(name, found[name])
    found["transformers"] = listed("transformers", found["transformers"], text, "a list of one name or more", 1)
    size = partial(count, lowest=1)
    found["latents"] = listed("latents", found["latents"], size, "a list of one whole number or more", 1)
    found["calls"] = count("calls", found["calls"], 1)
    if found["guidance"] is not None:
        found["guidance"] = finite("guidance", found["guidance"], "a finite number, or None")
    found["timesteps"] = _falling(found["timesteps"])
    steps = len(found["timesteps"])
    found["gram"] = _gram(found["gram"], steps)
    found["response"] = _response(found["response"], steps)
    found["checks"] = _checks(found["checks"], steps)
    found["growth"] = listed("growth", found["growth"], _pair, "a list of pairs, such as (0.9, 5.2)")
    found["answers"] = listed(
        "answers", found["answers"], checked_answers, "a list of lists, one for each disturbed run"
    )
    found["tuned"] = _tuned(found["tuned"], steps)
    if found["held_out"] is not None:
        found["held_out"] = _ratio("held_out", found["held_out"])
    for name, kind in (("teacache", TeaCacheCoefficients), ("magnitudes", MagnitudeRatios)):
        of_type(name, found[name], (kind, type(None)), f"{kind.__name__}, or None")
    return found


def _falling(values: Any) -> tuple[float, ...]:
    """Timesteps, one for each denoising step; they fall, or stay where a scheduler takes two steps at one."""
    times = listed("timesteps", values, finite, f"a list of 1 to {MOST_STEPS} numbers", 1, MOST_STEPS)
    for step, (before, after) in enumerate(pairwise(times), 1):
        if before < after:
            raise ConfigError(f"timesteps do not fall: {before:g} is followed by {after:g} at step {step}.")
    return times


def _gram(values: Any, steps: int) -> tuple[float, ...]:
    """The upper triangle of a Gram matrix, by rows."""
    numbers = _triangle("gram", values, steps)
    lowest, highest = np.linalg.eigvalsh(symmetric(numbers, steps))[[0, -1]]
    if not (0 < highest < np.inf and lowest >= -1e-6 * highest):  # huge numbers overflow to infinity or NaN
        raise ConfigError(
            f"gram is no Gram matrix: its eigenvalues go from {lowest:.3g} to {highest:.3g}; allowed: none under 0 but "
            "for rounding, and one over 0."
        )
    return numbers


def _response(values: Any, steps: int) -> tuple[float, ...]:
    """The lower triangle of the weights of the outputs in the latents, by rows."""
    numbers = _triangle("response", values, steps)
    if not any(numbers[-steps:]):
        raise ConfigError("response gives no step any weight in the final latents; allowed: a weight for one at least.")
    return numbers


def _pair(name: str, value: Any) -> tuple[float, float]:
    """A share of a run and a growth."""
    left, growth = listed(name, value, finite, "a pair of numbers, such as (0.9, 5.2)", 2, 2)
    if not _LEAST_LEFT <= left <= 1 or growth < 0:
        raise ConfigError(
            f"{name}=({left:g}, {growth:g}); allowed: a share from {_LEAST_LEFT} to 1, and a growth from 0."
        )
    return left, growth


def _ratio(name: str, value: Any) -> float:
    """A ratio of two errors."""
    ratio = finite(name, value, "a number over 0, or None")
    if ratio <= 0:
        raise ConfigError(f"{name}={ratio:g}; allowed: a number over 0, or None.")
    return ratio


def _checks(values: Any, steps: int) -> tuple[Check, ...]:
    """Checks, each of at most as many computed steps as there are."""

    def each(name: str, value: Any) -> Check:
        check: Check = of_type(name, value, Check, "a Check, from check_plan")
        count(f"{name}.computed_steps", check.computed_steps, 1, steps)
        return check

    return listed("checks", values, each, "a list of Check, from check_plan")


def symmetric(upper: Sequence[float], steps: int) -> Matrix:
    """The symmetric matrix `[S, S]` of an upper triangle by rows."""
    matrix = np.zeros((steps, steps))
    matrix[np.triu_indices(steps)] = upper
    return matrix + np.triu(matrix, 1).T


def _tuned(values: Any, steps: int) -> tuple[Tuned, ...]:
    """Choices of designs, one for a number of computed steps."""

    def each(name: str, value: Any) -> Tuned:
        tuned: Tuned = of_type(name, value, Tuned, "a Tuned, from tune_plan")
        count(f"{name}.computed_steps", tuned.computed_steps, 1, max(steps - 1, 1))
        return tuned

    found = listed("tuned", values, each, "a list of Tuned, from tune_plan")
    if len({each.computed_steps for each in found}) < len(found):
        raise ConfigError("tuned has two designs for the same number of computed steps; allowed: one.")
    return found


def _triangle(name: str, values: Any, steps: int) -> tuple[float, ...]:
    wanted = steps * (steps + 1) // 2
    return listed(name, values, finite, f"a list of the {wanted} numbers of {steps} steps", wanted, wanted)
