"""The README's table: the best that each method offers at several costs, beside the best peer that was found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

RATIOS = (2.0, 2.4, 2.8, 3.3, 3.8, 5.0)
"""Compute ratios of the columns."""

_NEAR = 0.97
"""A setting counts for a ratio if it computes as little, or at most this much more."""

_LINES = {
    "simply fewer steps": ("fewer steps",),
    "best peer found": ("cache-dit", "diffusers"),
    "DBCache and step masks": ("DBCache",),
    "TeaCache, fitted, with prediction": ("TeaCache",),
    "MagCache, calibrated, with prediction": ("MagCache",),
    "gap control on residuals": ("gap control",),
    "**adaptive, nothing tuned**": ("adaptive",),
    "**calibrated plan**": ("plan",),
    "plan from one caption, 50 Euler steps, 16×16": ("carried plan",),
}


def table(results: Sequence[dict[str, Any]]) -> str:
    """One line for each miniature and method, one column for each compute ratio.

    A cell holds the highest PSNR of all settings that compute as little: for peers the best of their sweep, chosen
    after the fact.

    Args:
        results: JSON files of `benchmarks.cache`.
    """
    lines = ["| PSNR (dB) at a compute ratio of | " + " | ".join(f"{ratio:g}×" for ratio in RATIOS) + " |"]
    lines.append("|---|" + "--:|" * len(RATIOS))
    for result in results:
        lines.append(f"| *{_heading(result)}* |" + " |" * len(RATIOS))
        for label, kinds in _LINES.items():
            cells = [best(result, kinds, ratio) for ratio in RATIOS]
            if any(cell is not None for cell in cells):
                lines.append(f"| {label} | " + " | ".join("–" if c is None else f"{c:.1f}" for c in cells) + " |")
    return "\n".join(lines)


def best(result: dict[str, Any], kinds: Sequence[str], ratio: float) -> float | None:
    """The highest PSNR that the methods reach at a compute ratio or beyond; None if they do not reach it."""
    reached = [
        row["psnr"]
        for row in result["rows"]
        if row["psnr"] is not None and kind_of(row) in kinds and row["compute_ratio"] >= _NEAR * ratio
    ]
    return max(reached, default=None)


def kind_of(row: dict[str, Any]) -> str:
    """The method of a row, or the family where it is not this library's."""
    family, name = str(row["family"]), str(row["name"])
    if family != "sgl-diffusion-accel":
        return family
    if name.startswith("plan"):
        if name.startswith("plan of one caption"):
            return "carried plan"
        return "plan of 50 Euler steps" if name.startswith("plan of") else "plan"
    for kind in ("adaptive", "gap control"):
        if name.startswith(kind):
            return kind
    for kind in ("TeaCache", "MagCache"):
        if kind in name:
            return kind if ", TS" in name else f"{kind}, reuse"
    return "DBCache"


def title(result: dict[str, Any]) -> str:
    """What was run: pipeline, steps, scheduler, and the size where it is not the usual one."""
    scheduler = {"euler": "Euler", "unipc": "UniPC"}[result.get("scheduler", "euler")]
    height, width = result.get("size", (16, 16))
    size = "" if (height, width) == (16, 16) else f" at {height}×{width}"
    return f"{result['pipeline']}, {result['steps']} {scheduler} steps{size}"


def _heading(result: dict[str, Any]) -> str:
    peers = sum(row["family"] in ("cache-dit", "diffusers") for row in result["rows"])
    return f"{title(result)}, {len(result['captions'])} captions; {peers} settings of peers"
