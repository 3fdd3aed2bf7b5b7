"""The demo's table."""

from __future__ import annotations

from rich import box
from rich.table import Table

from miniatures.checker import accuracy, read
from miniatures.specs import DRAWN, spec_of

from .demo_results import Result, Run


def table(result: Result, title: str) -> Table:
    """One row for each setting, followed by the one that costs the same with fewer steps and no cache."""
    drawn = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    drawn.add_column("setting", min_width=24)
    for column in ("speed-up", "blocks", "steps", "PSNR (dB)", "SSIM", "as asked"):
        drawn.add_column(column, justify="right")
    asked = _as_asked(result, result.unpatched)
    drawn.add_row("unpatched", "1.00×", "100 %", str(result.steps), "–", "–", asked, end_section=True)
    for name in result.cached:
        better = result.row(result.cached[name]).psnr >= result.row(result.fewer[name]).psnr
        drawn.add_row(*_cells(result, name, result.cached[name], "bold" if better else ""))
        label = "[dim]  simply fewer steps[/dim]"
        drawn.add_row(*_cells(result, label, result.fewer[name], "" if better else "bold"), end_section=True)
    return drawn


def _cells(result: Result, name: str, runs: list[Run], style: str) -> list[str]:
    row = result.row(runs)
    quality = [f"{row.psnr:.1f}", f"{row.ssim:.4f}"]
    if style:
        quality = [f"[{style}]{cell}[/{style}]" for cell in quality]
    return [name, f"{row.speedup:.2f}×", f"{row.share:.0%}", f"{row.steps:.3g}", *quality, _as_asked(result, runs)]


def _as_asked(result: Result, runs: list[Run]) -> str:
    """How many samples show all four words of their caption, as a rule-based checker sees them; a dash for emoji."""
    if result.model not in DRAWN:
        return "–"
    world = spec_of(result.model).drawn
    seen = [read(world, run.frames)[0] for run in runs]
    return f"{accuracy(world, result.captions, seen)['all'] * len(runs):.0f} of {len(runs)}"
