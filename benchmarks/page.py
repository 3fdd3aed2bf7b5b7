"""The page `RESULTS.md`: what the committed files say; `python -m benchmarks.table --all` prints every row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import costs, lossless, summary
from .rows import chapter, measured_on

RESULTS = Path(__file__).parent / "results"

_ABOUT = """# Results

Made by `make table` from the JSON files in [results/](results/), which hold every row with its samples; `python -m benchmarks.table --all` prints all rows. How it is measured: [README.md](README.md).

- Small trained models of the real classes ([miniatures](../miniatures/README.md)), float32 on a CPU, on captions and noise that neither calibration nor fits have seen. The emoji model is as rough as large models are; the others are smoother, and every cache looks better on them.
- **Compute ratio**: work of the unpatched run over work done, in the linear layers of the blocks. **PSNR**: against the unpatched run of the same caption and noise, on floats in [0, 1], mean over the captions.
- Each cell is the **best of all settings of its row that compute as little** (up to 3 % more). For peers ({peers}) that is the best of their sweep, picked afterwards.
- *In italics*: worse than simply fewer steps at that cost. A dash: no setting computes as little."""  # noqa: E501

_PACKAGES = "cache-dit, and diffusers' FirstBlockCache, MagCache, TaylorSeer and, on Wan, SeaCache"

_OTHERS = (
    "The last column is a plan made from a single caption at 50 Euler steps and 16×16 pixels, used elsewhere. All plans"
    " are made from single pictures, also those that run in batches. The links lead to pictures of every setting. Runs "
    "of 20 steps are left out of the second table, since nothing below 8 steps was measured to compare with."
)


def load() -> list[dict[str, Any]]:
    """The committed results of `benchmarks.cache`, in the order in which they are shown."""
    others = ("auto", "gpu_", "mutants", *_QUESTIONS)
    paths = [path for path in RESULTS.glob("*.json") if not path.stem.startswith(others)]
    return sorted((json.loads(path.read_text()) for path in paths), key=summary.order)


def text(results: Sequence[Mapping[str, Any]]) -> str:
    """The page.

    Args:
        results: JSON files of `benchmarks.cache`.
    """
    usual = [result for result in results if summary.is_usual(result)]
    parts = [_ABOUT.format(peers=_peers(results)), *(_model(result) for result in usual)]
    others = [result for result in results if not summary.is_usual(result)]
    if others:
        parts += ["## Other schedulers, steps, sizes and batches", _OTHERS]
        parts += [summary.at_some_costs(others, ratios) for ratios in ((2.0,), (2.8, 3.8))]
    parts += [_calibrated(results), *_answers()]
    return "\n\n".join(part for part in parts if part) + "\n"


def every_row(results: Sequence[Mapping[str, Any]]) -> str:
    """All rows of all results."""
    return "\n\n".join(f"## {summary.title(result)}\n\n{chapter(result)}" for result in results)


def _peers(results: Sequence[Mapping[str, Any]]) -> str:
    """Whose caches were measured."""
    families = {row["family"] for result in results for row in result["rows"] if summary.is_peer(row)}
    papers = sorted(families - {"cache-dit", "diffusers"})
    return f"{_PACKAGES}; written from their papers: {', '.join(papers)}" if papers else _PACKAGES


def _model(result: Mapping[str, Any]) -> str:
    peers = sum(map(summary.is_peer, result["rows"]))
    about = (
        f"{len(result['captions'])} captions, guidance {result['guidance']:g}, {len(result['rows'])} settings, {peers} "
        f"of them peers'; {measured_on(result['environment'])}. "
        f"[Picture](results/pareto_{summary.name_of(result)}.png), [JSON](results/{summary.name_of(result)}.json)."
    )
    if "note" in result:
        about += f" {result['note']}"
    return f"## {summary.title(result)}\n\n{about}\n\n{summary.at_costs(result)}"


def _calibrated(results: Sequence[Mapping[str, Any]]) -> str:
    """What calibration and fits cost and found."""
    found = [result for result in results if result.get("calibration")]
    fits = [fit["r_squared"] for result in results for fit in result.get("teacache_fits", [])]
    if not (found and fits):
        return ""
    times = [result["calibration"]["cpu_time_in_calls"] for result in found]
    ratios = list(found[0]["calibration"]["expected_relative_error"])
    lines = [
        f"| expected error of the latents at | {' | '.join(f'{ratio}×' for ratio in ratios)} |",
        "|---|" + "--:|" * len(ratios),
    ]
    for result in filter(summary.is_usual, found):
        errors = result["calibration"]["expected_relative_error"]
        title = summary.short_title(result).partition(";")[0]
        lines.append(f"| {title} | {' | '.join(f'{errors[ratio]:.2%}' for ratio in ratios)} |")
    return "\n".join(
        [
            "## Calibration and fits",
            "",
            f"Calibration took {min(times):.2f} to {max(times):.2f} times the CPU time of its calls alone. TeaCache's "
            f"fits: R² of {min(fits):.2f} to {max(fits):.2f}.{_tuning(found)}",
            "",
            *lines,
        ]
    )


def _tuning(found: Sequence[Mapping[str, Any]]) -> str:
    """What trying designs cost."""
    tuned = [result["calibration"] for result in found if "tuning_gains" in result["calibration"]]
    if not tuned:
        return ""
    took = [each["tuning_cpu_time_in_calls"] / len(each["tuning_gains"]) for each in tuned]
    return f" Tuning took the CPU time of {min(took):.1f} to {max(took):.1f} calls for each speed-up."


_QUESTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "overhead": ("The library's own cost", costs.overhead),
    "host_cost": ("Host time of a skipped step", costs.host_cost),
    "attention": ("Attention: the cost of redirecting", costs.attention),
    "padding": ("Padding", lossless.padding),
    "constants": ("Keys and values of the text", lossless.constants_in_full),
    "profiling": ("The cost of profiling", costs.profiling),
}
"""By the name of the file that answers it: the heading of a chapter, and what writes it."""


def _answers() -> Iterator[str]:
    for stem, (heading, show) in _QUESTIONS.items():
        path = RESULTS / f"{stem}.json"
        if path.exists():
            yield f"## {heading}\n\n{show(json.loads(path.read_text()))}"
