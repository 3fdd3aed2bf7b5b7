"""Every row of a result of `benchmarks.cache`, as a table: `python -m benchmarks.table --all`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgl_diffusion_accel.comparing.measures.metrics import psnr_at

_HEAD = (
    "| | blocks computed | compute ratio | wall speed-up | PSNR (dB) | SSIM | fewer steps at that cost (dB) |\n"
    "|---|--:|--:|--:|--:|--:|--:|\n"
)
_FIRST = ("unpatched", "fewer steps", "sgl-diffusion-accel")
"""Families that are shown first; the peers follow by name."""


def chapter(result: Mapping[str, Any]) -> str:
    """What was measured on what, and the table of one result; bold is what beats fewer steps at the same cost.

    Args:
        result: One JSON file of `benchmarks.cache`.
    """
    about = f"{result['pipeline']} miniature, {result['steps']} steps, guidance {result['guidance']:g}, "
    about += f"{len(result['captions'])} captions, {result['dtype']}, {measured_on(result['environment'])}."
    if "note" in result:
        about += f" {result['note']}"
    about += "".join(_fit_line(fit) for fit in result.get("teacache_fits", []))
    about += _calibration_line(result.get("calibration", {}))
    rows = sorted(result["rows"], key=lambda row: (*_place(row["family"]), row["compute_ratio"]))
    return about + "\n\n" + _HEAD + "\n".join(line(row, result) for row in rows)


def _place(family: str) -> tuple[int, str]:
    return _FIRST.index(family) if family in _FIRST else len(_FIRST), family.casefold()


def measured_on(environment: Mapping[str, Any]) -> str:
    """Versions, machine and day."""
    packages = environment["packages"]
    versions = [f"{name} {packages[name]}" for name in ("diffusers", "cache-dit", "torch") if name in packages]
    return ", ".join([*versions, environment["cpu"], f"{environment['threads']} thread", environment["date"]])


def line(row: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """One row of the table; the PSNR is bold where it beats fewer steps at the same cost."""
    quality = "equal" if row["exact"] else f"{row['psnr']:.1f}"
    plain = None if row["family"] in ("unpatched", "fewer steps") else fewer_steps_psnr(result, row["share"])
    if plain is not None and row["psnr"] is not None and row["psnr"] > plain:
        quality = f"**{quality}**"
    cells = (
        f"{row['family']}: {row['name']}",
        f"{row['share']:.0%}",
        f"{row['compute_ratio']:.2f}×",
        f"{row['speedup']:.2f}×",
        quality,
        f"{row['ssim']:.4f}",
        "" if plain is None else f"{plain:.1f}",
    )
    return "| " + " | ".join(cells) + " |"


def fewer_steps_psnr(result: Mapping[str, Any], share: float) -> float | None:
    """PSNR of an unpatched run with fewer steps at `share` of the cost, between the two measured next to it."""
    rows = sorted((row["share"], row["psnr"]) for row in result["rows"] if row["family"] == "fewer steps")
    return psnr_at(rows, share)


def _fit_line(fit: Mapping[str, Any]) -> str:
    signal = " with ret steps" if fit["use_ret_steps"] else ""
    return f" TeaCache's fit{signal}: R² {fit['r_squared']:.2f} for changes of {fit['low']:.3f} to {fit['high']:.3f}."


def _calibration_line(found: Mapping[str, Any]) -> str:
    if not found:
        return ""
    expected = ", ".join(f"{error:.2%} at {ratio}x" for ratio, error in found["expected_relative_error"].items())
    return (
        f" Plans: calibrated on {found['calls']} calls in {found['cpu_time_in_calls']:.2f} times the CPU time of these "
        f"calls alone; expected relative error of the latents {expected}."
    )
