"""Makes the tables of README, `benchmarks/RESULTS.md` and `docs/gpu.md`, and the pictures, from committed JSON files.

python -m benchmarks.table
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sgl_diffusion_accel.comparing.measures.metrics import psnr_at

from . import pareto, summary
from .gpu import docs
from .gpu.page import kernel_table
from .markers import insert

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
_ABOUT = (
    "# Results\n\nMade by `make table` from the files in `results/`; how they are measured is told in "
    "[README.md](README.md). Bold: better than simply running fewer steps at the same cost."
)
_MODELS = ("wan", "qwen", "flux")
_USUAL_SIZE = [16, 16]
_HEAD = (
    "| | blocks computed | compute ratio | wall speed-up | PSNR (dB) | SSIM | fewer steps at that cost (dB) |\n"
    "|---|--:|--:|--:|--:|--:|--:|\n"
)


def main() -> None:
    """Writes all of them."""
    others = ("gpu_", *_QUESTIONS)
    paths = [path for path in sorted(RESULTS.glob("*.json")) if not path.stem.startswith(others)]
    results = [json.loads(path.read_text()) for path in paths]
    results.sort(key=lambda one: (_MODELS.index(one["model"]), one.get("scheduler", "euler"), -one["steps"]))
    parts = [_ABOUT, "## At a glance", summary.table(results)]
    for result in results:
        name, kind = name_of(result), summary.title(result)
        pareto.draw(result, RESULTS / f"pareto_{name}.png")
        pareto.draw(result, RESULTS / f"pareto_wall_{name}.png", "speedup")
        pictures = f"![PSNR over the compute ratio](results/pareto_{name}.png)\n"
        pictures += f"![PSNR over the speed-up in wall time](results/pareto_wall_{name}.png)"
        parts += [f"## {kind}", chapter(result), pictures]
    for stem, (heading, show) in _QUESTIONS.items():
        if (RESULTS / f"{stem}.json").exists():
            parts += [f"## {heading}", show(json.loads((RESULTS / f"{stem}.json").read_text()))]
    (ROOT / "benchmarks" / "RESULTS.md").write_text("\n\n".join(parts) + "\n")
    readme = ROOT / "README.md"
    if readme.exists():
        usual = [result for result in results if name_of(result) == result["model"]]
        text = insert(insert(readme.read_text(), summary.table(usual)), docs.in_short(), "gpu")
        if (RESULTS / "host_cost.json").exists():
            text = insert(text, host_line(json.loads((RESULTS / "host_cost.json").read_text())), "host cost")
        readme.write_text(text)
    docs.write()


def name_of(result: dict[str, Any]) -> str:
    """The name under which a result is kept: the model's, with what differs from 50 Euler steps."""
    setting = (result.get("scheduler", "euler"), result["steps"])
    height, width = result.get("size", _USUAL_SIZE)
    name = str(result["model"]) if setting == ("euler", 50) else f"{result['model']}_{setting[0]}_{setting[1]}"
    return name if [height, width] == _USUAL_SIZE else f"{name}_{height}x{width}"


def chapter(result: dict[str, Any]) -> str:
    """A heading, what was measured on what, and the table of one miniature.

    Args:
        result: One JSON file of `benchmarks.cache`.
    """
    packages = result["environment"]["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("diffusers", "cache-dit", "torch") if name in packages)
    about = (
        f"{result['pipeline']} miniature, {result['steps']} steps, guidance {result['guidance']:g}, "
        f"{len(result['captions'])} captions, {result['dtype']}, {versions}; {result['environment']['cpu']}, "
        f"{result['environment']['threads']} thread, {result['environment']['date']}."
    )
    if "note" in result:
        about += f" {result['note']}"
    about += "".join(_fit_line(fit) for fit in result.get("teacache_fits", []))
    about += _calibration_line(result.get("calibration", {}))
    rows = sorted(result["rows"], key=_order)
    return about + "\n\n" + _HEAD + "\n".join(line(row, result) for row in rows)


def overhead(result: dict[str, Any]) -> str:
    """What was measured by `benchmarks.overhead`, as a table: medians, and quartiles in brackets."""
    host = result["environment"]
    about = f"{result['model']}; {host['cpu']}, {host['threads']} thread, {host['date']}, {result['pairs']} pairs."
    lines = [about, "", "| | CPU time | wall time |", "|---|--:|--:|"]
    for name, row in result["rows"].items():
        cells = [
            f"{row[clock]['median']:.3f} ({row[clock]['lower_quartile']:.3f} to {row[clock]['upper_quartile']:.3f})"
            for clock in ("cpu", "wall")
        ]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def profiling(result: dict[str, Any]) -> str:
    """What was measured by `benchmarks.profiling`: the cost, and the shares that the reported parts have."""
    shares = "; ".join(f"{name}: {share:.1%}" for name, share in result["sums"].items())
    return f"{overhead(result)}\n\nWhat the report accounts for: {shares}."


def attention(result: dict[str, Any]) -> str:
    """What was measured by `benchmarks.attention`: the cost of redirecting, and the kernels if there was a GPU."""
    host = result["environment"]
    about = f"One call of one layer: {result['layer']}; {host['cpu']}, {host['date']}, {result['pairs']} pairs."
    lines = [about, "", "| layer | | median (quartiles) |", "|---|---|--:|"]
    for layer, rows in result["redirection"].items():
        for name, row in rows.items():
            spread = f"{row['median']:.0f} ({row['lower_quartile']:.0f} to {row['upper_quartile']:.0f})"
            lines.append(f"| {layer} | {name} | {spread} |")
    if "kernels" in result:
        lines += ["", f"On {host['gpu']}, bfloat16, matrix product {result['peak_tflops']:.0f} TFLOP/s:", ""]
        lines.append(kernel_table(result["kernels"]))
    return "\n".join(lines)


def host_cost(result: dict[str, Any]) -> str:
    """What was measured by `benchmarks.host_cost`: medians of CPU time, and quartiles in brackets."""
    host = result["environment"]
    versions = ", ".join(
        f"{name} {host['packages'][name]}" for name in ("diffusers", "cache-dit") if name in host["packages"]
    )
    about = (
        "CPU time of a skipped DBCache step with one block computed, blocks that do next to nothing, tiny tensors "
        f"({result['settings']}); {versions}; {host['cpu']}, {host['threads']} thread, {host['date']}, "
        f"{result['pairs']} rounds. Beside it what it takes more than a model of one block, for each block passed over."
    )
    lines = [about, "", "| pipeline | predictor | | a step, ms | a block, µs |", "|---|---|---|--:|--:|"]
    for row in result["rows"]:
        first = f"| {row['layout']} | {row['predictor']} |"
        lines.append(f"{first} one block alone | {_quartiles(row['bare']['cpu_ms'], 2)} | |")
        for name, side in row["sides"].items():
            lines.append(f"{first} {name} | {_quartiles(side['cpu_ms'], 2)} | {_quartiles(side['us_a_block'], 1)} |")
    return "\n".join(lines)


def host_line(result: dict[str, Any]) -> str:
    """The same in a sentence, for the README: reuse alone."""
    told = []
    for row in result["rows"]:
        if row["predictor"] == "reuse":
            sides = (f"{name} {side['us_a_block']['median']:.0f} µs" for name, side in row["sides"].items())
            told.append(f"{row['layout']}: {', '.join(sides)}")
    host = result["environment"]
    return (
        "The host's time for each block that a skipped DBCache step passes over (idle blocks, reuse; "
        f"{host['cpu']}, {host['date']}): {'; '.join(told)}."
    )


def _quartiles(row: dict[str, float], digits: int) -> str:
    median, low, high = (f"{row[key]:.{digits}f}" for key in ("median", "lower_quartile", "upper_quartile"))
    return f"{median} ({low} to {high})"


def line(row: dict[str, Any], result: dict[str, Any]) -> str:
    """One row of the table; the PSNR is bold where it beats fewer steps at the same cost."""
    quality = "equal" if row["exact"] else f"{row['psnr']:.1f}"
    plain = None if row["family"] in ("unpatched", "fewer steps") else fewer_steps_psnr(result, row["share"])
    if plain is not None and row["psnr"] is not None and row["psnr"] > plain:
        quality = f"**{quality}**"
    cells = (
        f"{row['family']}: {row['name']}",
        f"{row['share']:.0%}",
        f"{row['compute_ratio']:.2f}×",
        f"{row['speedup']:.2f}×",
        quality,
        f"{row['ssim']:.4f}",
        "" if plain is None else f"{plain:.1f}",
    )
    return "| " + " | ".join(cells) + " |"


def fewer_steps_psnr(result: dict[str, Any], share: float) -> float | None:
    """PSNR of an unpatched run with fewer steps at `share` of the cost, between the two measured next to it."""
    rows = sorted((row["share"], row["psnr"]) for row in result["rows"] if row["family"] == "fewer steps")
    return psnr_at(rows, share)


def _fit_line(fit: dict[str, Any]) -> str:
    signal = " with ret steps" if fit["use_ret_steps"] else ""
    return f" TeaCache's fit{signal}: R² {fit['r_squared']:.2f} for changes of {fit['low']:.3f} to {fit['high']:.3f}."


def _calibration_line(found: dict[str, Any]) -> str:
    if not found:
        return ""
    expected = ", ".join(f"{error:.2%} at {ratio}x" for ratio, error in found["expected_relative_error"].items())
    return (
        f" Plans: calibrated on {found['calls']} calls in {found['cpu_time_in_calls']:.2f} times the CPU time of these "
        f"calls alone; expected relative error of the latents {expected}."
    )


def _order(row: dict[str, Any]) -> tuple[int, float]:
    families = ("unpatched", "fewer steps", "sgl-diffusion-accel", "cache-dit", "diffusers")
    return families.index(row["family"]), row["compute_ratio"]


_QUESTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "overhead": ("The library's own cost", overhead),
    "host_cost": ("The host's part of a skipped step", host_cost),
    "attention": ("Attention", attention),
    "profiling": ("Profiling", profiling),
}
"""By the name of the file that answers it: the heading of a chapter, and what writes it."""


if __name__ == "__main__":
    main()
