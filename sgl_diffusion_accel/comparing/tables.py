"""The tables of a comparison: Markdown, plain text and HTML, all from the same cells."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING

from sgl_diffusion_accel.errors import ConfigError

if TYPE_CHECKING:
    from sgl_diffusion_accel.comparing.report import ComparisonReport, Row, Spread

_LEGEND = "nearer to the unpatched output than simply fewer steps at the same cost"


@dataclass(frozen=True)
class Cell:
    """One cell; `strong` where it beats fewer steps."""

    text: str
    strong: bool = False


Table = tuple[list[str], list[list[Cell]]]
"""Titles of the columns, and rows of cells; the first column is the name."""


def cells(report: ComparisonReport) -> Table:
    """The table; columns that nobody has a value for are left out."""
    columns = [(title, [Cell(of_unpatched(report)), *map(read, report.rows)]) for title, of_unpatched, read in _COLUMNS]
    shown = [(title, column) for title, column in columns if any(cell.text for cell in column[1:])]
    titles = [title for title, _ in shown]
    return titles, [list(row) for row in zip(*(column for _, column in shown), strict=True)]


def decibel(value: float | None) -> str:
    """PSNR as it is shown."""
    if value is None:
        return ""
    return "equal" if value == math.inf else f"{value:.1f}" if math.isfinite(value) else str(value)


def about(report: ComparisonReport) -> str:
    """What was measured on what, in one sentence."""
    host = report.environment
    steps = sorted({each for each in report.steps if each is not None})
    packages = host.get("packages", {})
    versions = [f"{name} {packages[name]}" for name in ("diffusers", "torch") if name in packages]
    parts = [
        report.pipeline,
        *([f"{' and '.join(map(str, steps))} steps"] if steps else []),
        f"{len(report.calls)} call{'' if len(report.calls) == 1 else 's'}"
        + (f", each {report.repeats} times" if report.repeats > 1 else ""),
        *versions,
        host.get("gpu") or f"{host.get('cpu')}, {host.get('threads')} thread{'' if host.get('threads') == 1 else 's'}",
        str(host.get("date")),
    ]
    return f"{', '.join(parts)}. Measured on {report.measured_on}."


def markdown(report: ComparisonReport) -> str:
    """A table in Markdown, with what was measured above and remarks below it."""
    titles, rows = cells(report)
    lines = [about(report), "", "| " + " | ".join(titles) + " |", "|---" + "|--:" * (len(titles) - 1) + "|"]
    for row in rows:
        shown = [f"**{cell.text}**" if cell.strong else cell.text.replace("|", "\\|") for cell in row]
        lines.append("| " + " | ".join(shown) + " |")
    lines += ["", f"Speed-up: median, quartiles in brackets. **Bold**: {_LEGEND}."]
    lines += [f"\n{_sentence(remark)}" for remark in report.remarks]
    return "\n".join(lines) + "\n"


def text(report: ComparisonReport) -> str:
    """A table in plain text."""
    titles, rows = cells(report)
    lines = [titles] + [[f"*{cell.text}" if cell.strong else cell.text for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    shown = []
    for line in lines:
        first, *others = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        shown.append("  ".join((first, *others)).rstrip())
    shown.insert(1, "─" * (sum(widths) + 2 * (len(widths) - 1)))
    notes = [f"* {_LEGEND}"] if any(cell.strong for row in rows for cell in row) else []
    return "\n".join([about(report), "", *shown, "", *notes, *map(_sentence, report.remarks)]).rstrip()


def html(report: ComparisonReport) -> str:
    """The table, and where matplotlib is installed the pictures."""
    titles, rows = cells(report)
    style = "text-align:right;padding:2px 8px"
    head = "".join(f"<th style='{style}'>{escape(title)}</th>" for title in titles)
    body = ""
    for row in rows:
        shown = (f"<b>{escape(cell.text)}</b>" if cell.strong else escape(cell.text) for cell in row)
        aligned = (f"<td style='{style if i else 'text-align:left'}'>{cell}</td>" for i, cell in enumerate(shown))
        body += f"<tr>{''.join(aligned)}</tr>"
    notes = "<br>".join([f"<b>Bold</b>: {_LEGEND}.", *(escape(_sentence(remark)) for remark in report.remarks)])
    return (
        f"<div><p>{escape(about(report))}</p><table style='border-collapse:collapse'><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table><p>{notes}</p>{_images(report)}</div>"
    )


def _images(report: ComparisonReport) -> str:
    if find_spec("matplotlib") is None:
        return ""
    found = ""
    for name, draw in (
        ("Quality over cost", report.plot),
        ("Steps", report.plot_steps),
        ("Pictures", report.plot_pictures),
    ):
        buffer = io.BytesIO()
        try:
            draw().savefig(buffer, format="png", dpi=100)
        except ConfigError:  # there is none of the kind
            continue
        source = base64.b64encode(buffer.getvalue()).decode()
        found += f"<p><img alt='{name}' style='max-width:100%' src='data:image/png;base64,{source}'></p>"
    return found


def _sentence(remark: str) -> str:
    return remark[:1].upper() + remark[1:] + ("" if remark.endswith((".", ")", "'", '"')) else ".")


def _name(row: Row) -> str:
    """On one line, else it would break the table."""
    return f"fewer steps: {row.name}" if row.is_fewer_steps else " ".join(row.name.split())


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×"


def _speedup(spread: Spread, samples: int) -> str:
    return f"{spread.median:.2f}×" + (f" ({spread.low:.2f}–{spread.high:.2f})" if samples > 1 else "")


def _memory(mib: float | None) -> str:
    return "" if mib is None else f"{mib / 1024:.2f}" if mib >= 10 else f"{mib / 1024:.4f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _reproduced(report: ComparisonReport) -> str:
    again = report.unpatched.repeats_itself_db
    return "–" if again is None or again == math.inf else f"± {decibel(again)}"


_COLUMNS: tuple[tuple[str, Callable[[ComparisonReport], str], Callable[[Row], Cell]], ...] = (
    ("", lambda _: "unpatched", lambda row: Cell(_name(row))),
    ("compute ratio", lambda _: "1.00×", lambda row: Cell(_times(row.compute_ratio))),
    (
        "speed-up",
        lambda _: "1.00×",
        lambda row: Cell(_speedup(row.speedup_spread, len(row.samples))),
    ),
    ("seconds", lambda report: f"{report.unpatched.seconds.median:.3g}", lambda row: Cell(f"{row.seconds:.3g}")),
    (
        "peak memory (GiB)",
        lambda report: _memory(report.unpatched.peak_memory_mib),
        lambda row: Cell(_memory(row.peak_memory_mib)),
    ),
    ("PSNR (dB)", _reproduced, lambda row: Cell(decibel(row.psnr), row.beats_fewer_steps)),
    (
        "worst",
        lambda _: "",
        lambda row: Cell(decibel(row.psnr_worst) if len(row.samples) > 1 else ""),
    ),
    ("SSIM", lambda _: "", lambda row: Cell(_number(row.ssim, ".4f"))),
    ("LPIPS", lambda _: "", lambda row: Cell(_number(row.lpips, ".3f"))),
    ("sharpness", lambda _: "1.00", lambda row: Cell(_number(row.sharpness, ".2f"))),
    ("motion", lambda _: "1.00", lambda row: Cell(_number(row.motion, ".2f"))),
    ("fewer steps at that cost (dB)", lambda _: "", lambda row: Cell(decibel(row.fewer_steps_psnr))),
)
