"""Loops that only diffusers' cache context tells of: `cache_context("cond", step_index=i, num_inference_steps=n)`.

Nothing there lives as long as the loop. So a loop is taken to begin anew when its step goes back, or its number of
steps changes; what is kept for one that was given up stays until the next one begins, or the thread ends.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import MutableMapping

from torch import nn

# Two calls of one name in each step would have shown again at step 1.
_SURE_FROM = 2
"""The step from which a loop that began with a name coming twice is believed to be one."""


class ContextLoop:
    """A denoising loop, as cache contexts tell of it.

    Args:
        total: Its number of denoising steps.
        is_doubted: Whether it began with a name that came twice in a step: a run that was given up in its first step
            and begun again looks like two calls of one name (two tiles, say) in the first step of a single run. No
            step is skipped before it is seen which.
    """

    def __init__(self, total: int, is_doubted: bool = False) -> None:
        self.total = total
        self.is_doubted = is_doubted
        self.is_ambiguous = False
        self._step = -1
        self._names: set[tuple[int, str]] = set()

    def goes_on(self, step: int, total: int) -> bool:
        """Whether a call at a step may belong to it."""
        return total == self.total and step >= self._step

    def enter(self, module: nn.Module, name: str, step: int) -> bool:
        """Notes a call; returns whether its name is new in the step."""
        if step != self._step:
            self._step = step
            self._names.clear()
            self.is_doubted &= step < _SURE_FROM
        is_new = (id(module), name) not in self._names
        self._names.add((id(module), name))
        return is_new


class _Loops(threading.local):
    def __init__(self) -> None:
        # Weak: nothing tells the end of such a loop, and it must not keep the model alive.
        self.of: MutableMapping[nn.Module, ContextLoop] = weakref.WeakKeyDictionary()


_loops = _Loops()


def loop_of_context(module: nn.Module, name: str, step: int, total: int) -> ContextLoop | None:
    """The loop of a call.

    Args:
        module: The transformer.
        name: Of the cache context.
        step: Its `step_index`.
        total: Its `num_inference_steps`.

    Returns:
        The loop; None for a call of which the name does not tell which one of the step it is.
    """
    loop = _loops.of.get(module)
    if loop is None or not loop.goes_on(step, total):
        loop = _loops.of[module] = ContextLoop(total)
    if not loop.enter(module, name, step):
        if step == 0:
            loop = _loops.of[module] = ContextLoop(total, is_doubted=True)
            loop.enter(module, name, step)
        else:
            # For good: what one tile returned must never stand in for another.
            loop.is_ambiguous = True
    return None if loop.is_ambiguous or (loop.is_doubted and step > 0) else loop
