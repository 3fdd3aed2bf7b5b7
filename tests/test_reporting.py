"""What reports share: tables in all their forms, and the spread of repeated measurements."""

from __future__ import annotations

import io

import pytest

from sgl_diffusion_accel.reporting.spread import Spread
from sgl_diffusion_accel.reporting.tables import Strong, Table

TABLE = Table(
    ("", "ms", "why"), [("a|b", "1.0", "<b>"), ("two\nlines", Strong("10.25"), "")], words=(0, 2), title="Times & more"
)


def test_text_is_aligned_and_marks_what_is_strong():
    assert TABLE.to_text().splitlines() == [
        "               ms  why",
        "a|b           1.0  <b>",
        "two lines  *10.25",
    ]
    assert TABLE.to_text(rule=True).splitlines()[1] == "─" * len("two lines  *10.25  why")


def test_markdown_has_one_line_a_row_and_escapes_bars():
    assert TABLE.to_markdown().splitlines() == [
        "| | ms | why |",
        "|---|--:|---|",
        "| a\\|b | 1.0 | <b> |",
        "| two lines | **10.25** |  |",
    ]


def test_html_is_escaped():
    shown = TABLE.to_html()
    assert "Times &amp; more" in shown
    assert "&lt;b&gt;" in shown
    assert "<b>10.25</b>" in shown


def test_rich_shows_the_same_cells():
    console = pytest.importorskip("rich.console")
    sheet = io.StringIO()
    console.Console(file=sheet, width=60).print(TABLE.to_rich())
    assert all(cell in sheet.getvalue() for cell in ("Times & more", "a|b", "two lines", "10.25", "<b>"))


def test_a_table_without_rows_is_its_head():
    empty = Table(("a", "b"), [])
    assert empty.to_text() == "a  b"
    assert empty.to_markdown().splitlines() == ["| a | b |", "|---|--:|"]


def test_spread_has_quartiles_and_a_single_value_is_all_three():
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
