"""The table of `docs/auto.md`: what `benchmarks.auto` measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from sgl_diffusion_accel.reporting.tables import Strong, Table

from .costs import quartiles_cell
from .markers import insert
from .summary import SCHEDULERS
from .turns import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "auto.md"
QUALITIES = ("high", "balanced", "fast")
_SPARED = "; less than nothing, since the prompt's projection is made once a run"


def renewed(text: str) -> str:
    """The page with its table as the committed file has it."""
    return insert(text, measured(json.loads((RESULTS / "auto.json").read_text())), "measured")


def measured(result: Mapping[str, Any]) -> str:
    """The table, with a sentence on the runs that are left as they are."""
    head = ["model", "steps", *(f"`{quality}`" for quality in QUALITIES)]
    cells = list(_lines(result["rows"]))
    changed = {row["steps"] for row in result["rows"] if row["psnr"] is not None}
    same = sorted({row["steps"] for row in result["rows"]} - changed)
    compared = [row for row in result["rows"] if row["psnr"] is not None and row["fewer_psnr"] is not None]
    worse = [row for row in compared if row["psnr"] < row["fewer_psnr"]]
    host, environment = result["host"], result["environment"]
    return "\n".join(
        [
            Table(head, cells, words=(0, 1)).to_markdown(),
            "",
            "Times less computed, and dB against the unpatched run; in brackets the dB of as many plain steps, in bold "
            f"where they are better ({len(worse)} of {len(compared)}). The mean of {result['captions']} held-out "
            f"captions, float32, {environment['cpu']}. Runs of {' and '.join(map(str, same))} steps are computed in "
            f"full, bit by bit as without. What the patch itself adds to a step of {host['steps']}: "
            f"{quartiles_cell(host['ms']['cpu'], 2)} ms of CPU time, on a Wan transformer of real width whose blocks "
            f"do next to nothing{_SPARED if host['ms']['cpu']['median'] < 0 else ''}.",
        ]
    )


def _lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for (model, scheduler, steps), found in groupby(rows, lambda row: (row["model"], row["scheduler"], row["steps"])):
        cells = {row["quality"]: row for row in found}
        if any(row["psnr"] is not None for row in cells.values()):
            yield [f"{model}, {SCHEDULERS[scheduler]}", str(steps), *(_cell(cells[each]) for each in QUALITIES)]


def _cell(row: Mapping[str, Any]) -> Any:
    if row["psnr"] is None:
        return "the same"
    plain = "" if row["fewer_psnr"] is None else f" ({row['fewer_psnr']:.1f})"
    text = f"{1 / row['share']:.2f}x, {row['psnr']:.1f}{plain}"
    return Strong(text) if row["fewer_psnr"] is not None and row["psnr"] < row["fewer_psnr"] else text
