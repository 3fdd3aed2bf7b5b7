"""Tables, drawn in four ways from the same cells: plain text, Markdown, HTML, and rich where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any


class Strong(str):
    """A cell that stands out: bold, in plain text with a star before it."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """A table before it is drawn.

    Attributes:
        head: Titles of the columns.
        rows: Cells, as many a row as there are titles; what is in them is shown on one line.
        words: Columns of words, aligned to the left; all others hold numbers.
        title: Above it, in all but Markdown.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)
    title: str = ""

    def to_text(self, rule: bool = False) -> str:
        """In plain text, without its title.

        Args:
            rule: Whether a line is drawn below the head.
        """
        lines = [[f"*{_line(cell)}" if isinstance(cell, Strong) else _line(cell) for cell in row] for row in self._all]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        drawn = [
            "  ".join(
                cell.ljust(width) if index in self.words else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        if rule:
            drawn.insert(1, "─" * (sum(widths) + 2 * (len(widths) - 1)))
        return "\n".join(drawn)

    def to_markdown(self) -> str:
        """In Markdown. A bar in a cell is escaped, so that it does not end the cell."""
        drawn = ["| " + " | ".join(map(_markdown, row)) + " |" for row in self._all]
        drawn[0] = drawn[0].replace("|  |", "| |")
        drawn.insert(1, "".join("|---" if index in self.words else "|--:" for index in range(len(self.head))) + "|")
        return "\n".join(drawn)

    def to_html(self) -> str:
        """As an HTML element, its text escaped."""

        def drawn(tag: str, row: Sequence[str]) -> str:
            cells = (
                f"<{tag} style='text-align:{'left' if index in self.words else 'right'};padding:2px 8px'>"
                + (f"<b>{escape(_line(cell))}</b>" if isinstance(cell, Strong) else escape(_line(cell)))
                + f"</{tag}>"
                for index, cell in enumerate(row)
            )
            return f"<tr>{''.join(cells)}</tr>"

        caption = f"<caption style='text-align:left'><i>{escape(self.title)}</i></caption>" if self.title else ""
        body = "".join(drawn("td", row) for row in self.rows)
        return (
            f"<table style='border-collapse:collapse'>{caption}<thead>{drawn('th', self.head)}</thead>"
            f"<tbody>{body}</tbody></table>"
        )

    def to_rich(self) -> Any:
        """For `rich.print`: words may be broken where the terminal is narrow, no number is."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        drawn = RichTable(title=self.title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for index, name in enumerate(self.head):
            is_words = index in self.words
            width = None if is_words else max((len(row[index]) for row in self.rows), default=0)
            drawn.add_column(name, justify="left" if is_words else "right", min_width=width)
        for row in self.rows:
            drawn.add_row(*(Text(_line(cell), style="bold" if isinstance(cell, Strong) else "") for cell in row))
        return drawn

    @property
    def _all(self) -> list[Sequence[str]]:
        return [self.head, *self.rows]


def _line(cell: str) -> str:
    return " ".join(cell.split())


def _markdown(cell: str) -> str:
    plain = _line(cell).replace("|", "\\|")
    return f"**{plain}**" if isinstance(cell, Strong) else plain
