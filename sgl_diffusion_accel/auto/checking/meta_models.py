"""Makes pipelines and transformers of diffusers on the meta device: all of them, but for their weights."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sgl_diffusion_accel.errors import MissingPackageError, UnsupportedModelError
from sgl_diffusion_accel.targets import TRANSFORMERS

CLASS = "_class_name"
"""Under this key configurations name their class."""

PIPELINE, MODEL, SCHEDULER = "DiffusionPipeline", "ModelMixin", "SchedulerMixin"
"""Base classes of diffusers."""

_LIKE_A_CLASS = ("Pipeline", "Model", "Transformer", "DiT")


def of_class(kind: Any) -> Any:
    """A pipeline or transformer of a class with its default configuration.

    Raises:
        MissingPackageError: diffusers needs other packages for it.
        UnsupportedModelError: It is neither, or cannot be made of its defaults.
    """
    if issubclass(kind, nn.Module):
        return _made(kind, {}, "its default configuration")
    _refuse_other(kind, PIPELINE, kind.__name__)
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
    # As `from_pretrained`, which leaves out what another version of the class has written.
    known = {name for keys in kind._get_signature_keys(kind) for name in keys}
    pipe.register_modules(**dict.fromkeys(_components(kind)) | {name: parts[name] for name in parts if name in known})
    pipe.register_to_config(**{name: settings[name] for name in settings if name in known})
    return pipe


def model_of(config: Mapping[str, Any], path: Path) -> nn.Module:
    """A transformer of its configuration, which is in a file."""
    return _made(class_in(str(config.get(CLASS)), path, MODEL), config, str(path))


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


def class_in(name: str, where: Path, kind: str) -> Any:
    """The class of diffusers that a file names.

    Args:
        name: Its name.
        where: The file.
        kind: Of what kind it has to be: `PIPELINE`, `MODEL` or `SCHEDULER`.

    Raises:
        MissingPackageError: diffusers needs other packages for it.
        UnsupportedModelError: There is none, or it is of another kind.
    """
    found = getattr(_diffusers(), name, None) if name in dir(_diffusers()) else None
    if isinstance(found, type):
        _refuse_other(found, kind, f"{where} is of class {name!r}, which")
        return found
    raise UnsupportedModelError(
        f"{where} is of class {name!r}, which diffusers {_diffusers().__version__} does not have. Take a newer one. "
        "Code that comes with a model is not run here: load the pipeline, and type check_pipeline(pipe)."
    )


def _refuse_other(found: type, kind: str, what: str) -> None:
    """Raises where a class is not of a kind, or lacks packages: diffusers puts something else in its place then."""
    try:
        _diffusers().utils.requires_backends(found, getattr(found, "_backends", []))
    except ImportError as error:
        raise MissingPackageError(" ".join(str(error).split())) from error
    base = getattr(_diffusers(), kind)
    if issubclass(found, base) and found is not base:
        return
    if any(each.__name__ == "ModularPipeline" for each in found.__mro__):
        raise UnsupportedModelError(modular(what))
    raise UnsupportedModelError(
        f"{what} is no {kind} that can be made of its configuration. Type the folder of a model, or the name of a "
        "class, such as QwenImagePipeline."
    )


def modular(what: str) -> str:
    """Why nothing is told of a modular pipeline that is not loaded."""
    return f"{what} is a modular pipeline, whose parts are known when it is loaded. Load it: check_pipeline(pipe)"


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
