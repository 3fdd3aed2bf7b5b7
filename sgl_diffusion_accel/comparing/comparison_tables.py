"""The table of a comparison, with what was measured above it and remarks below it."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping
from html import escape
from importlib.util import find_spec
from typing import Any

from sgl_diffusion_accel.comparing.comparison_data import ComparisonData, Row
from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.reporting.spread import Spread
from sgl_diffusion_accel.reporting.tables import Strong, Table

_LEGEND = "nearer to the unpatched output than simply fewer steps at the same cost"


def table(report: ComparisonData) -> Table:
    """The table; columns that nobody has a value for are left out."""
    columns = [(title, [of_unpatched(report), *map(read, report.rows)]) for title, of_unpatched, read in _COLUMNS]
    shown = [(title, column) for title, column in columns if any(column[1:])]
    return Table([title for title, _ in shown], list(zip(*(column for _, column in shown), strict=True)))


def decibel(value: float | None) -> str:
    """PSNR as it is shown."""
    if value is None:
        return ""
    return "equal" if value == math.inf else f"{value:.1f}" if math.isfinite(value) else str(value)


def about(report: ComparisonData) -> str:
    """What was measured on what, in one sentence."""
    host = report.environment
    packages = host.get("packages", {})
    parts = [
        report.about + (f", each {report.repeats} times" if report.repeats > 1 else ""),
        *(f"{name} {packages[name]}" for name in ("diffusers", "torch") if name in packages),
        host.get("gpu") or f"{host.get('cpu')}, {host.get('threads')} thread{'' if host.get('threads') == 1 else 's'}",
        str(host.get("date")),
    ]
    return f"{', '.join(parts)}. Measured on {report.measured_on}."


def markdown(report: ComparisonData) -> str:
    """In Markdown."""
    notes = [f"Speed-up: median, quartiles in brackets. **Bold**: {_LEGEND}.", *map(_sentence, report.remarks)]
    return "\n\n".join([about(report), table(report).to_markdown(), *notes]) + "\n"


def text(report: ComparisonData) -> str:
    """In plain text."""
    drawn = table(report)
    notes = [f"* {_LEGEND}"] if any(isinstance(cell, Strong) for row in drawn.rows for cell in row) else []
    notes += map(_sentence, report.remarks)
    return "\n".join([about(report), "", drawn.to_text(rule=True), "", *notes]).rstrip()


def html(report: ComparisonData, figures: Mapping[str, Callable[[], Any]]) -> str:
    """In HTML, and where matplotlib is installed the pictures.

    Args:
        report: What is shown.
        figures: Title of each picture to what draws it, or raises ConfigError where there is none of the kind.
    """
    notes = "<br>".join([f"<b>Bold</b>: {_LEGEND}.", *(escape(_sentence(remark)) for remark in report.remarks)])
    images = map(_image, figures, figures.values()) if find_spec("matplotlib") else ()
    return f"<div><p>{escape(about(report))}</p>{table(report).to_html()}<p>{notes}</p>{''.join(images)}</div>"


def _image(title: str, draw: Callable[[], Any]) -> str:
    buffer = io.BytesIO()
    try:
        draw().savefig(buffer, format="png", dpi=100)
    except ConfigError:
        return ""
    source = base64.b64encode(buffer.getvalue()).decode()
    return f"<p><img alt='{title}' style='max-width:100%' src='data:image/png;base64,{source}'></p>"


def _sentence(remark: str) -> str:
    return remark[:1].upper() + remark[1:] + ("" if remark.endswith((".", ")", "'", '"')) else ".")


def _speedup(spread: Spread, samples: int) -> str:
    return f"{spread.median:.2f}×" + (f" ({spread.low:.2f}–{spread.high:.2f})" if samples > 1 else "")


def _memory(mib: float | None) -> str:
    return "" if mib is None else f"{mib / 1024:.2f}" if mib >= 10 else f"{mib / 1024:.4f}"


def _psnr(row: Row) -> str:
    return Strong(decibel(row.psnr)) if row.beats_fewer_steps else decibel(row.psnr)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _reproduced(report: ComparisonData) -> str:
    again = report.unpatched.repeats_itself_db
    return "–" if again is None or again == math.inf else f"± {decibel(again)}"


def _always(shown: str) -> Callable[[ComparisonData], str]:
    return lambda _: shown


_COLUMNS: tuple[tuple[str, Callable[[ComparisonData], str], Callable[[Row], str]], ...] = (
    ("", _always("unpatched"), lambda row: f"fewer steps: {row.name}" if row.is_fewer_steps else row.name),
    ("compute ratio", _always("1.00×"), lambda row: _number(row.compute_ratio, ".2f") + "×" * bool(row.compute_ratio)),
    ("speed-up", _always("1.00×"), lambda row: _speedup(row.speedup_spread, len(row.samples))),
    ("seconds", lambda report: f"{report.unpatched.seconds.median:.3g}", lambda row: f"{row.seconds:.3g}"),
    (
        "peak memory (GiB)",
        lambda report: _memory(report.unpatched.peak_memory_mib),
        lambda row: _memory(row.peak_memory_mib),
    ),
    ("PSNR (dB)", _reproduced, _psnr),
    ("worst", _always(""), lambda row: decibel(row.psnr_worst) if len(row.samples) > 1 else ""),
    ("SSIM", _always(""), lambda row: _number(row.ssim, ".4f")),
    ("LPIPS", _always(""), lambda row: _number(row.lpips, ".3f")),
    ("sharpness", _always("1.00"), lambda row: _number(row.sharpness, ".2f")),
    ("motion", _always("1.00"), lambda row: _number(row.motion, ".2f")),
    ("fewer steps at that cost (dB)", _always(""), lambda row: decibel(row.fewer_steps_psnr)),
)
"""Title of each column, its cell for the unpatched pipeline, and for a row."""
