"""The picture of a benchmark: faithfulness over what was computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every kind of colour vision; markers differ too.
STYLES: dict[str, dict[str, Any]] = {
    "simply fewer steps": {"color": "#000000", "marker": ".", "linestyle": "-"},
    "plan": {"color": "#D55E00", "marker": "*", "linestyle": "-", "markersize": 11},
    "plan of another schedule": {"color": "#D55E00", "marker": "*", "linestyle": ":", "fillstyle": "none"},
    "adaptive": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "gap control on residuals": {"color": "#0072B2", "marker": "o", "linestyle": "none", "fillstyle": "none"},
    "TeaCache with TaylorSeer": {"color": "#E69F00", "marker": "^", "linestyle": "none"},
    "TeaCache as published": {"color": "#CC79A7", "marker": "v", "linestyle": "none"},
    "MagCache with TaylorSeer": {"color": "#E69F00", "marker": "P", "linestyle": "none"},
    "MagCache as published": {"color": "#CC79A7", "marker": "X", "linestyle": "none"},
    "late masks": {"color": "#56B4E9", "marker": "D", "linestyle": "none"},
    "DBCache, the peers' settings": {"color": "#56B4E9", "marker": "o", "linestyle": "none", "fillstyle": "none"},
    "cache-dit": {"color": "#000000", "marker": "+", "linestyle": "none", "markeredgewidth": 1.6},
    "diffusers' own caches": {"color": "#009E73", "marker": "s", "linestyle": "none", "fillstyle": "none"},
}
"""How each series is drawn. Those of this library have no owner's name."""


def series_of(row: dict[str, Any]) -> str:
    """The series that a row of a result belongs to."""
    family, name = row["family"], row["name"]
    if family == "sgl-diffusion-accel":
        if name.startswith("plan"):
            return "plan of another schedule" if "Euler steps" in name else "plan"
        if name.startswith("adaptive"):
            return "adaptive"
        if name.startswith("gap control"):
            return "gap control on residuals"
        for kind in ("TeaCache", "MagCache"):
            if kind in name:
                return f"{kind} {'with TaylorSeer' if ', TS' in name else 'as published'}"
        return "late masks" if "late-" in name else "DBCache, the peers' settings"
    names = {"fewer steps": "simply fewer steps", "diffusers": "diffusers' own caches"}
    return str(names.get(family, family))


def draw(result: dict[str, Any], path: Path, cost: str = "compute_ratio") -> None:
    """Draws PSNR over the compute ratio, or the wall time, for every contender of one result.

    Args:
        result: What `benchmarks.cache.measure` returned.
        path: PNG to write.
        cost: `"compute_ratio"`, or `"speedup"` for the wall time.
    """
    with mpl.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 6), layout="constrained", dpi=150)
        axes = figure.add_subplot()
        for series, style in STYLES.items():
            rows = [row for row in result["rows"] if series_of(row) == series and row["psnr"] is not None]
            _draw_series(axes, rows, series, style, cost)
        axes.set_xscale("log")
        ticks = [1, 1.5, 2, 2.5, 3, 4, 5, 6]
        axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlim(1, 6.7)
        axes.set_xlabel(_COSTS[cost])
        axes.set_ylabel("PSNR against the unpatched run (dB)")
        axes.set_title(
            f"{result['pipeline']} miniature, {result['steps']} {_SCHEDULERS[result.get('scheduler', 'euler')]} steps, "
            f"{len(result['captions'])} captions",
            loc="left",
        )
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        figure.savefig(path)


_COSTS = {
    "compute_ratio": "compute ratio: work of the unpatched run over work done in the blocks",
    "speedup": "speed-up: wall time of the unpatched run over that of this one (one CPU thread)",
}
_SCHEDULERS = {"euler": "Euler", "unipc": "UniPC"}


def _draw_series(axes: Axes, rows: list[dict[str, Any]], label: str, style: dict[str, Any], cost: str) -> None:
    if rows:
        rows.sort(key=lambda row: row[cost])
        ratios = [row[cost] for row in rows]
        axes.plot(ratios, [row["psnr"] for row in rows], label=label, **{"markersize": 7, **style})
