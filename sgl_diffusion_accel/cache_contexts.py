"""The cache contexts of diffusers that are entered: `with transformer.cache_context("cond"):` names a branch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn

from sgl_diffusion_accel.frames import Place, entering, frames_from, key_of


class _CacheContext:
    """A cache context that a pipeline, or a loop of one's own, has entered."""

    def __init__(self, module: nn.Module, name: str, details: dict[str, Any], place: Place) -> None:
        self.module, self.name, self.details, self.place = module, name, details, place

    def is_around_here(self) -> bool:
        """Whether it is around the present call: a generator may have stopped inside of it."""
        return not self.place.may_stop or any(key_of(each) == self.place.key for each in frames_from(sys._getframe(2)))


# By context and not by thread: tasks take turns in one.
_contexts: ContextVar[tuple[_CacheContext, ...]] = ContextVar("cache_contexts", default=())


def cache_context_of(module: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """Tells the cache context that the running pipeline has set on an intercepted module.

    Returns:
        The context's name, such as `"cond"`, and its details (`step_index`, …), or None outside of any.
    """
    for each in reversed(_contexts.get()):
        if each.module is module and each.is_around_here():
            return each.name, each.details
    return None


def listening_cache_context(base: Any) -> Callable[..., Any]:
    """The `cache_context` of an intercepted class, which notes what is entered."""

    @contextlib.contextmanager
    def cache_context(self: nn.Module, name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        entry = _CacheContext(self, name, kwargs, entering())
        _contexts.set((*_contexts.get(), entry))
        try:
            with base.cache_context(self, name, *args, **kwargs) as entered:
                yield entered
        finally:
            # Not by a token: a generator may be closed in another context than it was begun in.
            _contexts.set(tuple(each for each in _contexts.get() if each is not entry))

    cache_context.__doc__ = base.cache_context.__doc__
    return cache_context
