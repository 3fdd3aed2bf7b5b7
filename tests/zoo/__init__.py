"""Tiny pipelines of diffusers' own classes with random weights, for tests.

`FAMILIES[name].make()` gives a pipeline, `.run(pipe)` its output; see `Family` for the rest. A family that the
installed diffusers lacks says so in `.missing`.
"""

from __future__ import annotations

from . import (
    chroma,
    cogvideox,
    flux,
    flux2,
    flux_like,
    hunyuan,
    hunyuan15,
    ideogram4,
    kandinsky5,
    ltx,
    lumina2,
    mochi,
    qwen,
    sana,
    sd3,
    wan,
    z_image,
)
from .base import Family, tensor_of

_MODULES = (
    wan,
    qwen,
    flux,
    hunyuan,
    z_image,
    sd3,
    chroma,
    flux2,
    ltx,
    cogvideox,
    mochi,
    sana,
    lumina2,
    hunyuan15,
    kandinsky5,
    flux_like,
    ideogram4,
)

FAMILIES: dict[str, Family] = {family.name: family for module in _MODULES for family in module.FAMILIES}

__all__ = ["FAMILIES", "Family", "tensor_of"]
