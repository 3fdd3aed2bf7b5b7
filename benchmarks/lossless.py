"""The tables of `docs/lossless.md`: made from the tables that the library itself goes by."""

from __future__ import annotations

from pathlib import Path

from sgl_diffusion_accel.lossless.padding.left_alone import LEFT_ALONE
from sgl_diffusion_accel.lossless.padding.table import ROWS, Row, Stream

from .markers import insert

PAGE = Path(__file__).parent.parent / "docs" / "lossless.md"


def renewed(text: str) -> str:
    """The page with its tables as the library has them."""
    return insert(insert(text, cut(), "cut"), left_alone(), "left alone")


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
    where = "is left out" if row.takes_none else "is not made" if row.blocks is None else "is taken from its blocks"
    return f"{where}, at batch 1" if row.only_alone else where
