"""Which output of a block is which argument of the next one, learned from a computed step.

In almost every diffusion transformer each tensor that a block returns *is* the object that the next block takes. So
two calls in a row tell the wiring. Where something is added between the blocks (a ControlNet's residuals), the
argument's shape and name tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sgl_diffusion_accel.caching.models import HIDDEN_NAMES, STREAM_NAMES
from sgl_diffusion_accel.errors import UnsupportedModelError

Key = int | str
"""Position or name of an argument."""

Call = tuple[Sequence[Any], Mapping[str, Any]]
"""The positional and the keyword arguments of a block."""


def elements(output: Any) -> tuple[Any, ...]:
    """The parts of what a block returns."""
    return tuple(output) if isinstance(output, (tuple, list)) else (output,)


def argument(call: Call, key: Key) -> Any:
    """The argument at a position or of a name."""
    return call[0][key] if isinstance(key, int) else call[1][key]


def _arguments(call: Call) -> list[tuple[Key, Tensor]]:
    pairs: list[tuple[Key, Any]] = [*enumerate(call[0]), *call[1].items()]
    return [(key, value) for key, value in pairs if isinstance(value, Tensor)]


class Wiring:
    """Which argument each output of a list's blocks feeds.

    Args:
        names: Parameter names of the blocks' forward, to name positional arguments.
        where: The list's name and the model's, for errors.

    Attributes:
        keys: For each output, the argument it feeds; None for an output that is not a tensor.
        complete: Whether all is known.
    """

    def __init__(self, names: Sequence[str], where: str) -> None:
        self._names = names
        self._where = where
        self.keys: list[Key | None] = []
        self.complete = False

    def observe(self, output: Any, following: Call) -> None:
        """Learns from one block's output and the next block's arguments."""
        parts = elements(output)
        if len(self.keys) != len(parts):
            self.keys = [None] * len(parts)
        for index, part in enumerate(parts):
            for key, value in _arguments(following):
                if value is part:
                    self.keys[index] = key
        self.complete = all(
            key is not None for key, part in zip(self.keys, parts, strict=True) if isinstance(part, Tensor)
        )

    def settle(self, call: Call, output: Any) -> None:
        """Decides by shape and name what could not be seen, from one block's arguments and output.

        Raises:
            UnsupportedModelError: It remains ambiguous.
        """
        parts = elements(output)
        if len(self.keys) != len(parts):
            self.keys = [None] * len(parts)
        for index, part in enumerate(parts):
            if isinstance(part, Tensor) and self.keys[index] is None:
                self.keys[index] = self._by_shape(part, call, parts)
        self.complete = True

    def _by_shape(self, part: Tensor, call: Call, parts: Sequence[Any]) -> Key:
        free = [
            key
            for key, value in _arguments(call)
            if key not in self.keys and value.shape == part.shape and value.dtype == part.dtype
        ]
        if len(free) > 1:
            named = [key for key in free if self.name(key) in STREAM_NAMES]
            free = named or free
        if len(free) > 1 and len(parts) == 1:
            free = [key for key in free if self.name(key) in HIDDEN_NAMES] or free
        if len(free) != 1:
            seen = ", ".join(f"{self.name(key)}: {list(value.shape)}" for key, value in _arguments(call))
            raise UnsupportedModelError(
                f"cannot tell which argument an output of shape {list(part.shape)} of {self._where} feeds "
                f"(arguments: {seen}). This model cannot be cached."
            )
        return free[0]

    def name(self, key: Key) -> str:
        """The parameter name of an argument."""
        if isinstance(key, str):
            return key
        return self._names[key] if key < len(self._names) else str(key)

    def hidden(self, parts: Sequence[Any]) -> int:
        """Index of the output that becomes the picture: by its name, else the largest."""
        tensors = [index for index, part in enumerate(parts) if isinstance(part, Tensor)]
        for name in HIDDEN_NAMES:
            for index in tensors:
                key = self.keys[index]
                if key is not None and self.name(key) == name:
                    return index
        return max(tensors, key=lambda index: parts[index].numel())
