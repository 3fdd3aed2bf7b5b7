"""The part of a run that is traced, and the ranges that are marked in it.

What marks them (the torch profiler, NVTX) stands behind `Emitter`. Ranges that are open when the window begins are
opened again inside it, and those that are open when it ends are closed first: a trace holds complete, nested ranges.
"""

from __future__ import annotations

import contextlib
import logging
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
        self._open: list[str] = []
        self._is_prepared = False

    def bounds(self, total: int) -> tuple[int, int]:
        """First recorded step of a loop of `total` steps, and the one behind the last."""
        if self._steps == -1 or total == 1:  # nothing to warm up on
            return 0, total
        return 1, min(1 + self._steps, total)

    @property
    def is_loop_open(self) -> bool:
        """Whether something is under way that ends with its denoising loop at the latest."""
        return (self.is_on or self._is_prepared) and not self._all_stages

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
        return not self._all_stages and self.failure is None and step in (0, first, behind)

    def before_step(self, step: int, total: int, pipeline: str) -> None:
        """A denoising step that is due is about to begin."""
        first, behind = self.bounds(total)
        if step >= behind:
            self._stop()
        elif step == first:
            self._start(f"{pipeline}-{behind - first}_steps")
        elif step < first:
            self._is_prepared = self._attempt(self._emitter.prepare)

    def leave_loop(self) -> None:
        """A denoising loop has ended, however it did."""
        if self.is_loop_open:
            self._stop()

    def push(self, name: str) -> None:
        """Opens a range."""
        self._open.append(name)
        if self.is_on:
            self._emitter.push(name)

    def pop(self) -> None:
        """Closes the range that was opened last."""
        if self._open:
            self._open.pop()
            if self.is_on:
                self._emitter.pop()

    def _start(self, label: str) -> None:
        if self.is_on:
            return
        self.is_on, self._is_prepared = self._attempt(lambda: self._emitter.start(label)), False
        if not self.is_on:
            return
        for name in self._open:
            self._emitter.push(name)

    def _stop(self) -> None:
        if not (self.is_on or self._is_prepared):
            return
        for _ in self._open if self.is_on else ():
            self._emitter.pop()
        self.is_on = self._is_prepared = False
        self._attempt(self._emitter.stop)

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
