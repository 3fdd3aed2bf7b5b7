"""Every transformer class of diffusers, small: one row each, and what the library does with it.

`ROWS[key].make()` gives a model, `.given()` the arguments of a call. `verdict_of(row)` runs a class with each kind of
patch and says what came out; `make models` runs all of them and writes `verdicts.json`, from which the table of
`docs/models.md` is made. A new class is one row in `pictures.py`, `videos.py` or `others.py`.
"""

from __future__ import annotations

from . import borrowed, others, pictures, stores, videos
from .base import Row
from .finding import found, times_of

ROWS: dict[str, Row] = {row.key: row for module in (borrowed, pictures, videos, others, stores) for row in module.ROWS}

__all__ = ["ROWS", "Row", "found", "times_of"]
