"""Which output of a block is which argument of the next one, learned from a computed step.

In almost every diffusion transformer each tensor that a block returns *is* the object that the next block takes. So
two calls in a row tell the wiring. Where something is added between the blocks (a ControlNet's residuals), the
argument's shape and name tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion_accel.caching.blocks.odd_models import HIDDEN_NAMES, STREAM_NAMES
from sgl_diffusion_accel.errors import UnsupportedModelError
from sgl_diffusion_accel.intercept import eager

Key = int | str
"""Position or name of an argument."""

Call = tuple[Sequence[Any], Mapping[str, Any]]
"""The positional and the keyword arguments of a block."""


def elements(output: Any) -> tuple[Any, ...]:
    """The parts of what a block returns."""
    return tuple(output) if isinstance(output, (tuple, list)) else (output,)


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
                # By identity: equal tensors may be of different streams, and comparing would wait for the device.
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

    def get(self, call: Call, key: Key) -> Any:
        """The argument of a key, also where the call gives by name what others give by position, or the reverse."""
        # With gradient checkpointing FLUX calls its blocks by position, without it by name.
        if isinstance(key, int):
            return call[0][key] if key < len(call[0]) else call[1][self._names[key]]
        return call[1][key] if key in call[1] else call[0][self._names.index(key)]

    def places(self, key: Key) -> tuple[int | None, str | None]:
        """Position and name of an argument, whichever of them a call may give it by."""
        if isinstance(key, int):
            return key, self._names[key] if key < len(self._names) else None
        return (self._names.index(key) if key in self._names else None), key

    def matched(self, parts: Sequence[Any]) -> list[Key | None]:
        """The keys, one for each part of an output.

        Raises:
            UnsupportedModelError: The output has another number of parts than the blocks before it.
        """
        if len(parts) != len(self.keys):
            raise UnsupportedModelError(
                f"the blocks of {self._where} return {len(self.keys)} things, but one of them {len(parts)}. This model "
                "cannot be cached."
            )
        return self.keys

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


@dataclass(frozen=True)
class Form:
    """How the parts of a block's output are put together, in the form in which the block returns them.

    Attributes:
        make: Makes the output of a list of parts; None for a block that returns its only part as it is.
        dtypes: Of the parts; None for a part that is None.
    """

    make: Callable[[list[Any]], Any] | None
    dtypes: tuple[torch.dtype | None, ...]

    def __call__(self, values: Sequence[Any]) -> Any:
        """Puts parts together."""
        parts = [None if dtype is None else value.to(dtype) for value, dtype in zip(values, self.dtypes, strict=True)]
        return parts[0] if self.make is None else self.make(parts)


def form_of(output: Any) -> Form:
    """Tells how to put the parts of a block's output together again.

    Raises:
        UnsupportedModelError: A part is not a tensor.
    """
    parts = elements(output)
    strange = [type(part).__name__ for part in parts if part is not None and not isinstance(part, Tensor)]
    if strange or not parts:
        raise UnsupportedModelError(
            f"a block returns a {(strange or [type(output).__name__])[0]}; only tensors, and tuples or lists of them, "
            "can be cached."
        )
    dtypes = tuple(part.dtype if part is not None else None for part in parts)
    if isinstance(output, Tensor):
        return Form(None, dtypes)
    return Form(getattr(type(output), "_make", type(output)), dtypes)  # a named tuple takes its parts through _make


def passing(wiring: Wiring, form: Form) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """Returns what a skipped block in the middle of a span answers: what it was given, in the form of its output.

    It is the same as `form([wiring.get(call, key) for key in wiring.keys])`, in as little host time as may be.
    """
    plan: list[tuple[Any, Any, torch.dtype | None]] = [
        # Position 0 is a key, though it is false.
        (None, None, None) if key is None else (*wiring.places(key), dtype)
        for key, dtype in zip(wiring.keys, form.dtypes, strict=True)
    ]
    make = form.make

    def answer(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        parts = []
        for position, name, dtype in plan:
            value = None if dtype is None else kwargs[name] if name in kwargs else args[position]
            parts.append(value if value is None or value.dtype is dtype else value.to(dtype))
        return parts[0] if make is None else make(parts)

    return eager(answer)
