"""Pipelines and transformers made of their configuration alone: on the meta device, without weights."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from sgl_diffusion_accel.auto.checking.meta_models import (
    CLASS,
    PIPELINE,
    SCHEDULER,
    assembled,
    class_in,
    class_named,
    class_names,
    model_of,
    modular,
    of_class,
)
from sgl_diffusion_accel.errors import ConfigError, UnsupportedModelError
from sgl_diffusion_accel.targets import TRANSFORMERS

_INDEX, _CONFIG, _SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
_MODULAR_INDEX = "modular_model_index.json"


def configured(model: str) -> Any:
    """Makes a pipeline, or a transformer, that has everything but weights.

    Args:
        model: A folder of a pipeline (with model_index.json) or of a transformer (with config.json); the name of a
            pipeline or a transformer of diffusers, for its default configuration; or the name of a model whose
            configuration is in the local cache of the Hugging Face Hub. Nothing is fetched.

    Raises:
        ConfigError: It is none of these, or its configuration cannot be read.
        MissingPackageError: diffusers needs other packages for it.
        UnsupportedModelError: diffusers has no such class, or cannot make one of its configuration.
    """
    if Path(model).is_dir():
        return _of_folder(Path(model))
    kind = class_named(model)
    if kind is not None:
        return of_class(kind)
    cached = _cached(model)
    if cached is not None:
        return _of_folder(cached)
    nearest = difflib.get_close_matches(model, class_names(), n=1, cutoff=0.8)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ConfigError(
        f"{model!r} is no folder, no class of diffusers, and no model in the local cache of the Hugging Face Hub. "
        f"Nothing else is looked at, and nothing is fetched.{hint} Type the path of a folder with model_index.json or "
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
        return model_of(_read(folder / _CONFIG), folder / _CONFIG)
    if (folder / _MODULAR_INDEX).exists():
        raise UnsupportedModelError(modular(str(folder)))
    raise ConfigError(
        f"{folder} has neither {_INDEX} nor {_CONFIG}. Type the folder that from_pretrained takes: of the pipeline, "
        "or of its transformer."
    )


def _pipeline_of(folder: Path) -> Any:
    index = _read(folder / _INDEX)
    kind = class_in(str(index.get(CLASS)), folder / _INDEX, PIPELINE)
    parts: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        match value:
            case [str(library), str(model)]:
                parts[name] = _part_of(folder / name, library, model)
            case [*_]:
                parts[name] = None
            case _:
                settings[name] = value
    return assembled(kind, parts, settings)


def _part_of(folder: Path, library: str, model: str) -> Any:
    """A scheduler or a denoiser; None for other parts, which do not matter here.

    Raises:
        ConfigError: Its configuration is missing, or cannot be read.
        UnsupportedModelError: It is not of diffusers.
    """
    name, settings = folder.name, folder / _SCHEDULER
    if settings.exists():
        config = _read(settings)
        return class_in(str(config.get(CLASS, model)), settings, SCHEDULER).from_config(config)
    if library == "diffusers" and name == "scheduler":
        raise _missing(settings)
    if library == "diffusers" and _is_denoiser(name, model):
        if not (folder / _CONFIG).exists():
            raise _missing(folder / _CONFIG)
        return model_of(_read(folder / _CONFIG), folder / _CONFIG)
    if name in TRANSFORMERS:
        raise UnsupportedModelError(
            f"{name} is a {model} of {library}. Code that comes with a model is not run here: load the pipeline, and "
            "type check_pipeline(pipe)."
        )
    return None


def _missing(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} is missing, which {_INDEX} names. Type, for a model of the Hub: hf download OWNER/NAME --include "
        "'*.json'"
    )


def _is_denoiser(name: str, model: str) -> bool:
    """Others, such as text encoders and VAEs, do not matter here."""
    return name in TRANSFORMERS or ("Transformer" in model and "Text" not in model)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a {type(found).__name__}; expected an object with {CLASS}.")
    return found
