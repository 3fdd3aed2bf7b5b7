"""Makes what `docs/gpu.md` shows from the committed files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.markers import insert
from sgl_diffusion_accel.reporting.tables import Table

from .page import WHOLE, cell, environment, glance, heading, never_skipping, tables

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "gpu.md"
_EQUAL_DB = 99.0  # what the checks write for outputs that are equal


def write() -> None:
    """Renews the page."""
    PAGE.write_text(renewed(PAGE.read_text()))


def renewed(text: str) -> str:
    """The page with its tables made anew."""
    return insert(text, chapters(), "gpu")


def chapters() -> str:
    """One chapter for each file of results, the newest first, with a table of the whole at its head."""
    shown = []
    for path in sorted(RESULTS.glob("gpu_*.json"), key=_newest_first):
        result = json.loads(path.read_text())
        if "checks" in result:
            told = f"Done on {environment(result['environment'])}."
            shown += [f"## Checks: {heading([result])}", told, checks(result["checks"])]
        else:
            shown += [f"## {heading(result['parts'].values())}", glance(result), tables(result)]
    return "\n\n".join(shown)


def in_short() -> str:
    """The newest measurement of all models at full depth, in short for the README."""
    results = (json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu_*.json"), key=_newest_first))
    newest = next(each for each in results if all(name in each.get("parts", {}) for name in WHOLE))
    told = []
    for name in WHOLE:
        title, rows = newest["parts"][name]["about"]["title"], newest["parts"][name]["rows"]
        computed, skipped = rows["unpatched"]["computed_device_ms"], rows["adaptive"]["skipped_device_ms"]
        told.append(f"- {title}: {skipped:.1f} ms instead of {computed:,.0f} ms")
    on = environment(newest["parts"][WHOLE[0]]["environment"])
    shown = "\n".join(told)
    return f"What a denoising step takes that the adaptive cache skips:\n\n{shown}\n\n{never_skipping(newest)}\n({on}.)"


def _newest_first(path: Path) -> tuple[int, bool, str]:
    result = json.loads(path.read_text())
    found = [result] if "checks" in result else list(result["parts"].values())
    day = max(each["environment"]["date"] for each in found)
    return -int(day.replace("-", "")), "checks" in result, path.name


def checks(found: Mapping[str, Any]) -> str:
    """Whether results are right: caches under each kind of compilation beside eager, offloading, waits, attention."""
    return "\n\n".join((_compiled(found), _others(found), _attention(found)))


def _compiled(found: Mapping[str, Any]) -> str:
    rows = []
    for name, check in found.items():
        if not name.startswith("compile"):
            continue
        kind, model = name.removeprefix("compile ").rsplit(" ", 1)
        eager = found[f"eager {model}"]["value"]
        for cache in ("adaptive", "mask"):
            if cache in check["value"]:
                row = check["value"][cache]
                same = "equal" if row["again"] == _EQUAL_DB else f"{row['again']:.1f} dB"
                first, later = row["graphs"]
                quality = (f"{eager[cache][0]:.1f}", f"{row['psnr']:.1f}", same)
                rows.append((_KINDS[kind], model, cache, *quality, str(first), str(later - first)))
    head = ("compiled", "model", "cache", "eager", "compiled", "second run", "graphs", "graphs later")
    about = "PSNR (dB) of cached runs of the miniatures against the uncached output, 30 steps, compiled beside eager:"
    return f"{about}\n\n{Table(head, rows, words=(0, 1, 2, 5)).to_markdown()}"


_KINDS = {
    "repeated before": "`compile_repeated_blocks`, then the cache",
    "repeated after": "the cache, then `compile_repeated_blocks`",
    "whole": "`transformer.compile()`",
    "reduce-overhead whole": '`transformer.compile(mode="reduce-overhead")`',
}


def _others(found: Mapping[str, Any]) -> str:
    offload = found["offload model"]["value"]
    differing = [name for name, psnr in offload.items() if psnr != _EQUAL_DB]
    waits = found["no sync: adaptive, plan-like mask"]["value"]
    told = (
        f"{model}: {waits[f'{model} None']} uncached, "
        + ", ".join(f"{waits[f'{model} {cache}']} {title}" for cache, title in _WAITING.items())
        for model in ("flux", "wan")
    )
    return (
        f"- Model offload, {len(offload)} runs with and without caches: "
        f"{'equal to those without offload' if not differing else 'not equal: ' + ', '.join(differing)}.\n"
        f"- Waits for the device in a run of 30 steps: {'; '.join(told)}."
    )


_WAITING = {"adaptive": "adaptive", "dbcache": "DBCache", "mask": "static mask"}


def _attention(found: Mapping[str, Any]) -> str:
    rows, failed = [], []
    for name, check in found.items():
        backend = name.removeprefix("attention ")
        if not name.startswith("attention ") or backend in ("backends table", "auto"):
            continue
        if not check["ok"]:
            failed.append(f"- `{backend}`: {cell(check['error'])}")
            continue
        values = (check["value"][model][0] for model in ("flux", "wan"))
        rows.append((backend, *("equal" if value == _EQUAL_DB else f"{value:.1f}" for value in values)))
    about = "Attention backends on tiny models (2 heads of size 64), PSNR (dB) against the model's own attention:"
    return "\n".join([about, "", Table(("backend", "flux", "wan"), rows).to_markdown(), "", *failed])
