"""The demo's picture: the same captions with every setting, and which steps were computed."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure, SubFigure

from benchmarks.metrics import Frames

from .demo_results import Result, Run

# Blue for computed, pale for skipped: apart in lightness too, so that they are told apart in grey and with any eyes.
COMPUTED, SKIPPED, INK, FAINT = "#0072B2", "#DDE3E8", "#1F2933", "#61707D"
_GAP = 1
_TILES = 3


def draw(results: list[Result], titles: dict[str, str], path: Path) -> None:
    """Draws all models below each other.

    Args:
        results: One a model.
        titles: Title of each model, by its name.
        path: PNG to write.
    """
    style = {"font.size": 10, "font.family": "DejaVu Sans", "text.color": INK, "axes.edgecolor": FAINT}
    with mpl.rc_context(style):
        columns = 1 + len(results[0].cached)
        figure = Figure(figsize=(2.9 * columns, 6.6 * len(results) + 0.4), dpi=110, layout="constrained", facecolor="w")
        parts = np.atleast_1d(figure.subfigures(len(results), 1, hspace=0.04))
        for part, result in zip(parts, results, strict=True):
            _draw_model(part, result, titles[result.model])
        figure.savefig(path)


def _draw_model(part: SubFigure, result: Result, title: str) -> None:
    part.suptitle(f"{title}, {result.steps} steps", x=0.01, ha="left", fontsize=14, weight="bold")
    columns = 1 + len(result.cached)
    axes = part.subplots(3, columns, height_ratios=(10, 1.6, 10), squeeze=False)
    _draw_tiles(axes[0, 0], result.unpatched, "unpatched", "")
    _draw_steps(axes[1, 0], result.unpatched[0], result.steps)
    _draw_captions(axes[2, 0], result)
    for column, name in enumerate(result.cached, start=1):
        _draw_tiles(axes[0, column], result.cached[name], name, _numbers(result, result.cached[name]))
        _draw_steps(axes[1, column], result.cached[name][0], result.steps)
        steps = result.row(result.fewer[name]).steps
        numbers = _numbers(result, result.fewer[name])
        _draw_tiles(axes[2, column], result.fewer[name], f"simply {steps:.0f} steps, no cache", numbers)


def _numbers(result: Result, runs: list[Run]) -> str:
    row = result.row(runs)
    return f"{row.speedup:.1f}× faster · {row.psnr:.1f} dB"


def _draw_tiles(axes: Axes, runs: list[Run], name: str, numbers: str) -> None:
    axes.imshow(tiles([run.frames for run in runs]), interpolation="nearest")
    axes.set_title(name, loc="left", fontsize=11, weight="bold", pad=20 if numbers else 6)
    if numbers:
        axes.text(0, 1.025, numbers, transform=axes.transAxes, fontsize=10, color=FAINT, va="bottom")
    axes.axis("off")


def _draw_steps(axes: Axes, run: Run, steps: int) -> None:
    computed = np.array([record for record in run.computed.values()], dtype=float)
    colours = ListedColormap([SKIPPED, COMPUTED])
    axes.pcolormesh(computed[::-1], cmap=colours, vmin=0, vmax=1, edgecolors="w", linewidth=0.6)
    done = computed.mean(axis=0).sum()
    axes.set_xlabel(f"{done:.0f} of {steps} steps computed", loc="left", color=COMPUTED, fontsize=9)
    branches = list(run.computed)[::-1]
    axes.set_yticks(np.arange(len(branches)) + 0.5, branches, fontsize=8)
    axes.set_xticks([])
    axes.tick_params(length=0, colors=FAINT)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_captions(axes: Axes, result: Result) -> None:
    lines = [f"{index}  {caption}" for index, caption in enumerate(result.captions, start=1)]
    axes.text(0, 1, "asked for", weight="bold", fontsize=11, va="bottom", transform=axes.transAxes)
    axes.text(0, 0.96, "\n".join(lines), va="top", fontsize=9, linespacing=1.7, transform=axes.transAxes)
    axes.axis("off")


def tiles(samples: list[Frames]) -> npt.NDArray[np.float32]:
    """Samples as one picture: clips below each other, their frames side by side; pictures three in a row.

    Args:
        samples: Each `[1, F, H, W, 3]`.
    """
    frames = np.concatenate([sample[0] for sample in samples])
    height, width = frames.shape[1:3]
    rows = -(-len(frames) // _TILES)
    sheet = np.ones((rows * (height + _GAP) - _GAP, _TILES * (width + _GAP) - _GAP, 3), dtype=np.float32)
    for index, frame in enumerate(frames):
        y, x = index // _TILES * (height + _GAP), index % _TILES * (width + _GAP)
        sheet[y : y + height, x : x + width] = frame
    return sheet
