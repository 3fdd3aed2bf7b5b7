"""Classes that other tests have already: those whose padding is cut (`padded`), and those of a pipeline (`zoo`)."""

from __future__ import annotations

from typing import Any

from padded import CASES, Case
from zoo import FAMILIES

from .base import Row

_FAMILIES = {
    "WanTransformer3DModel": "wan",
    "FluxTransformer2DModel": "flux",
    "Flux2Transformer2DModel": "flux2",
    "SD3Transformer2DModel": "sd3",
    "ChromaTransformer2DModel": "chroma",
    "CogVideoXTransformer3DModel": "cogvideox",
    "Kandinsky5Transformer3DModel": "kandinsky5",
    "LongCatImageTransformer2DModel": "longcat",
    "OvisImageTransformer2DModel": "ovis",
    "ZImageTransformer2DModel": "zimage",
}


def _padded(case: Case) -> Row:
    return Row(case.name, case.lists, case.make, case.call, unread=case.unread, lacks=case.missing)


def _of_family(name: str, family: str) -> Row:
    found = FAMILIES[family]
    given: dict[str, Any] = {"time": "t", "stream": "x"} if family == "zimage" else {}
    given["lacks"] = lambda: found.missing
    return Row(name, found.block_lists, lambda: found.make().transformer, found.bare, **given)


ROWS = (*map(_padded, CASES.values()), *(_of_family(*pair) for pair in _FAMILIES.items()))
