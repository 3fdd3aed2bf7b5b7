"""Finds the pipeline classes of diffusers that hold a diffusion transformer: by what their constructors are given."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from typing import Any

import diffusers

from classes import found as found_models

_HIDDEN = {"ConsisIDPipeline": "diffusers.pipelines.consisid.pipeline_consisid"}
"""Classes that diffusers does not export without OpenCV, which only their helpers need, and where they are."""


def kind_of(name: str) -> Any:
    """The class of a name; None where the installed diffusers lacks it, or needs another package for it."""
    try:
        kind = getattr(diffusers, name, None)
    except RuntimeError:  # what its module imports has moved
        return None
    if name in _HIDDEN and not _is_pipeline(kind):
        kind = getattr(importlib.import_module(_HIDDEN[name]), name) if kind is not None else None
    return kind


@functools.cache
def found() -> dict[str, Any]:
    """Name to class, of this diffusers. Not the modular ones, whose components are not fixed."""
    models = re.compile(rf"\b({'|'.join(found_models())})\b")
    classes = {name: kind_of(name) for name in dir(diffusers) if "Pipeline" in name}
    return {name: kind for name, kind in classes.items() if _is_pipeline(kind) and models.search(_given_to(kind))}


def _is_pipeline(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, diffusers.DiffusionPipeline)


def _given_to(kind: Any) -> str:
    return " ".join(str(each.annotation) for each in inspect.signature(kind.__init__).parameters.values())
