"""Reads the file of a plan, and refuses what is damaged or something else. Nothing is executed or unpickled."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from sgl_diffusion_accel.calibration.plan_checks import Check
from sgl_diffusion_accel.errors import ConfigError

_LARGEST = 16 * 1024 * 1024
_LONGEST = 1000  # denoising steps


def refuse(path: str | Path, why: str) -> ConfigError:
    """The error for a file that is not taken."""
    return ConfigError(f"{path} is no plan that can be used: {why}. Make one: calibrate(pipe, calls, path=...)")


def read(path: str | Path, version: int, names: Collection[str]) -> dict[str, Any]:
    """The fields of a plan file.

    Args:
        path: The file.
        version: Of the format.
        names: The fields that it must have, no more and no fewer.

    Raises:
        ConfigError: It is not such a file.
    """
    if Path(path).stat().st_size > _LARGEST:
        raise refuse(path, f"it is larger than {_LARGEST >> 20} MiB")
    try:
        content = json.loads(Path(path).read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise refuse(path, f"it is not JSON ({error})") from error
    if not isinstance(content, dict) or "format" not in content:
        raise refuse(path, "it has no field 'format'")
    found = content.pop("format")
    if found != version:
        raise refuse(path, f"its format is {found!r}, and this version of the library reads {version}")
    missing, strange = sorted(set(names) - set(content)), sorted(set(content) - set(names))
    if missing or strange:
        raise refuse(path, f"fields missing: {', '.join(missing) or 'none'}; unknown: {', '.join(strange) or 'none'}")
    steps = content["timesteps"]
    if not isinstance(steps, list) or not 1 <= len(steps) <= _LONGEST:
        raise refuse(path, f"timesteps is no list of 1 to {_LONGEST} numbers")
    return content


def whole(path: str | Path, name: str, value: Any) -> int:
    """A positive whole number."""
    if type(value) is not int or value < 1:
        raise refuse(path, f"{name} has {value!r}, and whole numbers from 1 are expected")
    return value


def number(path: str | Path, name: str, value: Any) -> float:
    """A finite number."""
    if type(value) not in (int, float):
        raise refuse(path, f"{name} is damaged: it has {value!r}, and numbers are expected")
    if not math.isfinite(value):
        raise refuse(path, f"{name} holds a number that is not finite")
    return float(value)


def text(path: str | Path, name: str, value: Any) -> str:
    """A string."""
    if type(value) is not str:
        raise refuse(path, f"{name} is damaged: it has {value!r}, and text is expected")
    return value


def check(path: str | Path, fields: Any) -> Check:
    """One check: numbers of steps and calls, and errors that are not negative."""
    names = ("computed_steps", "expected", "measured", "calls")
    if not isinstance(fields, dict) or set(fields) != set(names):
        raise refuse(path, f"checks is damaged: {', '.join(names)} are expected in each")
    expected, measured = (number(path, f"checks.{name}", fields[name]) for name in names[1:3])
    if expected < 0 or measured < 0:
        raise refuse(path, "checks is damaged: an error is negative")
    steps, calls = (whole(path, f"checks.{name}", fields[name]) for name in ("computed_steps", "calls"))
    return Check(steps, expected, measured, calls)


def triangle(path: str | Path, name: str, values: Any, steps: int) -> tuple[float, ...]:
    """The numbers of a triangular matrix of so many steps, all finite; those of a Gram matrix make one."""
    wanted = steps * (steps + 1) // 2
    if not isinstance(values, list) or len(values) != wanted:
        raise refuse(path, f"{name} does not have the {wanted} numbers of {steps} steps")
    numbers = tuple(number(path, name, value) for value in values)
    if name == "response" and not any(numbers[-steps:]):
        raise refuse(path, "response is damaged: no step has any weight")
    if name == "gram":
        matrix = np.zeros((steps, steps))
        matrix[np.triu_indices(steps)] = numbers
        matrix = matrix + np.triu(matrix, 1).T
        lowest, highest = np.linalg.eigvalsh(matrix)[[0, -1]]
        if highest <= 0 or lowest < -1e-6 * highest:
            raise refuse(path, "gram is no Gram matrix")
    return numbers
