"""What all of them share."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from sgl_diffusion_accel.lossless.padding.table import ROWS
from zoo.base import normal, randomise

LENGTH = 24
"""Text tokens that are fed."""


@dataclass(frozen=True)
class Case:
    """A transformer of one class."""

    name: str
    module: str
    """Of diffusers, where the class is."""
    config: dict[str, Any]
    arguments: Callable[[Sequence[int]], dict[str, Any]]
    """Of a call whose prompts have so many tokens that count."""
    lists: tuple[str, ...]
    """Block lists."""
    gain: float = 1.0
    """Of the weights."""
    unread: int = 0
    """Places at the start of the output that nobody reads."""
    dtype: torch.dtype = torch.float32
    """In which to compare: float64 where parts compute in half precision, whose rounding hides what is looked for."""

    def make(self, seed: int = 0, dtype: torch.dtype | None = None) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = getattr(importlib.import_module(f"diffusers.models.transformers.{self.module}"), self.name)
            return randomise(made(**self.config), seed, self.gain).to(dtype or self.dtype)

    def call(self, lengths: Sequence[int] = (9,), dtype: torch.dtype | None = None) -> dict[str, Any]:
        given = {**self.arguments(lengths), "return_dict": False}
        return {name: _cast(value, dtype or self.dtype) for name, value in given.items()}

    def run(self, model: Any, given: dict[str, Any]) -> Tensor:
        """What is read of the output."""
        with torch.no_grad():
            return tensor_of(model(**given))[:, self.unread :]

    def main_blocks(self, model: nn.Module) -> list[nn.Module]:
        return [block for name in self.lists for block in getattr(model, name)]

    def missing(self) -> str | None:
        """Why this diffusers cannot make it; None where it can."""
        try:
            module = importlib.import_module(f"diffusers.models.transformers.{self.module}")
        except ModuleNotFoundError:
            return f"diffusers {diffusers.__version__} has no {self.name}"
        known = inspect.signature(getattr(module, self.name).forward).parameters
        is_old = any(name in known for name in ROWS[self.name].older)
        return f"{self.name} of diffusers {diffusers.__version__} attends its padding" if is_old else None


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def mask(lengths: Sequence[int], dtype: torch.dtype = torch.bool, length: int = LENGTH) -> Tensor:
    return (torch.arange(length)[None] < torch.tensor(lengths)[:, None]).to(dtype)


def values(*shape: int, key: str) -> Tensor:
    return normal(*shape, seed=0, key=key)


def times(lengths: Sequence[int], time: float) -> Tensor:
    return torch.full((len(lengths),), time)


def tensor_of(output: Any) -> Tensor:
    """The output, or all of a model with several, as one row."""
    parts = output if isinstance(output, (tuple, list)) else [output]
    tensors = [each if isinstance(each, Tensor) else tensor_of(each) for each in parts]
    return tensors[0] if len(tensors) == 1 else torch.cat([each.flatten(1) for each in tensors], 1)


def relative(one: Tensor, two: Tensor) -> float:
    return float((one - two).double().norm() / two.double().norm())


def as_pipe(model: nn.Module) -> Any:
    """A pipeline of this transformer alone, for a snapshot."""
    return SimpleNamespace(components={"transformer": model}, scheduler=None)
