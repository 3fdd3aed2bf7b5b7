"""Stands in front of a transformer under a cache: the one way into a cached call, whatever it skips."""

from __future__ import annotations

import threading
from abc import abstractmethod
from typing import Any, Generic, Protocol, TypeVar

from torch import nn

from sgl_diffusion_accel.caching.foreign import FORBIDDEN, refuse_late_cache
from sgl_diffusion_accel.caching.full_calls import full_call_argument, full_call_remark
from sgl_diffusion_accel.caching.parts.policies import Decision
from sgl_diffusion_accel.caching.run_log import RunLog
from sgl_diffusion_accel.loop.runs import Run
from sgl_diffusion_accel.loop.session import Session, Where
from sgl_diffusion_accel.patch import Patch, PatchHandler
from sgl_diffusion_accel.slots import Instead


class CachedCall(Protocol):
    """A transformer call that is under way."""

    @property
    def run(self) -> Run:
        """The run that it belongs to."""

    def finish(self, output: Any) -> Any:
        """Ends it: keeps what was computed, and returns what the caller gets."""

    def cut_off(self, output: Any) -> Any:
        """Ends it where the patch was taken off meanwhile."""

    def abandon(self) -> None:
        """Lets go of all tensors: it failed, and its traceback may keep this object for long."""


_Call = TypeVar("_Call", bound=CachedCall)


class CacheHandler(PatchHandler, Generic[_Call]):
    """Caches the calls of one transformer, and knows the one that is under way in this thread.

    Args:
        patch: The patch that it belongs to.
        component: The transformer's name.
        session: Shared by the transformers of the patch.
        log: Of the transformer.
    """

    forbids_enable_cache = FORBIDDEN

    def __init__(self, patch: Patch, component: str, session: Session, log: RunLog) -> None:
        self.patch = patch
        self._component = component
        self._session = session
        self._log = log
        self._threads = threading.local()

    @property
    def current(self) -> _Call | None:
        """The transformer call that is under way in this thread."""
        return getattr(self._threads, "current", None)

    @abstractmethod
    def _begin(self, module: nn.Module, where: Where) -> _Call | Instead:
        """Begins a call that has a place, or answers for it."""

    def _beside(self, where: Where) -> _Call | None:  # noqa: ARG002
        """Begins a call that is neither predicted nor kept; None where it is of no interest."""
        return None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | Instead | None:
        """Begins a transformer call: where is it, and is it computed?"""
        if self.current is not None:  # the transformer's wrapper (`targets.Target`) has entered this call already
            return None
        where = self._session.enter(self._component, module, args, kwargs)
        if where is None:
            return None
        # Once a run: it looks through all modules of the transformer.
        if where.step == 0:
            refuse_late_cache(module)
        # Such a call is not even kept: its blocks are not those of other steps, or have a cache of their own to write.
        argument = full_call_argument(kwargs)
        if argument is not None:
            self._log.decided(where, Decision(True, "arguments forbid skipping"))
            self._log.tell(where.run, full_call_remark(argument))
            begun: _Call | Instead | None = self._beside(where)
        else:
            begun = self._begin(module, where)
        if not isinstance(begun, Instead):
            self._threads.current = begun
        return begun

    def leave(self, _: nn.Module, token: _Call | None, output: Any) -> Any:
        """Ends a transformer call."""
        if token is None:
            return output
        self._threads.current = None
        if not self.patch.is_in_place:
            return token.cut_off(output)
        try:
            return token.finish(output)
        except BaseException:
            # What is kept by half must not serve a later step.
            self._drop(token)
            raise

    def fail(self, _: nn.Module, token: _Call | None) -> None:
        """Ends a transformer call that raised, and with it the run's memory."""
        if token is not None:
            self._threads.current = None
            self._drop(token)

    def _drop(self, token: _Call) -> None:
        self._session.runs.discard(token.run)
        token.abandon()
