"""Two files of timings side by side, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from sgl_diffusion_accel.profiling.results.perf_json import Perf, read_perf
from sgl_diffusion_accel.reporting.tables import Table

_MEMORY = {
    "peak_allocated_mb": "peak memory allocated, MiB",
    "peak_reserved_mb": "peak memory reserved, MiB",
    "peak_host_anon_mb": "peak host memory, MiB",
}
_SIMILAR = 0.02

Row = tuple[str, float | None, float | None]


def perf_diff(first: str | Path, second: str | Path) -> str:
    """Compares two files that `Profile.save_perf` or SGLang-Diffusion's `--perf-dump-path` has written.

    Args:
        first: What is compared with.
        second: What is compared.

    Returns:
        A Markdown table: total, stages, denoising steps, memory. A change is relative to the first file.

    Raises:
        ConfigError: A file cannot be read, or is none of these.
    """
    before, after = read_perf(first), read_perf(second)
    lines = [
        f"### {Path(second).name} against {Path(first).name}",
        "",
        _verdict(before.total_ms, after.total_ms),
        "",
        Table(("", "before", "after", "difference", "change"), list(map(_cells, _rows(before, after)))).to_markdown(),
        "",
        f"before: {_about(before)}; after: {_about(after)}",
    ]
    return "\n".join(lines)


def _verdict(before: float, after: float) -> str:
    if before <= 0 or after <= 0:
        return "One of the totals is 0: there is no ratio."
    if abs(after / before - 1) <= _SIMILAR:
        return f"**About the same** ({_percent(before, after)})."
    return f"**{before / after:.2f}× faster**." if after < before else f"**{after / before:.2f}× slower**."


def _rows(before: Perf, after: Perf) -> Iterator[Row]:
    yield "**total**, ms", before.total_ms, after.total_ms
    for name in dict.fromkeys((*before.stages, *after.stages)):
        yield f"{name}, ms", before.stages.get(name), after.stages.get(name)
    counts = len(before.denoise_steps_ms), len(after.denoise_steps_ms)
    if any(counts):
        yield "denoising steps", float(counts[0]), float(counts[1])
        yield "mean step, ms", _of(statistics.fmean, before), _of(statistics.fmean, after)
        yield "median step, ms", _of(statistics.median, before), _of(statistics.median, after)
    for name, label in _MEMORY.items():
        peaks = before.peak(name), after.peak(name)
        if any(peaks):
            yield label, *peaks


def _of(take: Callable[[tuple[float, ...]], float], perf: Perf) -> float | None:
    return take(perf.denoise_steps_ms) if perf.denoise_steps_ms else None


def _cells(row: Row) -> tuple[str, ...]:
    name, before, after = row
    shown = (name, _number(before), _number(after))
    if before is None or after is None:
        return (*shown, "–", "–")
    return (*shown, f"{after - before:+,.2f}", _percent(before, after))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value.is_integer() else f"{value:,.2f}"


def _percent(before: float, after: float) -> str:
    return "–" if before == 0 else f"{after / before - 1:+.1%}"


def _about(perf: Perf) -> str:
    told = [str(perf.about[key]) for key in ("tag", "timestamp") if perf.about.get(key)]
    commit = perf.about.get("commit_hash")
    return ", ".join(told + ([f"commit {str(commit)[:10]}"] if commit and commit != "N/A" else [])) or "nothing told"
