"""The part of a run that is traced, and the ranges that are marked in it.

What marks them (the torch profiler, NVTX) stands behind `Emitter`. Ranges that are open when the window begins are
opened again inside it, and those that are open when it ends are closed first: a trace holds complete, nested ranges.
A window belongs to the thread that has opened it, since that is the one a profiler records; others pass it by.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger(__name__)


class Emitter(Protocol):
    """Marks nested ranges for a profiler, and turns that profiler on and off."""

    def prepare(self) -> None:
        """Warms the profiler up, one denoising step before `start`."""

    def start(self, label: str) -> None:
        """Turns it on; `label` tells what is recorded."""

    def stop(self) -> None:
        """Turns it off, also if it has only been prepared."""

    def push(self, name: str) -> None:
        """Opens a range."""

    def pop(self) -> None:
        """Closes the range that was opened last."""


class _Thread(threading.local):
    """The ranges that are open in one thread, by name."""

    def __init__(self) -> None:
        self.open: list[str] = []


class Window:
    """Passes ranges on to an emitter while the chosen part of a run lasts.

    A profiler that fails must not end the run that it watches: what it raises is logged, and the window stays shut.

    Args:
        emitter: Marks the ranges.
        steps: Denoising steps to record after one step of warm-up; -1 for all, without warm-up.
        all_stages: Whether to record whole pipeline calls instead.

    Attributes:
        is_on: Whether it is recording.
        failure: What the profiler raised, None if it did not.
    """

    def __init__(self, emitter: Emitter, steps: int, all_stages: bool) -> None:
        self.is_on = False
        self.failure: str | None = None
        self._emitter = emitter
        self._steps = steps
        self._all_stages = all_stages
        self._thread = _Thread()
        self._is_prepared = False
        self._owner: int | None = None
        self._lock = threading.Lock()

    def bounds(self, total: int) -> tuple[int, int]:
        """First recorded step of a loop of `total` steps, and the one behind the last."""
        if self._steps == -1 or total == 1:  # nothing to warm up on
            return 0, total
        return 1, min(1 + self._steps, total)

    @property
    def is_loop_open(self) -> bool:
        """Whether something is under way that ends with its denoising loop at the latest."""
        return (self.is_on or self._is_prepared) and self._is_mine and not self._all_stages

    @property
    def is_recording_here(self) -> bool:
        """Whether it is recording, and this thread."""
        return self.is_on and self._is_mine

    def begin_call(self, pipeline: str) -> None:
        """A pipeline call begins."""
        if self._all_stages:
            self._start(f"{pipeline}-full_stages")

    def end_call(self) -> None:
        """A pipeline call ends."""
        self._stop()

    def is_due(self, step: int, total: int) -> bool:
        """Whether the window changes between the steps before and at `step`, counted from the loop's begin."""
        first, behind = self.bounds(total)
        is_free = self._owner is None or self._is_mine
        return not self._all_stages and self.failure is None and is_free and step in (0, first, behind)

    def before_step(self, step: int, total: int, pipeline: str) -> None:
        """A denoising step that is due is about to begin."""
        first, behind = self.bounds(total)
        if step >= behind:
            self._stop()
        elif step == first:
            self._start(f"{pipeline}-{behind - first}_steps")
        elif step < first and self._claim():
            self._is_prepared = self._attempt(self._emitter.prepare)
            self._owner = self._owner if self._is_prepared else None

    def leave_loop(self) -> None:
        """A denoising loop has ended, however it did."""
        if self.is_loop_open:
            self._stop()

    def push(self, name: str) -> None:
        """Opens a range."""
        self._thread.open.append(name)
        if self.is_recording_here:
            self._emitter.push(name)

    def pop(self) -> None:
        """Closes the range that was opened last."""
        if self._thread.open:
            self._thread.open.pop()
            if self.is_recording_here:
                self._emitter.pop()

    @property
    def _is_mine(self) -> bool:
        return self._owner == threading.get_ident()

    def _claim(self) -> bool:
        """Makes the window this thread's, unless it is another's."""
        with self._lock:
            self._owner = self._owner or threading.get_ident()
            return self._is_mine

    def _start(self, label: str) -> None:
        if not self._claim() or self.is_on:
            return
        self.is_on, self._is_prepared = self._attempt(lambda: self._emitter.start(label)), False
        if not self.is_on:
            self._owner = None
            return
        for name in self._thread.open:
            self._emitter.push(name)

    def _stop(self) -> None:
        if not (self.is_on or self._is_prepared) or not self._is_mine:
            return
        for _ in self._thread.open if self.is_on else ():
            self._emitter.pop()
        self.is_on = self._is_prepared = False
        self._attempt(self._emitter.stop)
        self._owner = None

    def _attempt(self, action: Callable[[], None]) -> bool:
        if self.failure is not None:
            return False
        try:
            action()
        except Exception as error:  # whatever a profiler raises, the pipeline goes on
            self.failure = f"{type(error).__name__}: {error}"
            with contextlib.suppress(Exception):
                self._emitter.stop()
            logger.warning("the profiler failed, and the run goes on without it: %s", self.failure, exc_info=True)
            return False
        return True
