"""Counts what a transformer's blocks really do, in the same way for every cache.

Caches skip in different places: some never call a skipped block, some call it and return at once, some skip only its
attention. So what is counted is the work of the linear layers within the blocks, by a forward hook on each of them:
multiply-accumulates executed, step by step, against those of the unpatched run.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class BlockWork:
    """Multiply-accumulates of the linear layers within a transformer's blocks, one entry a transformer call.

    Attributes:
        calls: Work of each call so far.

    Example:
        >>> with BlockWork(pipe.transformer) as work:
        ...     pipe(**call)
        >>> share = work.total / unpatched.total
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.calls: list[int] = []
        self._transformer = transformer
        self._handles: list[RemovableHandle] = []

    @property
    def total(self) -> int:
        """Work of all calls."""
        return sum(self.calls)

    def __enter__(self) -> BlockWork:
        self._handles.append(self._transformer.register_forward_pre_hook(self._begin_call))
        for block in blocks_of(self._transformer):
            for layer in block.modules():
                if isinstance(layer, nn.Linear):
                    self._handles.append(layer.register_forward_hook(self._count))
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _begin_call(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        del module, args
        self.calls.append(0)

    def _count(self, layer: nn.Linear, args: tuple[Any, ...], output: torch.Tensor) -> None:
        del args
        self.calls[-1] += output.numel() * layer.in_features


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """The blocks of every list of blocks that the transformer holds itself."""
    lists = [child for child in transformer.children() if isinstance(child, nn.ModuleList) and len(child) > 1]
    return [block for blocks in lists for block in blocks]


def computed_steps(calls: list[int], reference: list[int], steps: int) -> float:
    """Denoising steps at which (nearly) all of the blocks' work was done, a mean over the branches.

    Args:
        calls: Work of each transformer call.
        reference: The same of the unpatched run.
        steps: Denoising steps of the unpatched run.
    """
    branches = len(reference) / steps
    return sum(call > 0.95 * max(reference) for call in calls) / branches
