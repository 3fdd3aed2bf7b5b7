"""Puts what is made by a script between markers of a document that is written by hand."""

from __future__ import annotations


def insert(text: str, table: str, name: str = "table") -> str:
    """Puts a table between the markers of a text.

    Args:
        text: The document.
        table: What goes there in the place of what is there.
        name: Of the markers.

    Raises:
        ValueError: the text lacks a marker.
    """
    start, stop = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, begin, rest = text.partition(start)
    _, end, after = rest.partition(stop)
    if not (begin and end):
        raise ValueError(f"no place for the table; expected the lines {start!r} and {stop!r}")
    return f"{before}{start}\n\n{table}\n\n{stop}{after}"
