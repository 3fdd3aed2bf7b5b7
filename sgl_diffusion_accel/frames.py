"""Which function a loop or a `with` block stands in, remembered without keeping its frame, and so its variables, alive.

A frame is known by its identity and its code: the identity alone is given to another frame as soon as the function has
returned, and rarely to one of the same code.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType
from typing import Any

FrameKey = tuple[int, int]
"""Identities of a frame and of its code."""

# Not coroutines: a task that waits keeps its context to itself.
_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_ENTERING = ("__enter__", "__aenter__")
_PASSING_ON = ("tqdm", "rich.progress", "fastprogress", "alive_progress", "progressbar")


def key_of(frame: FrameType) -> FrameKey:
    """What a frame is known by."""
    return id(frame), id(frame.f_code)


class Place:
    """A frame that something is entered in.

    Args:
        frame: The frame.

    Attributes:
        key: What it is known by.
        may_stop: Whether it may stop in mid-run and leave what it has entered to whoever goes on: a generator.
    """

    __slots__ = ("_code", "key", "may_stop")

    def __init__(self, frame: FrameType) -> None:
        self.key = key_of(frame)
        self.may_stop = bool(frame.f_code.co_flags & _GENERATORS)
        self._code: CodeType = frame.f_code  # kept, so that no other code gets its identity


def entering() -> Place:
    """The frame with the `with` statement, called from an `__enter__`.

    What is entered by way of something else (an `ExitStack`, a context manager of one's own, written as a class or as a
    generator) is entered in the function that has that in its `with` statement.
    """
    frame = sys._getframe(2)
    while frame.f_back is not None and _enters_for_another(frame):
        frame = frame.f_back
    return Place(frame)


def asking() -> Place:
    """The frame with the `for` statement, called from a `__next__`; generators that pass elements on are passed by."""
    frame = sys._getframe(2)
    while frame.f_back is not None and _passes_on(frame):
        frame = frame.f_back
    return Place(frame)


def _enters_for_another(frame: FrameType) -> bool:
    code = frame.f_code
    if code.co_name in _ENTERING or code.co_filename == contextlib.__file__:
        return True
    # A generator that contextlib runs up to its `yield` is a context manager.
    outer = frame.f_back
    return bool(code.co_flags & _GENERATORS) and outer is not None and outer.f_code.co_filename == contextlib.__file__


def _passes_on(frame: FrameType) -> bool:
    # A progress bar is a generator of its own: it asks for the step in place of the loop.
    module = str(frame.f_globals.get("__name__", ""))
    return frame.f_code.co_name == "<genexpr>" or module.startswith(_PASSING_ON)


def frames_from(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and those around it, from the inside out."""
    while frame is not None:
        yield frame
        frame = frame.f_back


class Locals:
    """A frame's local variables, let go of again at the end.

    Before Python 3.13 reading them leaves a snapshot on the frame, which would keep each tensor that it names alive
    until the next reading: it is emptied, but where the function may have asked for it with `locals()`.
    """

    def __init__(self, frame: FrameType) -> None:
        self._frame = frame

    def __enter__(self) -> Mapping[str, Any]:
        self._mapping = self._frame.f_locals
        self._is_mine = sys.getrefcount(self._mapping) <= _OWN_REFERENCES  # else the function has called locals()
        return self._mapping

    def __exit__(self, *_: object) -> None:
        is_snapshot = sys.version_info < (3, 13) and self._frame.f_code.co_flags & _OPTIMIZED
        if is_snapshot and self._is_mine:
            self._mapping.clear()
        del self._mapping, self._frame


_OWN_REFERENCES = 3  # the frame's, the attribute's, and the one that counting makes
_OPTIMIZED = inspect.CO_OPTIMIZED  # the code of a function, whose locals are not the mapping itself
