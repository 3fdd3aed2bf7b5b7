"""Quality over cost, and maps of the steps; needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_diffusion_accel.comparing.comparison_data import ComparisonData, Row
from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.reporting.figure_style import (
    BLUE,
    COMPUTED,
    FAINT,
    GREEN,
    GRID,
    ORANGE,
    PURPLE,
    SKIPPED,
    SKY,
    VERMILION,
    VIOLET,
    new_figure,
    save,
    shortened,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY, VIOLET)
"""Of variants, whose markers differ too. Black is for fewer steps."""

_MARKERS = ("D", "o", "^", "s", "v", "P", "X")
AXES = {
    "compute_ratio": "compute ratio: blocks of the unpatched run over blocks computed",
    "speedup": "speed-up: wall time of the unpatched run over this one's",
}
_TICKS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 15, 20)
_APART = 1.12
_ROW = 0.27  # inches of a line of the step maps


def pareto(report: ComparisonData, path: str | Path | None, x: str | None) -> Figure:
    """Draws PSNR over the cost; see `ComparisonReport.plot`."""
    if x is not None and x not in AXES:
        raise ConfigError(f"x={x!r}; allowed: {', '.join(map(repr, AXES))}, or None.")
    axis = x or _telling_axis(report.rows)
    figure = new_figure(8, 5.6)
    with style():
        axes = figure.add_subplot()
        axes.set_ymargin(0.12)  # for the label below the lowest point
        finite = [row.psnr for row in report.rows if math.isfinite(row.psnr)]
        top = (max(finite) + 0.12 * max(max(finite) - min(finite), 10)) if finite else 100.0
        fewer = [row for row in report.rows if row.is_fewer_steps and _place(row, axis)]
        _draw_fewer_steps(axes, fewer, axis)
        for index, row in enumerate(row for row in report.rows if not row.is_fewer_steps):
            _draw_row(axes, row, axis, top, look_of(index))
        if any(row.psnr == math.inf for row in report.rows):
            axes.axhline(top, color=FAINT, linewidth=0.8, linestyle=(0, (4, 4)), zorder=0)
            axes.annotate(
                "equal", (1, top), (-4, 4), ("axes fraction", "data"), "offset points", ha="right", color=FAINT
            )
        _ratio_axis(axes, [place for row in report.rows if (place := _place(row, axis))])
        axes.set_xlabel(AXES[axis])
        axes.set_ylabel("PSNR against the unpatched run (dB)")
        axes.locator_params(axis="y", integer=True)
        axes.set_title(report.about, loc="left", fontsize=11, pad=22 if len(report.calls) > 1 else 8)
        if len(report.calls) > 1:
            told = "Means over the calls; the lines below reach down to the worst call."
            axes.text(0, 1.015, told, transform=axes.transAxes, fontsize=8.5, color=FAINT)
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2, fontsize=9)
        figure.set_layout_engine("constrained")
        save(figure, path)
    return figure


def look_of(index: int) -> dict[str, Any]:
    """Colour and marker of a variant: no two of the first 49 are the same."""
    count = len(COLOURS)
    return {"color": COLOURS[index % count], "marker": _MARKERS[(index + index // count) % len(_MARKERS)]}


def _telling_axis(rows: Sequence[Row]) -> str:
    """The compute ratio does not depend on the machine; but where nothing is skipped it tells nothing."""
    ratios = [row.compute_ratio for row in rows if not row.is_fewer_steps]
    known = all(ratio is not None for ratio in ratios)
    return "compute_ratio" if known and any(ratio and ratio > 1.01 for ratio in ratios) else "speedup"


def _place(row: Row, axis: str) -> float | None:
    return row.compute_ratio if axis == "compute_ratio" else row.speedup


def _draw_fewer_steps(axes: Axes, rows: Sequence[Row], axis: str) -> None:
    points = sorted((_place(row, axis) or 1.0, row.psnr, row.name) for row in rows if math.isfinite(row.psnr))
    if not points:
        return
    places, heights, _ = zip(*points, strict=True)
    axes.plot(places, heights, color="black", marker=".", markersize=8, linewidth=1.2, label="simply fewer steps")
    labelled = 0.0
    for place, height, name in points:
        if place > labelled * _APART:  # else the labels would lie on each other
            axes.annotate(
                name, (place, height), (-4, -13), textcoords="offset points", fontsize=8, color=FAINT, ha="right"
            )
            labelled = place


def _draw_row(axes: Axes, row: Row, axis: str, top: float, look: dict[str, Any]) -> None:
    """A point with its worst call as a whisker; equal outputs stand on a line of their own at the top."""
    place = _place(row, axis)
    reason = "cost unknown" if place is None else f"{row.psnr} dB"
    name = shortened(row.name)
    name = f" {name}" if name.startswith("_") else name  # matplotlib hides a label that begins so
    if place is None or math.isnan(row.psnr) or row.psnr == -math.inf:
        axes.plot([], [], linestyle="none", label=f"{name} (not shown: {reason})", **look)
        return
    height = top if row.psnr == math.inf else row.psnr
    axes.plot([place], [height], linestyle="none", markersize=9, markeredgecolor="white", label=name, zorder=4, **look)
    whisker = {"color": look["color"], "linewidth": 1.2, "zorder": 2}
    if math.isfinite(row.psnr_worst) and row.psnr_worst < height:
        axes.plot([place, place], [row.psnr_worst, height], **whisker)
    if axis == "speedup":
        axes.plot([row.speedup_spread.low, row.speedup_spread.high], [height, height], **whisker)


def _ratio_axis(axes: Axes, places: Sequence[float]) -> None:
    """A logarithmic axis of ratios, from 1 on where all of them are."""
    low, high = min([1.0, *places]), max([1.5, *places])
    axes.set_xscale("log")
    ticks = [tick for tick in (0.5, 0.75, *_TICKS) if low * 0.95 <= tick <= high * 1.15]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(low * 0.97, high * 1.15)


def step_maps(report: ComparisonData, path: str | Path | None) -> Figure:
    """Draws which steps were computed; see `ComparisonReport.plot_steps`."""
    lines = [
        (row.name, branch, computed)
        for row in report.rows
        for branch, computed in (row.samples[0].maps if row.samples else {}).items()
    ]
    if not lines:
        raise ConfigError("no variant of this comparison was a cache of this library: there are no step maps to draw.")
    height = _ROW * len(lines) + 1.0
    figure = new_figure(8.6, height)
    with style():
        axes = figure.add_axes((0.3, 0.5 / height, 0.56, _ROW * len(lines) / height))
        for y, (name, branch, computed) in enumerate(lines):
            _draw_map(axes, y, computed)
            is_first = y == 0 or lines[y - 1][0] != name
            axes.text(
                -0.02, y + 0.5, branch, transform=_left_of(axes), ha="right", va="center", color=FAINT, fontsize=9
            )
            if is_first:
                left = {"transform": _left_of(axes), "ha": "right", "va": "center", "fontsize": 9}
                axes.text(-0.12, y + 0.5, shortened(name, 30), **left)
            told = f"{sum(computed)} of {len(computed)}"
            axes.text(1.02, y + 0.5, told, transform=_left_of(axes), va="center", color=COMPUTED, fontsize=9)
        axes.set_xlim(0, max(len(computed) for *_, computed in lines))
        axes.set_ylim(len(lines), 0)
        axes.set_yticks([])
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(axis="x", length=0, labelsize=8, labelcolor=FAINT)
        axes.locator_params(axis="x", integer=True)
        about = f"denoising step of “{shortened(report.calls[0])}”: dark computed, pale skipped"
        axes.set_xlabel(about, fontsize=9, color=FAINT)
        figure.text(0.02, 1 - 0.3 / height, f"Steps computed, {report.about}", fontsize=11, va="center")
        save(figure, path)
    return figure


def _left_of(axes: Axes) -> Any:
    """Coordinates: x as a share of the axes' width, y as data."""
    return axes.get_yaxis_transform()


def _draw_map(axes: Axes, y: int, computed: Sequence[bool]) -> None:
    colours = [COMPUTED if each else SKIPPED for each in computed]
    axes.barh(
        [y + 0.5] * len(computed), [1] * len(computed), 0.78, list(range(len(computed))), color=colours,
        edgecolor="white", linewidth=0.5,
    )  # fmt: skip
