"""Shows what a cache did: a few lines of text, or a picture of the steps in a notebook."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

from sgl_diffusion_accel.caching.parts.stats import BranchStats, RunStats, Stats
from sgl_diffusion_accel.loop.session import several, unplaced_lines
from sgl_diffusion_accel.reporting.figure_style import COMPUTED, SKIPPED


def text(title: str, notice: str, stats: Stats) -> str:
    """Returns the summary that `print(patch)` shows; the notice tells why the patch does not act, if it does not."""
    lines = [f"{title} [{notice}]" if notice else title]
    if not stats.runs:
        lines.append("  no run yet")
    else:
        run = stats.runs[-1]
        lines.append(f"  run {stats.started}: {run.steps} steps, {run.compute_share:.0%} of the blocks computed")
        lines += [f"  {name:>8} {_marks(branch)} {_count(branch)}" for name, branch in run.branches.items()]
        lines += [f"  {remark}" for remark in _remarks(run)]
    lines += [f"  {remark}" for remark in unplaced_lines(stats)]
    return "\n".join(lines)


def line(title: str, components: Sequence[str], notice: str, stats: Stats) -> str:
    """Returns the one line of `repr(patch)`."""
    parts = [f"{title} on {' and '.join(components)}", notice or "active"]
    if stats.runs:
        parts.append(
            f"{several(stats.started, 'run')}, the last with {stats.runs[-1].compute_share:.0%} of the blocks computed"
        )
    if stats.outside:
        parts.append(f"{several(stats.outside, 'call')} not placed in a loop and computed in full: see print(patch)")
    return f"<{'; '.join(parts)}>"


def html(title: str, notice: str, stats: Stats) -> str:
    """Returns the picture that a notebook shows: one row a branch, dark where the step was computed."""
    head = f"<b>{escape(title)}</b>{f' ({escape(notice)})' if notice else ''}"
    if not stats.runs:
        return f"<div>{'<br>'.join([head, 'no run yet', *map(escape, unplaced_lines(stats))])}</div>"
    run = stats.runs[-1]
    rows = "".join(_row(name, branch) for name, branch in run.branches.items())
    remarks = "".join(f"<br>{escape(remark)}" for remark in _remarks(run) + unplaced_lines(stats))
    return (
        f"<div>{head}<br>{run.steps} steps, {run.compute_share:.0%} of the blocks computed"
        f"<table style='border-collapse:collapse'>{rows}</table>{remarks}</div>"
    )


def _remarks(run: RunStats) -> list[str]:
    """What the user should know about a run; of one that skipped nothing, why not, if nothing else says it."""
    if run.remarks:
        return [f"{component}: {remark}" for component, remark in run.remarks]
    records = [record for branch in run.branches.values() for record in branch.records]
    if not records or not all(record.computed for record in records):
        return []
    reason, count = Counter(record.reason for record in records).most_common(1)[0]
    return [f"nothing was skipped, in {count} of {several(len(records), 'call')} because of: {reason}"]


def _marks(branch: BranchStats) -> str:
    return "".join("█" if computed else "·" for computed in branch.computed)


def _count(branch: BranchStats) -> str:
    return f"{sum(branch.computed)} of {len(branch.computed)} computed"


def _row(name: str, branch: BranchStats) -> str:
    cells = "".join(
        f"<td title='step {record.step}: {escape(record.reason)}' style='width:9px;height:14px;padding:0;"
        f"border:1px solid white;background:{COMPUTED if record.computed else SKIPPED}'></td>"
        for record in branch.records
    )
    label, count = f"<td style='padding-right:8px'>{escape(name)}</td>", _count(branch)
    return f"<tr>{label}{cells}<td style='padding-left:8px'>{count}</td></tr>"
