"""What all of them share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

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
    blocks: dict[str, Any] = field(default_factory=dict)
    gain: float = 1.0

    def make(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = getattr(importlib.import_module(f"diffusers.models.transformers.{self.module}"), self.name)
            return randomise(made(**self.config), seed, self.gain).to(dtype)

    def call(self, lengths: Sequence[int] = (9,), dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        given = {**self.arguments(lengths), "return_dict": False}
        return {name: _cast(value, dtype) for name, value in given.items()}

    def main_blocks(self, model: nn.Module) -> list[nn.Module]:
        return [block for name in self.lists for block in getattr(model, name)]


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
    return tensors[0] if len(tensors) == 1 else torch.cat([each.flatten() for each in tensors])


def relative(one: Tensor, two: Tensor) -> float:
    return float((one - two).double().norm() / two.double().norm())
