"""Pipelines and transformers made of their configuration alone: on the meta device, without weights."""

from __future__ import annotations

import difflib
import inspect
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sgl_diffusion_accel.errors import AccelError, ConfigError, UnsupportedModelError
from sgl_diffusion_accel.targets import TRANSFORMERS

_INDEX, _CONFIG, _SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
_CLASS = "_class_name"
_LIKE_A_CLASS = ("Pipeline", "Model", "Transformer", "DiT")


def configured(model: str) -> Any:
    """Makes a pipeline, or a transformer, that has everything but weights.

    Args:
        model: A folder of a pipeline (with model_index.json) or of a transformer (with config.json); the name of a
            pipeline or a transformer of diffusers, for its default configuration; or the name of a model whose
            configuration is in the local cache of the Hugging Face Hub. Nothing is fetched.

    Raises:
        ConfigError: It is none of these, or its configuration cannot be read.
        UnsupportedModelError: diffusers has no such class, or cannot make one of its configuration.
    """
    if Path(model).is_dir():
        return _of_folder(Path(model))
    kind = _class_named(model)
    if kind is not None:
        return _of_class(kind)
    cached = _cached(model)
    if cached is not None:
        return _of_folder(cached)
    nearest = difflib.get_close_matches(model, _class_names(), n=1, cutoff=0.8)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ConfigError(
        f"{model!r} is no folder, no class of diffusers, and no model in the local cache of the Hugging Face Hub, which "
        f"is all that is looked at: nothing is fetched.{hint} Type the path of a folder with model_index.json or "
        "config.json; or the name of a class, such as QwenImagePipeline; or first: hf download OWNER/NAME --include "
        "'*.json'"
    )


def _cached(model: str) -> Path | None:
    """The folder of a model in the Hub's local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in (_INDEX, _CONFIG):
        try:
            found = try_to_load_from_cache(model, name)
        except HFValidationError:  # it cannot be the name of one
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _of_folder(folder: Path) -> Any:
    if (folder / _INDEX).exists():
        return _pipeline_of(folder)
    if (folder / _CONFIG).exists():
        return _model_of(_read(folder / _CONFIG), folder / _CONFIG)
    raise ConfigError(
        f"{folder} has neither {_INDEX} nor {_CONFIG}. Type the folder that from_pretrained takes: that of the pipeline, "
        "or of its transformer."
    )


def _pipeline_of(folder: Path) -> Any:
    index = _read(folder / _INDEX)
    kind = _class(str(index.get(_CLASS)), folder / _INDEX)
    parts: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if not isinstance(value, list):
            settings[name] = value
        elif (folder / name / _SCHEDULER).exists():
            config = _read(folder / name / _SCHEDULER)
            parts[name] = _class(str(config.get(_CLASS, value[1])), folder / name).from_config(config)
        elif value[0] == "diffusers" and _is_denoiser(name, str(value[1])) and (folder / name / _CONFIG).exists():
            parts[name] = _model_of(_read(folder / name / _CONFIG), folder / name / _CONFIG)
        else:
            parts[name] = None
    return _assembled(kind, parts, settings)


def _is_denoiser(name: str, model: str) -> bool:
    """Others, such as text encoders and VAEs, do not matter here."""
    return name in TRANSFORMERS or ("Transformer" in model and "Text" not in model)


def _of_class(kind: Any) -> Any:
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
    return _assembled(kind, parts, {})


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


def _assembled(kind: Any, parts: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """A pipeline without its `__init__`, which may ask for parts that are not made."""
    pipe: Any = object.__new__(kind)
    pipe.register_modules(**{name: None for name in _components(kind)} | dict(parts))
    pipe.register_to_config(**settings)
    return pipe


def _model_of(config: Mapping[str, Any], path: Path) -> nn.Module:
    return _made(_class(str(config.get(_CLASS)), path), config, str(path))


def _made(kind: Any, config: Mapping[str, Any], where: str) -> nn.Module:
    try:
        with torch.device("meta"):
            made: nn.Module = kind.from_config(dict(config))
    except AccelError:
        raise
    except Exception as error:  # a class may need a value that its defaults lack, or compute what meta cannot
        raise UnsupportedModelError(
            f"{kind.__name__} cannot be made of {where} without weights: {type(error).__name__}: {error}. Type the "
            "folder of a model, whose config.json has its settings; or load the pipeline, and type: check_pipeline(pipe)"
        ) from error
    return made


def _class(name: str, where: Path) -> Any:
    """The class of diffusers that a file names."""
    found = getattr(_diffusers(), name, None) if name in dir(_diffusers()) else None
    if isinstance(found, type):
        return found
    raise UnsupportedModelError(
        f"{where} is of class {name!r}, which diffusers {_diffusers().__version__} does not have. A newer diffusers may; "
        "code that comes with a model is not run here: load the pipeline, and type check_pipeline(pipe)."
    )


def _class_named(name: str) -> Any:
    """The pipeline or transformer of diffusers with a name, None if there is none."""
    found = getattr(_diffusers(), name) if name in _class_names() else None
    return found if isinstance(found, type) else None


def _class_names() -> list[str]:
    return [name for name in dir(_diffusers()) if any(word in name for word in _LIKE_A_CLASS)]


def _diffusers() -> Any:
    import diffusers  # late: it imports much

    return diffusers


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a {type(found).__name__}; expected an object with {_CLASS}.")
    return found
