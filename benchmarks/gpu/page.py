"""Tables of what was measured, for the terminal and for `docs/gpu.md`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sgl_diffusion_accel.reporting.tables import Table

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]


def number(key: str, digits: int) -> Callable[[Row], str]:
    """Reads a number of a row; empty where there is none."""
    return lambda row: "" if row.get(key) is None else f"{row[key]:,.{digits}f}"


def _milliseconds(key: str) -> Callable[[Row], str]:
    """Three figures are enough: 1,229 ms, 172 ms, 47.5 ms, 6.31 ms, 0.59 ms."""

    def read(row: Row) -> str:
        value = row.get(key)
        if value is None:
            return ""
        return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"

    return read


def _output(row: Row) -> str:
    if row.get("finite") is False:
        return "not finite"
    if row.get("relative_difference"):
        return f"off by {row['relative_difference']:.1e}"
    if "relative_difference" in row:
        return "equal"
    return {True: "equal", False: "differs", None: ""}[row.get("bitwise")]


def _change(key: str) -> Callable[[Row], str]:
    """Reads two whole numbers of a row, before and after."""
    return lambda row: " → ".join(f"{each:,}" for each in row.get(key) or ())


_COLUMNS: tuple[Column, ...] = (
    ("picture tokens", number("picture_tokens", 0)),
    ("text tokens", _change("text_tokens")),
    ("masked attention calls", _change("masked_calls")),
    ("with padding, ms", _milliseconds("padded_ms")),
    ("without, ms", _milliseconds("cut_ms")),
    ("times as fast", number("times_as_fast", 2)),
    ("peak with padding, GiB", number("padded_peak_gib", 1)),
    ("computed step, ms", _milliseconds("computed_device_ms")),
    ("skipped step, ms", _milliseconds("skipped_device_ms")),
    ("its host part, ms", _milliseconds("skipped_host_ms")),
    ("peak, GiB", number("peak_gib", 1)),
    ("first run, s", number("first_run_s", 1)),
    ("graphs", number("graphs", 0)),
    ("graphs later", number("graphs_later", 0)),
    ("output", _output),
)
"""A column that is empty in every row of a table is left out."""


def tables(result: Mapping[str, Any]) -> str:
    """All parts of a result, in Markdown: on what they were measured, then each under a heading of its own.

    Args:
        result: A file of `benchmarks.gpu`.
    """
    measured_on = dict.fromkeys(environment(part["environment"]) for part in result["parts"].values())
    shown = [f"Measured on {'; '.join(measured_on)}."] if measured_on else []
    for name, part in result["parts"].items():
        about = _about(part, several=len(measured_on) > 1)
        shown += [f"### {part['about'].get('title', name)}{_subject(name)}", about]
        if "error" in part:
            shown.append(f"Failed: {cell(part['error'])}")
        if part["rows"]:
            shown.append(_table(part))
    return "\n\n".join(each for each in shown if each)


def heading(entries: Iterable[Row]) -> str:
    """Devices and days of what was measured."""
    return "; ".join(
        dict.fromkeys(f"{_device(each['environment'])}, {each['environment']['date']}" for each in entries)
    )


def environment(found: Row) -> str:
    """A device, a day and versions, in one line."""
    versions = [
        f"{name} {found['packages'][name]}"
        for name in ("torch", "diffusers", "cache-dit", "sgl-diffusion-accel")
        if name in found["packages"]
    ]
    return ", ".join([_device(found), found["date"], *versions])


def _device(found: Row) -> str:
    return str(found["gpu"] or found["cpu"])


def cell(text: str) -> str:
    """One line with nothing that Markdown takes for a column."""
    return " ".join(text.split()).replace("|", "\\|")


WHOLE = ("flux", "qwen", "wan")
"""Parts of models at full depth."""


def never_skipping(result: Mapping[str, Any]) -> str:
    """In a sentence: what a step takes that is patched and computed, over an unpatched one, and the outputs."""
    ratios, equal = [], []
    for name in WHOLE:
        rows = result["parts"][name]["rows"]
        for title, row in rows.items():
            if title.startswith("never skipping") and "error" not in row:
                ratios.append(row["computed_device_ms"] / rows["unpatched"]["computed_device_ms"])
                equal.append(row["bitwise"])
    outputs = "the outputs are bitwise equal" if all(equal) else f"{equal.count(False)} of {len(equal)} outputs differ"
    span = f"{min(ratios):.3f} to {max(ratios):.3f}"
    return f"Patched and never skipping, a step takes {span} of an unpatched one, and {outputs}."


def glance(result: Mapping[str, Any]) -> str:
    """One line for each model at full depth: a computed step, and a skipped one of each cache."""
    names = {
        "adaptive": "adaptive",
        "static mask F0": "static mask F0, TaylorSeer 2",
        "TeaCache": "TeaCache",
        "MagCache": "MagCache",
        "DBCache F1": "DBCache F1",
        "cache-dit's DBCache F1": "cache-dit DBCache F1",
    }
    chosen = {
        part["about"]["title"]: part["rows"] for name, part in result["parts"].items() if name in WHOLE and part["rows"]
    }
    used = [label for label, name in names.items() if any(name in rows for rows in chosen.values())]
    skipped, computed = _milliseconds("skipped_device_ms"), _milliseconds("computed_device_ms")
    drawn = [
        [title, computed(rows.get("unpatched", {})), *(skipped(rows.get(names[label], {})) for label in used)]
        for title, rows in chosen.items()
    ]
    return Table(["milliseconds", "computed step", *(f"{label}, skipped" for label in used)], drawn).to_markdown()


def kernel_table(kernels: Mapping[str, Sequence[Row]]) -> str:
    """Attention backends by shape; those that did not run are named below."""
    drawn, missing = [], dict[str, str]()
    for shape, rows in kernels.items():
        for row in rows:
            if "ms" in row:
                numbers = (
                    f"{row['ms']:.2f}",
                    f"{row['tflops']:.0f}",
                    f"{row['share_of_peak']:.0%}",
                    f"{row['error']:.1e}",
                )
                drawn.append((shape, row["backend"], *numbers))
            elif row["why_not"]:
                missing[f"`{row['backend']}`"] = row["why_not"]
    head = ("shape", "backend", "ms", "TFLOP/s", "of the peak", "error")
    return _with_failures(Table(head, drawn, words=(0, 1)), missing)


def _table(part: Row) -> str:
    if all("backends" in row for row in part["rows"].values()):
        return kernel_table({name: row["backends"] for name, row in part["rows"].items()})
    columns = [column for column in _COLUMNS if any(column[1](row) for row in part["rows"].values())]
    failed = {name: row["error"] for name, row in part["rows"].items() if "error" in row}
    drawn = [[name, *(read(row) for _, read in columns)] for name, row in part["rows"].items() if name not in failed]
    return _with_failures(Table(["", *(title for title, _ in columns)], drawn), failed)


def _with_failures(table: Table, failed: Mapping[str, str]) -> str:
    told = [f"- {name} did not run: {cell(why)}" for name, why in failed.items()]
    return "\n".join([table.to_markdown(), *(["", *told] if told else [])])


def _subject(part: str) -> str:
    """What is asked of a model in a part whose title is the model's alone."""
    asked = {
        "attention_flux": ": attention backends",
        "attention_wan": ": attention backends",
        "compile": ": `compile_repeated_blocks`",
        "graphs": ": `compile_repeated_blocks` with CUDA graphs",
        "graphs_whole": ": the whole transformer as CUDA graphs",
    }
    return asked.get(part, "")


def _about(part: Row, several: bool) -> str:
    about = part["about"]
    told = []
    if "blocks" in about:
        cut = about["blocks"] != about["blocks_released"]
        told.append(_plus(about["blocks"]) + (f" of {_plus(about['blocks_released'])}" if cut else "") + " blocks")
        told.append(f"{about['height']}×{about['width']}" + (f"×{about['frames']}" if about["frames"] > 1 else ""))
        told.append(f"{about['text_tokens']} text tokens")
    if "weights_gib" in about:
        told.append(f"{about['parameters'] / 1e9:.1f} billion parameters, {about['weights_gib']:.1f} GiB")
    if "peak_tflops" in about:
        told.append(f"matrix product {about['peak_tflops']:,.0f} TFLOP/s")
    told += [about["dtype"]] if "dtype" in about else []
    told += [environment(part["environment"])] if several else []
    return (", ".join(told) + "." if told else "") + (f" {about['note']}" if "note" in about else "")


def _plus(counts: Sequence[int]) -> str:
    return " + ".join(map(str, counts))
