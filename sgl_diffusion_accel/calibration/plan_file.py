"""Writes and reads the file of a plan. Nothing in it is executed or unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sgl_diffusion_accel.caching.magcache.magnitudes import MagnitudeRatios
from sgl_diffusion_accel.caching.teacache.coefficients import TeaCacheCoefficients
from sgl_diffusion_accel.calibration.designs.tuned import Tuned
from sgl_diffusion_accel.calibration.plan_checks import Check
from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.validate import listed

FORMAT = 1

_LARGEST = 16 * 1024 * 1024


def write(path: str | Path, fields: Mapping[str, Any]) -> None:
    """Writes the fields of a plan; a write that breaks leaves the old file."""
    target = Path(path)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps({"format": FORMAT, **fields}, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def refuse(path: str | Path, why: object) -> ConfigError:
    """The error for a file that is not taken."""
    told = str(why).rstrip(".")
    return ConfigError(f"{path} is no plan that can be used: {told}. Make one: calibrate(pipe, calls, path=...)")


def read(path: str | Path, names: Collection[str], newer: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a plan, as they are in the file.

    Args:
        path: The file.
        names: The fields that it must have, no more and no fewer.
        newer: Those of them that files of earlier versions may be without.

    Raises:
        ConfigError: It is not such a file.
        FileNotFoundError: There is no such file.
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
    if found != FORMAT:
        raise refuse(path, f"its format is {found!r}, and this version of the library reads {FORMAT}")
    missing, strange = sorted(set(names) - set(newer) - set(content)), sorted(set(content) - set(names))
    if missing or strange:
        raise refuse(path, f"fields missing: {', '.join(missing) or 'none'}; unknown: {', '.join(strange) or 'none'}")
    return content


def parts(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields that are objects of their own, made of what the file has of them.

    Raises:
        ConfigError: There is something else in it.
        ConfigTypeError: The checks are no list.
    """
    return {
        "checks": listed("checks", fields["checks"], partial(_made, lambda given: Check(**given)), "a list"),
        "tuned": listed("tuned", fields.get("tuned", ()), partial(_made, lambda given: Tuned(**given)), "a list"),
        "teacache": _made(TeaCacheCoefficients.from_json, "teacache", fields["teacache"]),
        "magnitudes": _made(lambda given: MagnitudeRatios(**given), "magnitudes", fields["magnitudes"]),
    }


def _made(make: Callable[[Any], object], name: str, given: Any) -> object:
    try:
        return None if given is None else make(given)
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ConfigError(f"{name} is damaged: {error}") from error
