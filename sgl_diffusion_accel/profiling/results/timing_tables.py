"""The tables of a profile: with rich where it is installed, in plain text elsewhere, as HTML in a notebook."""

from __future__ import annotations

import importlib.util
import io
import statistics
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from sgl_diffusion_accel.profiling.recording.memory import MemoryCheckpoint
from sgl_diffusion_accel.profiling.results.timings import CallReport, ProfileData, StepTiming
from sgl_diffusion_accel.reporting.tables import Table

_MOST_STEPS = 60
_WIDTH = 110
COMPUTED, SKIPPED, TRACED = "█", "·", "T"


def text(report: ProfileData) -> str:
    """The report as text."""
    if importlib.util.find_spec("rich") is None or not report.calls:
        tables = [f"\n{table.title}\n{table.to_text()}" for table in _tables(report)]
        foot = _foot(report)
        return "\n".join([*_head(report), *tables, *([""] if foot else []), *foot])
    from rich.console import Console

    sheet = io.StringIO()
    # In a notebook rich would show the table there, and write nothing.
    console = Console(file=sheet, width=_WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
    console.print(rich_group(report))
    return "\n".join(line.rstrip() for line in sheet.getvalue().splitlines())


def rich_group(report: ProfileData) -> Any:
    """The report for `rich.print`."""
    from rich.console import Group
    from rich.text import Text

    head = [Text(line, style="" if index else "bold") for index, line in enumerate(_head(report))]
    return Group(*head, *(table.to_rich() for table in _tables(report)), *map(Text, _foot(report)))


def html(report: ProfileData) -> str:
    """The report for a notebook."""
    head = "".join(f"<b>{escape(line)}</b><br>" for line in _head(report))
    tables = "".join(table.to_html() for table in _tables(report))
    return f"<div>{head}{tables}{'<br>'.join(map(escape, _foot(report)))}</div>"


def _head(report: ProfileData) -> list[str]:
    if not report.calls:
        return ["profile: nothing has been measured yet"]
    call = report.last
    title = f"{call.pipeline}: {call.total_ms:,.1f} ms on {call.device} ({call.clock})"
    lines = [title if call.is_complete else f"{title}, INCOMPLETE"]
    if len(report.calls) > 1:
        lines.append(f"the last of {len(report.calls)} calls")
    return lines


def _foot(report: ProfileData) -> list[str]:
    lines = [*report.remarks, *(report.last.remarks if report.calls else ())]
    if report.calls and report.last.traced_steps:
        lines.append(f"traced, and so slower than the others: steps {spans(report.last.traced_steps)}")
    return lines + [f"trace: {path}" for path in report.traces]


def _tables(report: ProfileData) -> Iterator[Table]:
    if not report.calls:
        return
    call = report.last
    yield Table(("stage", "ms", "share"), list(_stage_rows(call)), title="stages")
    if call.steps:
        yield Table(("", "steps", "median ms", "min", "max"), list(_summary(call)), title="denoising steps")
        yield _step_table(call)
    peaks = [each for each in call.memory if each.reserved_mb]
    if peaks:
        head = ("memory, MiB", "allocated", "reserved", "peak allocated", "peak reserved")
        yield Table(head, [(each.name, *map(_number, counts(each))) for each in peaks], title="memory")


def counts(checkpoint: MemoryCheckpoint) -> tuple[float, ...]:
    """A checkpoint's counts of the device's memory."""
    peaks = checkpoint.peak_allocated_mb, checkpoint.peak_reserved_mb
    return checkpoint.allocated_mb, checkpoint.reserved_mb, *peaks


def _stage_rows(call: CallReport) -> Iterator[tuple[str, str, str]]:
    parts = [(stage.name, stage.duration_ms) for stage in call.stages]
    parts += [("other", call.other_ms)]
    for name, duration in (*parts, ("total", call.total_ms)):
        yield name, _number(duration), f"{duration / call.total_ms:.1%}" if call.total_ms else "–"
    if call.profiler_ms:
        yield "profiler, starting and stopping", _number(call.profiler_ms), "not in it"


def _summary(call: CallReport) -> Iterator[tuple[str, ...]]:
    """The steps by kind: what a cache computed, what it skipped, what was traced."""
    names = {None: "", True: "computed", False: "skipped by the cache"}
    kinds: dict[str, list[float]] = {}
    for step in call.steps:
        words = (names[step.computed], "traced" if step.traced else "not traced" if call.traced_steps else "")
        kinds.setdefault(", ".join(filter(None, words)) or "all", []).append(step.duration_ms)
    for name, times in kinds.items():
        yield name, str(len(times)), *map(_number, (statistics.median(times), min(times), max(times)))


def _step_table(call: CallReport) -> Table:
    has_control = any(step.control_ms for step in call.steps)
    has_cache = any(step.computed is not None for step in call.steps)
    head = ["step", "timestep", "total", *call.branches, *(["controlnet"] if has_control else []), "scheduler", "other"]
    head += ["cache"] if has_cache else []
    words = (0, len(head) - 1) if has_cache else (0,)
    title = "every step, ms" if len(call.steps) <= _MOST_STEPS else f"the first {_MOST_STEPS} steps, ms"
    rows = [_step_row(step, call.branches, has_control, has_cache) for step in call.steps[:_MOST_STEPS]]
    return Table(head, rows, words, title)


def _step_row(step: StepTiming, branches: Sequence[str], has_control: bool, has_cache: bool) -> tuple[str, ...]:
    taken = {name: [each.duration_ms for each in step.branches if each.name == name] for name in branches}
    cells = [f"{step.index}{' ' + TRACED if step.traced else ''}", f"{step.timestep:g}", _number(step.duration_ms)]
    cells += [_number(sum(times)) if times else "–" for times in taken.values()]
    cells += [_number(step.control_ms)] if has_control else []
    cells += [_number(step.scheduler_ms), _number(step.other_ms)]
    return (*cells, decisions(step)) if has_cache else tuple(cells)


def decisions(step: StepTiming) -> str:
    """What the cache did in a step: one mark and reason for all branches if they agree."""
    told = {branch.name: (branch.computed, branch.reason) for branch in step.branches if branch.computed is not None}
    if len(set(told.values())) == 1:
        (computed, reason), *_ = told.values()
        return f"{COMPUTED if computed else SKIPPED} {reason}"
    return ", ".join(f"{name} {COMPUTED if done else SKIPPED} {why}" for name, (done, why) in told.items())


def spans(indices: Sequence[int]) -> str:
    """Numbers as ranges.

    Example:
        >>> spans([1, 2, 3, 7])
        '1–3, 7'
    """
    found: list[list[int]] = []
    for index in indices:
        if found and index == found[-1][1] + 1:
            found[-1][1] = index
        else:
            found.append([index, index])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in found)


def _number(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:,.2f}"
