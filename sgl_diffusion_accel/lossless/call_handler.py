"""Stands in front of a transformer, and lets the parts of the patch change its calls, one after the other."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from sgl_diffusion_accel.patch import Patch, PatchHandler
from sgl_diffusion_accel.slots import With
from sgl_diffusion_accel.targets import Target, unwrap

KIND = "lossless"
"""Of the patch."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


def is_context_parallel(module: nn.Module) -> bool:
    """Whether the tokens of a transformer are divided over several devices."""
    config: Any = getattr(unwrap(module), "_parallel_config", None)
    return getattr(config, "context_parallel_config", None) is not None


class Part(Protocol):
    """One thing that is left out of calls."""

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any:
        """Begins a call: returns `With` other arguments, or a token for the other two."""

    def leave(self, token: Any, output: Any, /) -> Any:
        """Ends a call, and returns what its caller gets."""

    def fail(self, token: Any, /) -> None:
        """Ends a call that raised."""

    def lines(self) -> list[str]:
        """What it did, for `print(patch)`."""

    def line(self) -> str:
        """The same in a few words, for `repr(patch)`."""

    def forget(self) -> None:
        """Lets go of what it remembers."""


class _UnderWay(threading.local):
    """Whether a call is under way in this thread."""

    is_inside: bool = False


class Doors:
    """The ways into a transformer: a call through its wrapper comes by twice, and counts once.

    Args:
        target: The transformer.
    """

    def __init__(self, target: Target) -> None:
        self._has_wrapper = target.is_wrapped
        self._call = _UnderWay()

    def is_second(self, module: nn.Module) -> bool:
        """Whether a call that comes to `module` has come to its wrapper already."""
        # Asked of the model alone: a call cut off by Ctrl-C may leave `is_inside` set, and the wrapper begins the next.
        return self._has_wrapper and self._call.is_inside and unwrap(module) is module

    def pass_through(self) -> None:
        """A call is under way from now on."""
        self._call.is_inside = True

    def leave(self) -> None:
        """It is over."""
        self._call.is_inside = False


class CallHandler(PatchHandler):
    """The parts of the patch in front of one transformer.

    It is innermost: caches find the place of a call in its loop by the tensors that the pipeline passes, and have to
    see those. What a cache answers itself, this one never hears of.

    Args:
        patch: The patch that it belongs to.
        target: The transformer.
        parts: In the order in which they see a call.
    """

    is_inmost = True

    def __init__(self, patch: Patch, target: Target, parts: Sequence[Part]) -> None:
        self.patch = patch
        self.parts = tuple(parts)
        self._doors = Doors(target)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> With | None:
        """Begins a call."""
        if self._doors.is_second(module):
            return None
        tokens: list[tuple[Part, Any]] = []
        try:
            for part in self.parts:
                entered = part.enter(module, args, kwargs)
                if type(entered) is With:
                    args, kwargs, entered = entered.args, entered.kwargs, entered.token
                tokens.append((part, entered))
        except BaseException:
            self._end(tokens)
            raise
        self._doors.pass_through()
        return With(args, kwargs, tokens)

    def leave(self, _: nn.Module, token: list[tuple[Part, Any]] | None, output: Any) -> Any:
        """Ends a call."""
        if token is None:
            return output
        self._doors.leave()
        for part, entered in reversed(token):
            output = part.leave(entered, output)
        return output

    def fail(self, _: nn.Module, token: list[tuple[Part, Any]] | None) -> None:
        """Ends a call that raised."""
        if token is not None:
            self._end(token)

    def _end(self, tokens: list[tuple[Part, Any]]) -> None:
        self._doors.leave()
        for part, entered in reversed(tokens):
            part.fail(entered)
