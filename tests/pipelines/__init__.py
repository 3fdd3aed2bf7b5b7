"""Pipeline classes of diffusers that hold a diffusion transformer, small: one case each, and what the library does.

`CASES[key].make()` gives a pipeline, `.run(pipe)` its output. `verdict_of(case)` runs it with each kind of patch and
says what came out; `make models` runs all of them and writes `verdicts.json`, from which the second table of
`docs/models.md` is made. A new class is one case in `rows/`, or a reason in `left_out.py`.
"""

from __future__ import annotations

from .base import Case
from .rows import cosmos, flux, hunyuan, ltx, pictures, qwen, sana, sd3, sound, videos, wan, zoo_rows

CASES: dict[str, Case] = {
    case.key: case
    for module in (zoo_rows, flux, qwen, sd3, wan, ltx, pictures, cosmos, videos, hunyuan, sana, sound)
    for case in module.CASES
}

__all__ = ["CASES", "Case"]
