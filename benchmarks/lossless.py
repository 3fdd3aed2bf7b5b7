"""The tables of `docs/lossless.md`: of what the library goes by, and of what `benchmarks.padding` measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgl_diffusion_accel.lossless.padding.left_alone import LEFT_ALONE
from sgl_diffusion_accel.lossless.padding.table import ROWS, Row, Stream
from sgl_diffusion_accel.reporting.tables import Table

from .costs import quartiles_cell
from .markers import insert
from .turns import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "lossless.md"


def renewed(text: str) -> str:
    """The page with its tables as the library and the committed file have them."""
    measured = json.loads((RESULTS / "padding.json").read_text())
    text = insert(insert(text, cut(), "cut"), left_alone(), "left alone")
    text = insert(insert(text, saved(measured), "saved"), host_time(measured), "host time")
    return insert(text, constants(json.loads((RESULTS / "constants.json").read_text())), "constants")


def constants(result: Mapping[str, Any]) -> str:
    """What `benchmarks.constants` measured, in short."""
    head = ["", "text tokens", "picture tokens", "times as fast", "as deep as released", "rel. diff."]
    head += ["at the usual size", "estimated share", "a run holds", "of the weights"]
    drawn = []
    for row in result["rows"].values():
        usual = row["at_usual_size"]
        drawn.append(
            [
                f"{row['title']}{'' if row['padding'] else ', padded'}, {_depth(row)}",
                f"{row['text_tokens']:,}",
                f"{row['picture_tokens']:,}",
                f"{row['times']['cpu']['median']:.3f}",
                f"{row['times']['released']['median']:.3f}",
                f"{row['relative_difference']:.0f}",
                f"{usual['size']}: {usual['picture_tokens']:,} tokens",
                f"{usual['share']:.1%}",
                f"{usual['held_mib']:,.0f} MiB",
                f"{usual['held_mib'] / usual['weights_mib']:.1%}",
            ]
        )
    return Table(head, drawn).to_markdown()


def constants_in_full(result: Mapping[str, Any]) -> str:
    """The same with what was timed, and the quartiles: a chapter of `RESULTS.md`."""
    host = result["environment"]
    about = (
        "The second call of a run at true width and text length, its text's keys and values computed again and kept; "
        f"random weights, {result['dtype']}; {host['cpu']}, {host['threads']} thread, {host['date']}. CPU time; as "
        "deep as released: computed from the times of the blocks; held: of the blocks that were measured."
    )
    sides = list(next(iter(result["rows"].values()))["cpu_s"])
    head = ["", "tokens: text, picture", *(f"{side}, s" for side in sides), "times as fast", "as deep as released"]
    head += ["pairs", "not computed", "held", "rel. diff."]
    drawn = [
        [
            f"{row['title']}{'' if row['padding'] else ', padded'}, {_depth(row)}",
            f"{row['text_tokens']:,}, {row['picture_tokens']:,}",
            *(quartiles_cell(row["cpu_s"][side], 3) for side in sides),
            *(quartiles_cell(row["times"][clock], 3) for clock in ("cpu", "released")),
            str(row["pairs"]),
            str(row["spared"]),
            f"{row['held_mib']:,.0f} MiB",
            f"{row['relative_difference']:.0f}",
        ]
        for row in result["rows"].values()
    ]
    return "\n\n".join([about, Table(head, drawn).to_markdown()])


def saved(result: Mapping[str, Any]) -> str:
    """What `benchmarks.padding` measured of models, in short."""
    head = [
        "",
        "text tokens",
        "picture tokens",
        "times as fast",
        "as deep as released",
        "memory of tensors",
        "rel. diff.",
    ]
    drawn = [
        [
            f"{row['title']}, {_depth(row)}",
            _tokens(row),
            f"{row['picture_tokens']:,}",
            f"{row['times']['cpu']['median']:.2f}",
            f"{row['times']['released']['median']:.2f}",
            _peaks(row),
            f"{row['relative_difference']:.1e}",
        ]
        for row in result["rows"].values()
    ]
    return Table(head, drawn).to_markdown()


def padding(result: Mapping[str, Any]) -> str:
    """The same with what was timed, and the quartiles: a chapter of `RESULTS.md`."""
    host = result["environment"]
    about = (
        f"One call at true width and text length, random weights, {result['dtype']}, a small picture; {host['cpu']}, "
        f"{host['threads']} thread, {host['date']}, {result['pairs']} pairs. CPU time; as deep as released: computed "
        "from the times of the blocks; memory: most bytes of tensors at one time, beside weights and inputs; masked: "
        "attention calls with a mask in the blocks that see the picture."
    )
    sides = list(next(iter(result["rows"].values()))["cpu_s"])
    head = ["", "tokens: text, picture", *(f"{side}, s" for side in sides), "times as fast", "by the clock"]
    head += ["as deep as released", "memory", "masked", "rel. diff."]
    drawn = [
        [
            f"{row['title']}, {_depth(row)}",
            f"{_tokens(row)}, {row['picture_tokens']:,}",
            *(quartiles_cell(row["cpu_s"][side], 2) for side in sides),
            *(quartiles_cell(row["times"][clock], 2) for clock in ("cpu", "wall", "released")),
            _peaks(row),
            " → ".join(str(row["masked_attention_calls"][side]) for side in sides),
            f"{row['relative_difference']:.1e}",
        ]
        for row in result["rows"].values()
    ]
    return "\n\n".join([about, Table(head, drawn).to_markdown(), host_time(result)])


def host_time(result: Mapping[str, Any]) -> str:
    """What the patch itself takes of the host's time."""
    told = (f"{name} {quartiles_cell(found['us'], 0)}" for name, found in result["host"].items())
    return f"Host time of the patch, µs a call (CPU time, blocks that do nothing): {'; '.join(told)}."


def _depth(row: Mapping[str, Any]) -> str:
    counts = [depth for depth, _ in row["blocks"].values()]
    return f"{sum(counts)} of {sum(released for _, released in row['blocks'].values())} blocks"


def _tokens(row: Mapping[str, Any]) -> str:
    before, after = row["text_tokens"]
    return f"{before:,} → {after:,}"


def _peaks(row: Mapping[str, Any]) -> str:
    return f"{' → '.join(f'{peak:,.0f}' for peak in row['peak_mib'].values())} MiB"


def cut() -> str:
    """The models whose padding is cut."""
    lines = ["| transformer | cut, and where | by | its mask, where all tokens count |", "|---|---|---|---|"]
    return "\n".join(lines + [_line(name, row) for name, row in ROWS.items()])


def left_alone() -> str:
    """The models with a mask that are left alone."""
    lines = [f"| `{name}` | {why} |" for name, why in LEFT_ALONE.items()]
    return "\n".join(["| transformer | why |", "|---|---|", *lines])


def _line(name: str, row: Row) -> str:
    cuts = "; ".join(map(_cut, row.streams))
    marks = ", ".join(f"`{stream.mark}`" for stream in row.streams)
    return f"| `{name}` | {cuts} | {marks} | {_mask(row)} |"


def _cut(stream: Stream) -> str:
    return f"{', '.join(f'`{name}`' for name in (*stream.tokens, *stream.beside))}: {stream.pads}"


def _mask(row: Row) -> str:
    if row.keeps_mask:
        return "stays: its processors need one"
    if row.blocks is not None and row.blocks.asks_for_places:
        return "its blocks are told which tokens count"
    where = "is left out" if row.takes_none else "is not made" if row.blocks is None else "is taken from its blocks"
    return f"{where}, at batch 1" if row.only_alone else where
