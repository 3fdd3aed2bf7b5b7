"""The arguments with which a span is entered, kept until the span's end."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sgl_diffusion_accel.caching.blocks.wiring import Call


class Entry:
    """A block's arguments, with a watch on whether the blocks write over them.

    Args:
        call: The positional and keyword arguments.
        copy: Whether to copy the tensors, for models whose blocks are known to write over them. Inference tensors,
            whose writes torch does not count, are always copied.
    """

    def __init__(self, call: Call, copy: bool) -> None:
        tensors = [value for value in (*call[0], *call[1].values()) if isinstance(value, Tensor)]
        copy = copy or any(tensor.is_inference() for tensor in tensors)
        self.call: Call = _copied(call) if copy else call
        # Watched, and copied only where that is not enough: a copy would cost as much memory as a residual.
        self._versions = [] if copy else [(tensor, tensor._version) for tensor in tensors]

    def changed(self) -> bool:
        """Whether a tensor has been written to since."""
        return any(tensor._version != version for tensor, version in self._versions)


def _copied(call: Call) -> Call:
    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    return [copied(value) for value in call[0]], {name: copied(value) for name, value in call[1].items()}
