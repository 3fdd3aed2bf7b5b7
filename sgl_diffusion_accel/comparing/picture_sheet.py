"""Outputs side by side, with what differs below; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sgl_diffusion_accel.comparing.comparison_data import ComparisonData
from sgl_diffusion_accel.comparing.comparison_tables import decibel
from sgl_diffusion_accel.comparing.contenders import UNPATCHED
from sgl_diffusion_accel.comparing.picture_gallery import Gallery, Shot
from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.reporting.figure_style import FAINT, new_figure, save, shortened, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAGNIFICATIONS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000, 100_000)
_MOST = 0.98
"""Share of the pixels that shall not be cut off by the magnification."""

# Inches.
_COLUMN, _GAP, _MARGIN, _HEAD, _TITLE, _FOOT = 2.3, 0.18, 0.25, 0.55, 0.5, 0.4


def side_by_side(report: ComparisonData, path: str | Path | None) -> Figure:
    """Draws the outputs; see `ComparisonReport.plot_pictures`."""
    gallery = report.gallery
    if not gallery.shots:
        raise ConfigError(
            "there are no pictures in this report: it was loaded from a file, which has the numbers alone, or the "
            "outputs are packed latents. Run compare(...) again, with decode= for latents."
        )
    names = [UNPATCHED, *(row.name for row in report.rows if row.name in gallery.names())]
    magnified = magnification(gallery)
    example = next(iter(gallery.shots.values()))[UNPATCHED].frames
    sheet = _COLUMN * example.shape[-2] / (example.shape[-1] * example.shape[0])
    line = 2 * sheet + _GAP / 2 + 0.3
    width = len(names) * (_COLUMN + _GAP) - _GAP + 2 * _MARGIN
    height = _TITLE + _HEAD + len(gallery.shots) * line + _FOOT
    figure = new_figure(width, height)
    with style():
        figure.text(_MARGIN / width, 1 - 0.3 / height, report.pipeline, fontsize=13, weight="bold", va="center")
        for column, name in enumerate(names):
            left = _MARGIN + column * (_COLUMN + _GAP)
            _head(figure, left, height - _TITLE, report, name)
            for number, shots in enumerate(gallery.shots.values()):
                down = height - _TITLE - _HEAD - number * line - 0.2
                _draw_frames(_axes(figure, left, down, sheet), shots[name])
                if name == UNPATCHED:
                    label = report.calls[list(gallery.shots)[number]]
                    figure.text(
                        left / width, (down + 0.1) / height, shortened(label), fontsize=8.5, color=FAINT, va="center"
                    )
                else:
                    _draw_difference(_axes(figure, left, down - sheet - _GAP / 2, sheet), shots[name], magnified)
        figure.text(_MARGIN / width, 0.2 / height, _note(gallery, magnified), fontsize=8.5, color=FAINT, va="center")
        save(figure, path)
    return figure


def magnification(gallery: Gallery) -> int:
    """The largest of 1, 2, 5, 10, … that leaves nearly all differences within the scale, one for all pictures."""
    shots = [shot for shots in gallery.shots.values() for name, shot in shots.items() if name != UNPATCHED]
    largest = max((float(shot.difference.nan_to_num(nan=1.0).flatten().quantile(_MOST)) for shot in shots), default=0.0)
    fitting = [factor for factor in _MAGNIFICATIONS if factor * largest <= 1.05]
    return fitting[-1] if fitting and largest else 1


def _head(figure: Figure, left: float, top: float, report: ComparisonData, name: str) -> None:
    width, height = figure.get_size_inches()
    if name == UNPATCHED:
        title, numbers = name, f"{report.unpatched.seconds.median:.3g} s"
    else:
        row = report[name]
        title = f"fewer steps: {name}" if row.is_fewer_steps else name
        numbers = f"speed-up {row.speedup:.2f}×, " + (
            "equal" if row.psnr == float("inf") else f"{decibel(row.psnr)} dB"
        )
    weight = "bold" if name != UNPATCHED and report[name].beats_fewer_steps else "normal"
    figure.text(left / width, (top - 0.12) / height, shortened(title, 26), fontsize=10, weight="bold", va="center")
    figure.text(left / width, (top - 0.36) / height, numbers, fontsize=9, color=FAINT, weight=weight, va="center")


def _axes(figure: Figure, left: float, top: float, high: float) -> Axes:
    """Axes of one column, measured in inches from the lower left corner."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, (top - high) / height, _COLUMN / width, high / height))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return axes


def _draw_frames(axes: Axes, shot: Shot) -> None:
    axes.imshow(_row(list(shot.frames.permute(0, 2, 3, 1))).numpy(), interpolation="nearest", aspect="auto")


def _draw_difference(axes: Axes, shot: Shot, magnified: int) -> None:
    shown = _row(list((shot.difference.nan_to_num(nan=1.0) * magnified).clamp(0, 1)))
    axes.imshow(shown.numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest", aspect="auto")


def _row(frames: Sequence[Tensor]) -> Tensor:
    """Frames beside each other, `[H, W, …]`."""
    return torch.cat(list(frames), dim=1)


def _note(gallery: Gallery, magnified: int) -> str:
    latents = "Latents, first three channels. " if gallery.kind == "latents" else ""
    return f"{latents}Below each: how much it differs from the unpatched output, magnified {magnified:,} times."
