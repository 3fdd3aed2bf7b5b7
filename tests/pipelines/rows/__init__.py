"""The cases, one file for each family of pipelines."""

from __future__ import annotations

from pipelines.base import Case
from pipelines.rows import cosmos, flux, hunyuan, ltx, pictures, qwen, sana, sd3, sound, videos, wan, zoo_rows

_MODULES = (zoo_rows, flux, qwen, sd3, wan, ltx, pictures, cosmos, videos, hunyuan, sana, sound)

ALL: tuple[Case, ...] = tuple(case for module in _MODULES for case in module.CASES)
