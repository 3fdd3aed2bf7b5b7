"""Finds the classes: every model of diffusers that is given a time and is neither a UNet nor a ControlNet."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
from typing import Any

import diffusers
import diffusers.models

_TIME = re.compile(r"^t$|(^|_)time(step)?s?$")
"""Parameters of `forward` that tell the noise level: `timestep`, `t`, `vision_timesteps`, `decoder_noise_time`."""

_OTHERS = ("unet", "controlnet")
"""How the packages of models begin that denoise, or help to, and are no transformers."""


@functools.cache
def found() -> dict[str, Any]:
    """Name to class, of this diffusers."""
    classes: dict[str, Any] = {}
    for module in pkgutil.walk_packages(diffusers.models.__path__, f"{diffusers.models.__name__}."):
        if module.name.split(".")[2].startswith(_OTHERS) or "flax" in module.name:
            continue
        for name, each in vars(importlib.import_module(module.name)).items():
            is_model = inspect.isclass(each) and issubclass(each, diffusers.ModelMixin)
            if is_model and each.__module__ == module.name and times_of(each):
                classes[name] = each
    return classes


def times_of(cls: Any) -> list[str]:
    """The parameters of a class's `forward` that tell the noise level."""
    return [name for name in inspect.signature(cls.forward).parameters if _TIME.search(name)]
