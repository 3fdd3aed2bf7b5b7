"""Pipeline classes of diffusers that hold a diffusion transformer, small: one case each, and what the library does.

`CASES[key].make()` gives a pipeline, `.run(pipe)` its output. `verdict_of(case)` runs it with each kind of patch and
says what came out; `make models` runs all of them and writes `verdicts.json`, from which the second table of
`docs/models.md` is made. A new class is one case in `rows/`, or a reason in `left_out.py`.
"""

from __future__ import annotations

from .base import Case
from .rows import ALL

CASES: dict[str, Case] = {case.key: case for case in ALL}

__all__ = ["CASES", "Case"]
