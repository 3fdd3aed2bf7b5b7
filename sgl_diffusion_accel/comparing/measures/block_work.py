"""Counts what a transformer's blocks really do, in the same way for every cache, whoever made it.

Caches skip in different places: some never call a skipped block, some call it and return at once, some skip only its
attention. So what is counted is the work of the linear layers within the blocks, by a forward hook on each of them:
multiply-accumulates executed, transformer call by transformer call.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sgl_diffusion_accel.targets import is_in_compiled_wrapper

Signature = tuple[tuple[int, ...], ...]


class BlockWork:
    """Multiply-accumulates of the linear layers within a transformer's blocks, one entry a transformer call.

    Args:
        transformer: The model; several can be counted, each on its own.

    Attributes:
        calls: Work of each call so far.

    Example:
        >>> with BlockWork(pipe.transformer) as work:
        ...     output = pipe(**call)
        >>> share = work.total / unpatched.total  # doctest: +SKIP
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.calls: list[int] = []
        self._shapes: list[Signature] = []
        self._transformer = transformer
        self._handles: list[RemovableHandle] = []

    @property
    def total(self) -> int:
        """Work of all calls."""
        return sum(self.calls)

    @property
    def full(self) -> int:
        """Work of all calls if each had done as much as the largest one on tensors of the same shapes.

        A cache computes its first step in full, so this is what the unpatched model would have done.
        """
        most: dict[Signature, int] = {}
        for shapes, work in zip(self._shapes, self.calls, strict=True):
            most[shapes] = max(work, most.get(shapes, 0))
        return sum(most[shapes] for shapes in self._shapes)

    def __enter__(self) -> BlockWork:
        self._handles.append(self._transformer.register_forward_pre_hook(self._begin_call, with_kwargs=True))
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

    def _begin_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        given = (*args, *kwargs.values())
        values = (one for value in given for one in (value if isinstance(value, (list, tuple)) else [value]))
        self._shapes.append(tuple(tuple(value.shape) for value in values if isinstance(value, torch.Tensor)))
        self.calls.append(0)

    def _count(self, layer: nn.Linear, args: tuple[Any, ...], output: torch.Tensor) -> None:
        del args
        self.calls[-1] += output.numel() * layer.in_features


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """The blocks of every list of blocks that the transformer holds itself."""
    lists = [child for child in transformer.children() if isinstance(child, nn.ModuleList) and len(child) > 1]
    return [block for blocks in lists for block in blocks]


def is_compiled(transformer: nn.Module) -> bool:
    """Whether the transformer or a part of it is compiled: hooks would compile it anew."""
    return is_in_compiled_wrapper(transformer) or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in transformer.modules()
    )
