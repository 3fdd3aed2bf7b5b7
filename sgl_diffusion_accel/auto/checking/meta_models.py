"""Makes pipelines and transformers of diffusers on the meta device: all of them, but for their weights."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sgl_diffusion_accel.errors import UnsupportedModelError
from sgl_diffusion_accel.targets import TRANSFORMERS

CLASS = "_class_name"
"""Under this key configurations name their class."""

_LIKE_A_CLASS = ("Pipeline", "Model", "Transformer", "DiT")


def of_class(kind: Any) -> Any:
    """A pipeline or transformer of a class with its default configuration."""
    if issubclass(kind, nn.Module):
        return _made(kind, {}, "its default configuration")
    parts: dict[str, Any] = dict.fromkeys(_components(kind))
    hints = _hints(kind)
    for each in parts:
        if each == "scheduler":
            parts[each] = _scheduler(hints.get(each))
        elif each in TRANSFORMERS:
            models = [model for model in _classes_in(hints.get(each)) if issubclass(model, nn.Module)]
            parts[each] = _made(models[0], {}, "its default configuration") if models else None
    return assembled(kind, parts, {})


def _components(kind: Any) -> list[str]:
    return sorted({*kind._get_signature_keys(kind)[0]} - {"self"})  # a set in older versions of diffusers


def _hints(kind: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind.__init__)
    except Exception:  # names that are there for type checkers alone
        return {name: each.annotation for name, each in inspect.signature(kind.__init__).parameters.items()}


def _classes_in(hint: Any) -> list[Any]:
    """The classes that an annotation names, itself or those of a union."""
    named = [each for part in typing.get_args(hint) for each in _classes_in(part)]
    return [hint] if isinstance(hint, type) and not named else named


def _scheduler(hint: Any) -> Any:
    """A scheduler of the class that is asked for; the usual one where any will do, None where it needs settings."""
    kinds = (each for each in _classes_in(hint) if hasattr(each, "set_timesteps"))
    try:
        return next(kinds, _diffusers().FlowMatchEulerDiscreteScheduler)()
    except TypeError:
        return None


def assembled(kind: Any, parts: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """A pipeline without its `__init__`, which may ask for parts that are not made."""
    pipe: Any = object.__new__(kind)
    pipe.register_modules(**dict.fromkeys(_components(kind)) | dict(parts))
    pipe.register_to_config(**settings)
    return pipe


def model_of(config: Mapping[str, Any], path: Path) -> nn.Module:
    """A transformer of its configuration, which is in a file."""
    return _made(class_in(str(config.get(CLASS)), path), config, str(path))


def _made(kind: Any, config: Mapping[str, Any], where: str) -> nn.Module:
    try:
        with torch.device("meta"):
            made: nn.Module = kind.from_config(dict(config))
    except Exception as error:  # a class may need a value that its defaults lack, or compute what meta cannot
        raise UnsupportedModelError(
            f"{kind.__name__} cannot be made of {where} without weights: {type(error).__name__}: {error}. Type the "
            "folder of a model, whose config.json has its settings; or load the pipeline: check_pipeline(pipe)"
        ) from error
    return made


def class_in(name: str, where: Path) -> Any:
    """The class of diffusers that a file names."""
    found = getattr(_diffusers(), name, None) if name in dir(_diffusers()) else None
    if isinstance(found, type):
        return found
    raise UnsupportedModelError(
        f"{where} is of class {name!r}, which diffusers {_diffusers().__version__} does not have. Take a newer one. "
        "Code that comes with a model is not run here: load the pipeline, and type check_pipeline(pipe)."
    )


def class_named(name: str) -> Any:
    """The pipeline or transformer of diffusers with a name, None if there is none."""
    found = getattr(_diffusers(), name) if name in class_names() else None
    return found if isinstance(found, type) else None


def class_names() -> list[str]:
    """Names of all of them, and of other models."""
    return [name for name in dir(_diffusers()) if any(word in name for word in _LIKE_A_CLASS)]


def _diffusers() -> Any:
    import diffusers  # late: it imports much

    return diffusers
