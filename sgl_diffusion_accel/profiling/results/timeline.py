"""Draws the timeline of a pipeline call: its stages, every denoising step by its parts, what the cache did."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from sgl_diffusion_accel.profiling.recording import stages
from sgl_diffusion_accel.profiling.results.timings import CallReport, StepTiming
from sgl_diffusion_accel.reporting.figure_style import (
    BLUE,
    COMPUTED,
    FAINT,
    GREEN,
    GREY,
    GRID,
    INK,
    ORANGE,
    PURPLE,
    SKIPPED,
    SKY,
    VERMILION,
    YELLOW,
    new_figure,
    save,
    style,
)

_STAGE_COLOURS = {
    stages.PREPARE: YELLOW,
    stages.TEXT: ORANGE,
    stages.IMAGE: YELLOW,
    stages.ENCODE: PURPLE,
    stages.DENOISING: BLUE,
    stages.DECODE: GREEN,
    stages.FINISH: VERMILION,
}
_BRANCH_COLOURS = (BLUE, SKY, GREEN)
_PARTS = {"controlnet": PURPLE, "scheduler": VERMILION, "other": GREY}

# Inches.
_WIDTH, _LEFT, _RIGHT, _HEAD = 11.0, 0.85, 0.35, 1.0
_STAGES, _STEPS, _ROW, _GAP, _FOOT = 0.42, 2.7, 0.24, 0.75, 0.6


def draw(call: CallReport, path: Path) -> Path:
    """Draws one call.

    Args:
        call: The call.
        path: PNG to write; its folder is made if needed.

    Returns:
        The path.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    rows = _cache_rows(call)
    height = _HEAD + _STAGES + _GAP + (_STEPS + _FOOT if call.steps else 0) + (len(rows) * _ROW + 0.3 if rows else 0)
    figure = new_figure(_WIDTH, height)
    with style(font_size=9, axes_edgecolor=GRID, axes_labelcolor=FAINT, xtick_color=FAINT, ytick_color=FAINT):
        sheet = _Sheet(figure, height)
        _draw_title(sheet, call)
        _draw_stages(sheet, call)
        if call.steps:
            axes = _draw_steps(sheet, call, has_rows=bool(rows))
            if rows:
                _draw_cache(sheet, rows, axes)
        save(figure, path)
    return path


class _Sheet:
    """A figure that is filled from top to bottom, in inches."""

    def __init__(self, figure: Any, height: float) -> None:
        self.figure, self.height, self.down = figure, height, 0.0

    def axes(self, high: float, **more: Any) -> Any:
        """Axes as wide as the sheet, below what is there."""
        bottom = (self.height - self.down - high) / self.height
        self.down += high
        box = (_LEFT / _WIDTH, bottom, (_WIDTH - _LEFT - _RIGHT) / _WIDTH, high / self.height)
        made = self.figure.add_axes(box, **more)
        for side in ("top", "right", "left"):
            made.spines[side].set_visible(False)
        return made

    def text(self, across: float, text: str, **style: Any) -> None:
        """Text that hangs from where the sheet is filled to."""
        place = (across / _WIDTH, 1 - self.down / self.height)
        self.figure.text(*place, text, va="top", **style)


def _draw_title(sheet: _Sheet, call: CallReport) -> None:
    sheet.down = 0.2
    title = f"{call.pipeline}, {_time(call.total_ms)}" + ("" if call.is_complete else ", INCOMPLETE")
    sheet.text(_LEFT, title, fontsize=14, weight="bold")
    sheet.down += 0.32
    about = [call.device]
    skipped = [step for step in call.steps if step.computed is False]
    computed = [step for step in call.steps if step.computed is not False]
    for label, steps in (("computed", computed), ("skipped by the cache", skipped)):
        if steps:
            plain = [step.duration_ms for step in steps if not step.traced]
            typical = median(plain or [step.duration_ms for step in steps])
            about.append(f"{len(steps)} steps {label}, median {_time(typical)}")
    if call.profiler_ms:
        about.append(f"without {_time(call.profiler_ms)} in which the profiler started and stopped")
    sheet.text(_LEFT, "  ·  ".join(about), color=FAINT)
    sheet.down = _HEAD


def _draw_stages(sheet: _Sheet, call: CallReport) -> None:
    """One bar: the stages as long as they are, in the order in which they began."""
    axes = sheet.axes(_STAGES)
    left, handles = 0.0, []
    for name, duration, colour in _stage_parts(call):
        bars = axes.barh(0, duration, left=left, height=1, color=colour, edgecolor="white", linewidth=0.8)
        share = duration / call.total_ms if call.total_ms else 0.0
        label = f"{name} {_time(duration)}" + (f" ({share:.0%})" if share >= 0.01 else "")
        handles.append((bars, label))
        if share > 0.18:
            ink = "white" if colour in (BLUE, GREEN, VERMILION) else INK
            axes.text(left + duration / 2, 0, name, ha="center", va="center", color=ink, weight="bold")
        left += duration
    axes.set(xlim=(0, max(left, 1e-9)), ylim=(-0.5, 0.5), yticks=[], xticks=[])
    axes.spines["bottom"].set_visible(False)
    _legend(axes, handles, above=False)
    sheet.down += _GAP


def _stage_parts(call: CallReport) -> Iterator[tuple[str, float, str]]:
    spare = iter((SKY, YELLOW, PURPLE, VERMILION) * 4)
    for stage in call.stages:
        yield stage.name, stage.duration_ms, _STAGE_COLOURS.get(stage.name) or next(spare)
    yield "other", max(call.other_ms, 0.0), GREY


def _draw_steps(sheet: _Sheet, call: CallReport, has_rows: bool) -> Any:
    """A column for each step, as high as it is long, divided into its parts."""
    axes = sheet.axes(_STEPS)
    places = list(range(len(call.steps)))
    floor = [0.0] * len(places)
    handles = []
    for name, colour, values in _step_parts(call):
        bars = axes.bar(places, values, bottom=floor, color=colour, width=0.86, edgecolor="white", linewidth=0.4)
        floor = [low + value for low, value in zip(floor, values, strict=True)]
        handles.append((bars, name))
    traced = [place for place, step in enumerate(call.steps) if step.traced]
    if traced:
        marks = axes.scatter(
            traced, [floor[place] for place in traced], marker="v", s=22, color=INK, clip_on=False, zorder=3
        )
        marks.set_offsets([(place, floor[place] + max(floor) * 0.035) for place in traced])
        handles.append((marks, "traced, and so slower"))
    axes.set(xlim=(-0.7, len(places) - 0.3), ylim=(0, max(floor) * 1.1 or 1), ylabel="ms")
    axes.yaxis.grid(visible=True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    _label_steps(axes, call.steps, is_shown=not has_rows)
    _legend(axes, handles, above=True)
    return axes


def _step_parts(call: CallReport) -> Iterator[tuple[str, str, list[float]]]:
    for index, branch in enumerate(call.branches):
        values = [sum(each.duration_ms for each in step.branches if each.name == branch) for step in call.steps]
        name = "transformer" if len(call.branches) == 1 else f"transformer, {branch}"
        yield name, _BRANCH_COLOURS[index % len(_BRANCH_COLOURS)], values
    parts = {
        "controlnet": [step.control_ms for step in call.steps],
        "scheduler": [step.scheduler_ms for step in call.steps],
        "other": [max(step.other_ms, 0.0) for step in call.steps],
    }
    yield from ((name, _PARTS[name], values) for name, values in parts.items() if any(values))


def _label_steps(axes: Any, steps: tuple[StepTiming, ...], is_shown: bool) -> None:
    every = next(each for each in (1, 2, 5, 10, 20, 50, 100, 1000) if len(steps) / each <= 26)
    places = [place for place, step in enumerate(steps) if step.index % every == 0]
    axes.set_xticks(places, [str(steps[place].index) for place in places] if is_shown else [])
    if is_shown:
        axes.set_xlabel("denoising step")


def _cache_rows(call: CallReport) -> list[tuple[str, list[StepTiming]]]:
    """The branches on which a cache decided, each with all steps."""
    decided = {each.name for step in call.steps for each in step.branches if each.computed is not None}
    return [(name, list(call.steps)) for name in call.branches if name in decided]


def _draw_cache(sheet: _Sheet, rows: list[tuple[str, list[StepTiming]]], above: Any) -> None:
    """Below the columns, a row for each branch: dark where the step was computed, pale where it was skipped."""
    sheet.down += 0.12
    axes = sheet.axes(_ROW * len(rows))
    for down, (name, steps) in enumerate(rows):
        for place, step in enumerate(steps):
            done = [each.computed for each in step.branches if each.name == name and each.computed is not None]
            colour = "white" if not done else COMPUTED if any(done) else SKIPPED
            axes.barh(-down, 0.86, left=place - 0.43, height=0.8, color=colour)
    axes.set_yticks([-down for down in range(len(rows))], [name for name, _ in rows])
    axes.set(xlim=above.get_xlim(), ylim=(0.5 - len(rows), 0.5))
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    _label_steps(axes, tuple(rows[0][1]), is_shown=True)
    axes.set_xlabel("denoising step; in the rows dark: computed, pale: skipped by the cache")


def _legend(axes: Any, handles: list[tuple[Any, str]], above: bool) -> None:
    place = (
        {"loc": "lower left", "bbox_to_anchor": (-0.008, 1.0)}
        if above
        else {"loc": "upper left", "bbox_to_anchor": (-0.008, 0.0)}
    )
    axes.legend(
        [handle for handle, _ in handles],
        [label for _, label in handles],
        ncols=len(handles) if len(handles) <= 6 else 4,
        fontsize=8.5,
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=1.4,
        borderaxespad=0.3,
        **place,
    )


def _time(milliseconds: float) -> str:
    if milliseconds >= 10_000:
        return f"{milliseconds / 1000:,.1f} s"
    if milliseconds >= 100:
        return f"{milliseconds:,.0f} ms"
    return f"{milliseconds:.3g} ms" if milliseconds >= 1 else f"{milliseconds:.2f} ms"
