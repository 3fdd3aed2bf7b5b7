"""The picture of a benchmark: faithfulness over what was computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from sgl_diffusion_accel.reporting.figure_style import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION

from .summary import FEWER, kind_of, title

# Markers differ as well as colours.
STYLES: dict[str, dict[str, Any]] = {
    "fewer steps": {"color": "black", "marker": ".", "linestyle": "-", "label": FEWER},
    "plan": {"color": VERMILION, "marker": "*", "linestyle": "-", "markersize": 11, "label": "plan"},
    "tuned plan": {"color": VERMILION, "marker": "h", "linestyle": "-", "label": "tuned plan"},
    "carried plan": {"color": VERMILION, "marker": "*", "fillstyle": "none", "label": "plan from one caption"},
    "plan of 50 Euler steps": {
        "color": VERMILION,
        "marker": "p",
        "fillstyle": "none",
        "label": "plan of 50 Euler steps",
    },
    "adaptive": {"color": BLUE, "marker": "o", "linestyle": "-", "label": "adaptive"},
    "gap control": {"color": BLUE, "marker": "o", "fillstyle": "none", "label": "gap control on residuals"},
    "TeaCache": {"color": ORANGE, "marker": "^", "label": "TeaCache with prediction"},
    "TeaCache, reuse": {"color": PURPLE, "marker": "v", "label": "TeaCache as published"},
    "MagCache": {"color": ORANGE, "marker": "P", "label": "MagCache with prediction"},
    "MagCache, reuse": {"color": PURPLE, "marker": "X", "label": "MagCache as published"},
    "late masks": {"color": SKY, "marker": "D", "label": "late masks"},
    "DBCache": {"color": SKY, "marker": "o", "fillstyle": "none", "label": "DBCache, the peers' settings"},
    "DBCache, SGLang's defaults": {"color": SKY, "marker": "o", "label": "DBCache, SGLang's defaults"},
    "cache-dit": {"color": "black", "marker": "+", "markeredgewidth": 1.6, "label": "cache-dit"},
    "diffusers": {"color": GREEN, "marker": "s", "fillstyle": "none", "label": "diffusers' own caches"},
    "EasyCache": {"color": GREEN, "marker": "1", "markeredgewidth": 1.6, "label": "EasyCache as published"},
    "Spectrum": {"color": GREEN, "marker": "3", "markeredgewidth": 1.6, "label": "Spectrum as published"},
    "TaylorSeer": {"color": GREEN, "marker": "x", "markeredgewidth": 1.6, "label": "TaylorSeer as published"},
}
"""How each kind of row (`summary.kind_of`) is drawn: as points unless it has a line. Others' kinds have their name."""

_OTHER = {"color": "grey", "marker": "x"}
"""How a peer is drawn that is not among them."""


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws PSNR over the compute ratio for every contender of one result.

    Args:
        result: What `benchmarks.cache.measure` returned.
        path: PNG to write.
    """
    with mpl.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 6), layout="constrained", dpi=150)
        axes = figure.add_subplot()
        for kind in dict.fromkeys([*STYLES, *map(kind_of, result["rows"])]):
            style = STYLES.get(kind, {**_OTHER, "label": kind})
            points = sorted(
                (row["compute_ratio"], row["psnr"])
                for row in result["rows"]
                if kind_of(row) == kind and row["psnr"] is not None
            )
            if points:
                axes.plot(*zip(*points, strict=True), **{"markersize": 7, "linestyle": "none", **style})
        axes.set_xscale("log")
        ticks = [1, 1.5, 2, 2.5, 3, 4, 5, 6]
        axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlim(1, 6.7)
        axes.set_xlabel("compute ratio: work of the unpatched run over work done in the blocks")
        axes.set_ylabel("PSNR against the unpatched run (dB)")
        axes.set_title(f"{title(result)}, {len(result['captions'])} captions", loc="left")
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        figure.savefig(path)
