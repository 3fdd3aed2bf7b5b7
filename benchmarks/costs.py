"""Tables of what the library itself costs: on a computed and a skipped step, for attention, for a profile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .gpu.page import kernel_table


def overhead(result: Mapping[str, Any]) -> str:
    """What was measured by `benchmarks.overhead` or `benchmarks.profiling`: medians, and quartiles in brackets."""
    host = result["environment"]
    about = f"{result['model']}; {host['cpu']}, {host['threads']} thread, {host['date']}, {result['pairs']} pairs."
    rows = dict(result["rows"])
    rest = rows.pop(_UNSKIPPABLE, None)  # what others are relative to
    if rest is not None:
        about += f" {_UNSKIPPABLE.capitalize()}: {quartiles_cell(rest['cpu'], 0)}."
    lines = [about, "", "| | CPU time | wall time |", "|---|--:|--:|"]
    lines += [
        f"| {name} | {quartiles_cell(row['cpu'], 3)} | {quartiles_cell(row['wall'], 3)} |" for name, row in rows.items()
    ]
    return "\n".join(lines)


_UNSKIPPABLE = "unskippable parts of a step, ms"


def profiling(result: Mapping[str, Any]) -> str:
    """What was measured by `benchmarks.profiling`: the cost, and the shares that the reported parts have."""
    shares = "; ".join(f"{name}: {share:.1%}" for name, share in result["sums"].items())
    about, _, table = overhead(result).partition("\n")
    return f"{about} What the report accounts for: {shares}.\n{table}"


def attention(result: Mapping[str, Any]) -> str:
    """What was measured by `benchmarks.attention`: the cost of redirecting, and the kernels if there was a GPU."""
    host = result["environment"]
    about = f"One call of one layer: {result['layer']}; {host['cpu']}, {host['date']}, {result['pairs']} pairs."
    for layer, rows in result["redirection"].items():
        cells = (f"{name}: {quartiles_cell(row, 0)}" for name, row in rows.items())
        about += f" {layer[:1].upper()}{layer[1:]}: {'; '.join(cells)}."
    lines = [about]
    if "kernels" in result:
        lines += ["", f"On {host['gpu']}, bfloat16, matrix product {result['peak_tflops']:.0f} TFLOP/s:", ""]
        lines.append(kernel_table(result["kernels"]))
    return "\n".join(lines)


def host_cost(result: Mapping[str, Any]) -> str:
    """What was measured by `benchmarks.host_cost`: medians of CPU time, and quartiles in brackets."""
    host = result["environment"]
    versions = [f"{name} {host['packages'][name]}" for name in ("diffusers", "cache-dit") if name in host["packages"]]
    about = (
        "CPU time of a skipped DBCache step with one block computed, blocks that do next to nothing, tiny tensors "
        f"({result['settings']}); {', '.join(versions)}; {host['cpu']}, {host['threads']} thread, {host['date']}, "
        f"{result['pairs']} rounds. A block: what a step takes "
        "more than that of a model of one block, for each skipped block."
    )
    sides = list(result["rows"][0]["sides"])
    columns = [f"{name}, {unit}" for name in sides for unit in ("ms a step", "µs a block")]
    lines = [about, "", f"| pipeline, predictor | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    for row in result["rows"]:
        found = (row["sides"][name] for name in sides)
        cells = [f"{quartiles_cell(side['cpu_ms'], 2)} | {quartiles_cell(side['us_a_block'], 1)}" for side in found]
        lines.append(f"| {row['layout']}, {row['predictor']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def host_line(result: Mapping[str, Any]) -> str:
    """The same in a sentence: reuse alone."""
    told = []
    for row in result["rows"]:
        if row["predictor"] == "reuse":
            sides = (f"{name} {side['us_a_block']['median']:.0f} µs" for name, side in row["sides"].items())
            told.append(f"{row['layout']}: {', '.join(sides)}")
    host = result["environment"]
    return (
        f"Host time for each block that a skipped DBCache step passes over (idle blocks, reuse; {host['cpu']}, "
        f"{host['date']}): {'; '.join(told)}."
    )


def quartiles_cell(row: Mapping[str, float], digits: int) -> str:
    """A median, and its quartiles in brackets."""
    # Rounded first, and 0 added: what is just below zero would be shown as -0.
    median, low, high = (
        f"{round(row[key], digits) + 0.0:.{digits}f}" for key in ("median", "lower_quartile", "upper_quartile")
    )
    return f"{median} ({low} to {high})"
