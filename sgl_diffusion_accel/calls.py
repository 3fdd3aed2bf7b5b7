"""The calls that users give to `calibrate`, `compare` and the like: each can be made again, on the same inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError

STEPS = "num_inference_steps"
_SCHEDULES = ("timesteps", "sigmas")  # given by the user, they decide the steps


@dataclass(frozen=True)
class Call:
    """One call of a pipeline.

    Attributes:
        arguments: Its keyword arguments as the user gave them, without a seed.
        seed: Of the process's generators, and of the pipeline's where it takes one and none was given.
        takes_generator: Whether to give the pipeline a generator with that seed.
        steps: Denoising steps, None where they cannot be chosen by `num_inference_steps`.
        label: A short name: the prompt, or the number of the call.
    """

    arguments: Mapping[str, Any]
    seed: int
    takes_generator: bool
    steps: int | None
    label: str

    def fresh(self, steps: int | None = None) -> dict[str, Any]:
        """Keyword arguments for one run.

        Generators start where the user's stand, which stay there; tensors and arrays are copies, since some pipelines
        write into their `latents`.

        Args:
            steps: Denoising steps, if other than the call's own.
        """
        arguments = {name: _fresh(value) for name, value in self.arguments.items()}
        if self.takes_generator:
            arguments["generator"] = torch.Generator().manual_seed(self.seed)
        if steps is not None:
            arguments[STEPS] = steps
        return arguments


def _fresh(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return torch.Generator(device=value.device).set_state(value.get_state())
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if type(value) in (list, tuple):
        return type(value)(map(_fresh, value))
    if type(value) is dict:
        return {key: _fresh(each) for key, each in value.items()}
    return value


def read_calls(pipe: Any, calls: Iterable[Mapping[str, Any]], asked: str) -> list[Call]:
    """Checks the user's calls.

    Args:
        pipe: The pipeline that is to be called.
        calls: Keyword arguments of `pipe(...)`, one dict for each run.
        asked: What the user typed, for errors, such as `"calibrate(pipe, calls=…)"`; its name comes first.

    Raises:
        ConfigTypeError: `pipe` cannot be called, or the calls are no list of dicts.
        ConfigError: There are none, or one has a seed that cannot be used.
    """
    if not callable(pipe) or not isinstance(getattr(pipe, "components", None), dict):
        raise ConfigTypeError(
            f"{asked.partition('(')[0]} needs a pipeline that it can call, and got {type(pipe).__name__}. Type: "
            + asked.replace("…", "[dict(prompt=..., num_inference_steps=50), ...]")
        )
    if isinstance(calls, (Mapping, str)) or not isinstance(calls, Iterable):
        raise ConfigTypeError(
            f"calls is a {type(calls).__name__}; allowed: a list of dicts, each the keyword arguments of pipe(...)."
        )
    parameters = inspect.signature(pipe).parameters
    found = [_read(each, index, parameters) for index, each in enumerate(calls)]
    if not found:
        raise ConfigError("calls is empty: give the keyword arguments of at least one pipe(...) call, as a dict.")
    return found


def _read(given: Mapping[str, Any], index: int, parameters: Mapping[str, inspect.Parameter]) -> Call:
    if not isinstance(given, Mapping):
        raise ConfigTypeError(
            f"calls holds a {type(given).__name__}; allowed: dicts, each the keyword arguments of pipe(...)."
        )
    arguments = dict(given)
    seed = None if "seed" in parameters else arguments.pop("seed", None)
    has_generator = arguments.get("generator") is not None
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ConfigError(f"calls[{index}] has seed={seed!r}; allowed: an integer.")
    if seed is not None and has_generator:
        raise ConfigError(f"calls[{index}] has a generator and a seed. Give one of them.")
    prompt = arguments.get("prompt")
    label = prompt if isinstance(prompt, str) else f"call {index + 1}"
    takes_generator = "generator" in parameters and not has_generator
    return Call(arguments, index if seed is None else seed, takes_generator, _steps(arguments, parameters), label)


def _steps(arguments: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> int | None:
    if any(arguments.get(name) is not None for name in _SCHEDULES):
        return None
    default = parameters[STEPS].default if STEPS in parameters else None
    steps = arguments.get(STEPS, default)
    return steps if type(steps) is int else None
