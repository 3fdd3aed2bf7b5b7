"""What a step gives whose blocks are skipped, worked out without the library: by plain hooks on an unpatched model.

In a computed step it is recorded what enters each list of blocks and what leaves it. In a skipped one the model runs
with all of its blocks, and what its lists return is exchanged for `what enters + (what left - what entered)`. So a
model that uses what its blocks return in the middle of a list for something else shows up as a difference.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .base import Row
from .loop import tensors_of

_HIDDEN = ("hidden_states", "hidden", "x", "visual_embed", "gen_seq", "img", "values")
"""What blocks call the stream that becomes the picture, where something is added to it between them."""


class ByBlocks:
    """An unpatched model, its block lists watched.

    Args:
        row: Of the class.
        model: The model.
    """

    def __init__(self, row: Row, model: Any) -> None:
        self._model = model
        self._lists: list[Sequence[nn.Module]] = [list(getattr(model, name)) for name in row.lists]
        self._entered: list[dict[str, Any]] = [{} for _ in self._lists]
        self._left: list[Sequence[Any]] = [() for _ in self._lists]
        self._names: list[dict[int, str]] = [{} for _ in self._lists]
        self._residuals: list[list[Any]] = []

    def computed(self, call: dict[str, Any]) -> list[Tensor]:
        """A computed step."""
        with self._watching(replace=False):
            outputs = tensors_of(self._model(**call))
        self._residuals = [self._residuals_of(index) for index in range(len(self._lists))]
        return outputs

    def skipped(self, call: dict[str, Any]) -> list[Tensor]:
        """A step whose blocks are skipped."""
        with self._watching(replace=True):
            return tensors_of(self._model(**call))

    def _residuals_of(self, index: int) -> list[Any]:
        return [
            None if part is None else part - self._entered[index][self._name(index, place, part)]
            for place, part in enumerate(self._left[index])
        ]

    def _name(self, index: int, place: int, part: Tensor) -> str:
        """Under which name the blocks of a list take what they return in some place."""
        known = self._names[index]
        if place not in known:
            fits = {name for name, value in self._entered[index].items() if value.shape == part.shape}
            fits -= set(known.values())
            known[place] = next(iter(fits)) if len(fits) == 1 else next(name for name in _HIDDEN if name in fits)
        return known[place]

    @contextmanager
    def _watching(self, replace: bool) -> Iterator[None]:
        hooks = []
        for index, blocks in enumerate(self._lists):
            before: list[Any] = [()]

            def enter(block: Any, args: Any, kwargs: Any, index: int = index, before: list[Any] = before) -> None:
                bound = inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments
                given = {name: value for name, value in bound.items() if isinstance(value, Tensor)}
                if block is self._lists[index][0]:
                    self._entered[index] = {name: value.clone() for name, value in given.items()}
                for place, part in enumerate(before[0]):
                    self._names[index].update((place, name) for name, value in given.items() if value is part)

            def leave(block: Any, _: Any, output: Any, index: int = index, before: list[Any] = before) -> Any:
                parts = output if isinstance(output, (tuple, list)) else (output,)
                before[0] = parts
                if block is not self._lists[index][-1]:
                    return None
                self._left[index] = [None if part is None else part.clone() for part in parts]
                return self._exchanged(index, output) if replace else None

            hooks += [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
            hooks += [block.register_forward_hook(leave) for block in blocks]
        with torch.no_grad():
            yield
        for hook in hooks:
            hook.remove()

    def _exchanged(self, index: int, output: Any) -> Any:
        parts = [
            None if residual is None else self._entered[index][self._names[index][place]] + residual
            for place, residual in enumerate(self._residuals[index])
        ]
        return parts[0] if isinstance(output, Tensor) else type(output)(parts)
