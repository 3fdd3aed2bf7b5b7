"""The demo's picture: the same captions with every setting, and which steps were computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from sgl_diffusion_accel.reporting.figure_style import COMPUTED, FAINT, INK, SKIPPED, new_figure, save, style

from .demo_results import Result, Row, Run

_NOTE = (
    "In the maps a row is a branch of guidance (cond, uncond), a column a denoising step: blue where it was computed, "
    "pale where it was skipped.\ndB: PSNR against the unpatched samples, the mean over the captions; "
    "the better of the two at the same cost is bold."
)
_GAP = 1
_ACROSS = 3
_MOST_ROWS = 4

# Inches.
_COLUMN, _MARGIN = 2.55, 0.3
_HEAD, _LABEL, _MAP, _FOOT = 0.5, 0.55, 0.3, 0.65


def draw(results: list[Result], titles: dict[str, str], path: Path) -> None:
    """Draws all models below each other.

    For each model: the unpatched samples and, beside them, those of every setting; below these, which steps were
    computed; below that, what an unpatched run shows with as many steps as the setting costs.

    Args:
        results: One a model.
        titles: Title of each model, by its name.
        path: PNG to write.
    """
    heights = [2 * (_LABEL + _sheet_inches(result)) + _HEAD + _MAP + _FOOT for result in results]
    width = (1 + len(results[0].cached)) * (_COLUMN + _MARGIN) + 2 * _MARGIN
    figure = new_figure(width, sum(heights) + 0.5, dpi=120)
    with style(font_size=9):
        top = figure.get_figheight() - _MARGIN / 2
        for result, height in zip(results, heights, strict=True):
            _draw_model(Page(figure, top), result, titles[result.model])
            top -= height
        Page(figure, top).text(0, 0, _NOTE, color=FAINT, fontsize=8.5, linespacing=1.5)
        save(figure, path)


@dataclass(frozen=True)
class Page:
    """A part of the figure, measured in inches from its upper left corner.

    Attributes:
        figure: What is drawn on.
        top: Inches from the figure's lower edge.
    """

    figure: Figure
    top: float

    def axes(self, column: int, down: float, height: float) -> Axes:
        """Axes of one column."""
        wide, high = self.figure.get_size_inches()
        left = _MARGIN + column * (_COLUMN + _MARGIN)
        return self.figure.add_axes((left / wide, (self.top - down - height) / high, _COLUMN / wide, height / high))

    def text(self, column: int, down: float, text: str, **style: Any) -> None:
        """Text in one column, its first line below `down`."""
        wide, high = self.figure.get_size_inches()
        left = _MARGIN + column * (_COLUMN + _MARGIN)
        self.figure.text(left / wide, (self.top - down) / high, text, va="top", **style)


def _draw_model(page: Page, result: Result, title: str) -> None:
    page.text(0, 0, title, fontsize=14, weight="bold")
    sheet = _sheet_inches(result)
    steps_down = _HEAD + _LABEL + sheet + 0.06
    fewer_down = steps_down + _MAP + 0.38
    branches = next(iter(result.cached.values()))[0].computed
    whole = np.ones((len(branches), result.steps))
    _draw_samples(page, 0, _HEAD, "unpatched", f"{result.steps} steps", result.unpatched)
    _draw_steps(page, 0, steps_down, whole)
    _draw_captions(page, fewer_down, result)
    for column, (name, runs) in enumerate(result.cached.items(), start=1):
        fewer = result.fewer[name]
        row, plain = result.row(runs), result.row(fewer)
        look = {True: {"weight": "bold", "color": INK}, False: {"color": FAINT}}
        _draw_samples(page, column, _HEAD, name, _numbers(row), runs, **look[row.psnr > plain.psnr])
        _draw_steps(page, column, steps_down, np.array(list(runs[0].computed.values()), dtype=float))
        label = f"same cost: simply {plain.steps:.0f} steps"
        _draw_samples(page, column, fewer_down, label, _numbers(plain), fewer, **look[plain.psnr > row.psnr])


def _numbers(row: Row) -> str:
    return f"{row.speedup:.1f}× faster,  {row.psnr:.1f} dB"


def _draw_samples(page: Page, column: int, down: float, name: str, numbers: str, runs: list[Run], **style: Any) -> None:
    page.text(column, down, name, fontsize=10.5, weight="bold")
    page.text(column, down + 0.24, numbers, **({"color": FAINT} | style))
    sheet = tiles(runs)
    axes = page.axes(column, down + _LABEL - 0.08, _COLUMN * sheet.shape[0] / sheet.shape[1])
    axes.imshow(sheet, interpolation="nearest", aspect="auto")
    axes.axis("off")


def _draw_steps(page: Page, column: int, down: float, computed: npt.NDArray[np.float64]) -> None:
    """A map with a row for each branch and a column for each step."""
    axes = page.axes(column, down, _MAP)
    colours = ListedColormap([SKIPPED, COMPUTED])
    axes.pcolormesh(computed[::-1], cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=0.35)
    axes.axis("off")
    done = computed.mean(axis=0).sum()
    page.text(column, down + _MAP + 0.03, f"{done:.0f} of {computed.shape[1]} steps computed", color=COMPUTED)


def _draw_captions(page: Page, down: float, result: Result) -> None:
    lines = [f"{index}.  {caption}" for index, caption in enumerate(_shown(result.captions, result), start=1)]
    page.text(0, down, "asked for, row by row", fontsize=10.5, weight="bold")
    page.text(0, down + 0.3, "\n".join(lines), linespacing=1.6)


def _sheet_inches(result: Result) -> float:
    height, width = tiles(result.unpatched).shape[:2]
    return _COLUMN * float(height / width)


def tiles(runs: list[Run]) -> npt.NDArray[np.float32]:
    """Samples as one picture `[H, W, 3]`: a clip is a row of frames, pictures are three in a row."""
    frames = np.concatenate([run.frames[0] for run in runs])[: _ACROSS * _MOST_ROWS]
    height, width = frames.shape[1:3]
    rows = -(-len(frames) // _ACROSS)
    sheet = np.ones((rows * (height + _GAP) - _GAP, _ACROSS * (width + _GAP) - _GAP, 3), dtype=np.float32)
    for index, frame in enumerate(frames):
        y, x = index // _ACROSS * (height + _GAP), index % _ACROSS * (width + _GAP)
        sheet[y : y + height, x : x + width] = frame
    return sheet


def _shown(captions: list[str], result: Result) -> list[str]:
    """The captions whose samples are drawn."""
    frames = result.unpatched[0].frames.shape[1]
    return captions[: _ACROSS * _MOST_ROWS // frames]
