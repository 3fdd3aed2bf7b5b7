"""The picture of a benchmark: faithfulness over what was computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every kind of colour vision; markers differ too.
STYLES: dict[str, dict[str, Any]] = {
    "fewer steps": {"color": "#000000", "marker": ".", "linestyle": "-"},
    "sgl-diffusion-accel": {"color": "#0072B2", "marker": "o", "linestyle": "none"},
    "cache-dit": {"color": "#E69F00", "marker": "^", "linestyle": "none"},
    "diffusers": {"color": "#009E73", "marker": "s", "linestyle": "none"},
}
"""How each family is drawn."""


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws PSNR over the compute ratio for every contender of one result.

    Args:
        result: What `benchmarks.cache.measure` returned.
        path: PNG to write.
    """
    with mpl.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 5), layout="constrained", dpi=150)
        axes = figure.add_subplot()
        for family, style in STYLES.items():
            _draw_family(axes, result, family, style)
        axes.set_xscale("log")
        ticks = [1, 1.5, 2, 2.5, 3, 4, 5, 6]
        axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlim(1, 6.5)
        axes.set_xlabel("compute ratio: work of the unpatched run over work done in the blocks")
        axes.set_ylabel("PSNR against the unpatched run (dB)")
        axes.set_title(f"{result['pipeline']}, {result['steps']} steps, {len(result['captions'])} captions", loc="left")
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
        figure.savefig(path)


def _draw_family(axes: Axes, result: dict[str, Any], family: str, style: dict[str, Any]) -> None:
    rows = [row for row in result["rows"] if row["family"] == family and row["psnr"] is not None]
    if rows:
        rows.sort(key=lambda row: row["compute_ratio"])
        label = "simply fewer steps" if family == "fewer steps" else family
        ratios = [row["compute_ratio"] for row in rows]
        axes.plot(ratios, [row["psnr"] for row in rows], label=label, alpha=0.85, markersize=6, **style)
