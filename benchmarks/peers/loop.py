"""Where a call of the transformer stands in a run, for the peers that keep something for each run and branch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from torch import nn

R = TypeVar("R")


class Loop(Generic[R]):
    """Branch and step of the present call, and what a peer keeps during a run.

    Attributes:
        branch: Name of the cache context that the pipeline has entered, such as "cond"; empty outside of any.
        step: Index of the denoising step, counted for each branch.
        run: What is kept during a run, made anew when one begins.

    Args:
        begin: Makes what is kept during a run.
    """

    def __init__(self, begin: Callable[[], R]) -> None:
        self.branch, self.step, self.run = "", 0, begin()
        self._begin = begin
        self._steps: dict[str, int] = {}
        self._timesteps: dict[str, float] = {}

    def advance(self, timestep: float) -> None:
        """Goes on to the next call. Timesteps fall within a run, so one that does not begins another run."""
        if timestep >= self._timesteps.get(self.branch, math.inf):
            self.run = self._begin()
            self._steps, self._timesteps = {}, {}
        self.step = self._steps.get(self.branch, -1) + 1
        self._steps[self.branch], self._timesteps[self.branch] = self.step, timestep


@contextlib.contextmanager
def following(transformer: Any, begin: Callable[[], R]) -> Iterator[Loop[R]]:
    """Follows the calls of a transformer of diffusers until the context ends."""
    loop, named = Loop(begin), transformer.cache_context

    @contextlib.contextmanager
    def cache_context(name: str, **details: Any) -> Iterator[None]:
        before, loop.branch = loop.branch, name
        try:
            with named(name, **details):
                yield
        finally:
            loop.branch = before

    def advance(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module, args
        loop.advance(float(kwargs["timestep"].flatten()[0]))

    hook = transformer.register_forward_pre_hook(advance, with_kwargs=True)
    try:
        with replaced(transformer, "cache_context", cache_context):
            yield loop
    finally:
        hook.remove()


@contextlib.contextmanager
def replaced(owner: nn.Module, name: str, new: Any) -> Iterator[None]:
    """Another attribute of one instance until the context ends; what its class has is the class's alone again then."""
    its_own = name in vars(owner) or name in dict(owner.named_children())
    old = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        if its_own:
            setattr(owner, name, old)
        else:
            delattr(owner, name)
