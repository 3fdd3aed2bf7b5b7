"""Tiny transformers whose inputs have padding, one for each row of the table of `sgl_diffusion_accel.lossless`.

`CASES[name].make()` gives a model, `.call(lengths)` the keyword arguments of one call of it, whose prompts have so many
tokens that count.
"""

from __future__ import annotations

import pytest

from . import cross, joint
from .base import Case, as_pipe, relative, tensor_of

CASES: dict[str, Case] = {case.name: case for case in (*joint.CASES, *cross.CASES)}


def present(name: str) -> Case:
    """A case, or a skip with the reason."""
    missing = CASES[name].missing()
    if missing:
        pytest.skip(missing)
    return CASES[name]


__all__ = ["CASES", "Case", "as_pipe", "present", "relative", "tensor_of"]
