"""What stands in front of a component, and of modules without processors, while a backend is set there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sgl_diffusion_accel.attention.redirect import Redirect
from sgl_diffusion_accel.attention.sites import Scope
from sgl_diffusion_accel.attention.underway import Outer
from sgl_diffusion_accel.loop.session import Session
from sgl_diffusion_accel.patch import Patch, PatchHandler
from sgl_diffusion_accel.targets import Target, unwrap


@dataclass(frozen=True)
class Steps:
    """Denoising steps at both ends of a run that keep PyTorch's own attention."""

    first: int = 0
    last: int = 0

    def __bool__(self) -> bool:
        return self.first > 0 or self.last > 0

    def includes(self, step: int, total: int) -> bool:
        """Whether a step uses the backend."""
        return self.first <= step < total - self.last


class ComponentHandler(PatchHandler):
    """Stands in front of a component: turns the backend on and off by the denoising step, for the call at hand.

    Args:
        patch: The patch that it belongs to.
        session: Of the patch.
        ended: Is told of each call that has ended, with the attention calls that were seen in it.
        target: The component.
        redirect: Where its attention goes.
        steps: Denoising steps that keep PyTorch's own attention.
        is_scope: Whether the component computes attention itself, without processors, and is redirected as a whole.
    """

    def __init__(
        self,
        patch: Patch,
        session: Session,
        ended: Callable[[Redirect, nn.Module, int], None],
        target: Target,
        redirect: Redirect,
        steps: Steps,
        is_scope: bool,
    ) -> None:
        self.patch = patch
        self._session = session
        self._ended = ended
        self._component = target.name
        self._redirect = redirect
        self._steps = steps
        self._is_scope = is_scope
        self._has_wrapper = target.is_wrapped

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Outer, Any] | None:
        """Begins a call of the component."""
        # Asked of the model alone: a call cut off by Ctrl-C leaves `is_inside` set, and the wrapper begins the next
        # one.
        if self._has_wrapper and self._redirect.call.is_inside and unwrap(module) is module:
            return None  # the wrapper has entered this call already
        is_on = True
        # Without a step window no call has to be placed: the backend acts in loops that are not known, too.
        if self._steps:
            where = self._session.enter(self._component, module, args, kwargs)
            is_on = where is not None and self._steps.includes(where.step, where.run.total)
        scope = _enter(self._redirect) if self._is_scope else None
        return self._redirect.call.begin(is_on), scope

    def leave(self, module: nn.Module, token: tuple[Outer, Any] | None, output: Any) -> Any:
        """Ends it."""
        if token is not None:
            self._ended(self._redirect, unwrap(module), self._end(token))
        return output

    def fail(self, _: nn.Module, token: tuple[Outer, Any] | None) -> None:
        """Ends a call that raised."""
        if token is not None:
            self._end(token)

    def _end(self, token: tuple[Outer, Any]) -> int:
        outer, scope = token
        _exit(self._redirect, scope)
        return self._redirect.call.end(outer)


class ScopeHandler(PatchHandler):
    """Stands in front of a module without processors: redirects the attention that is called inside, in this thread."""

    def __init__(self, patch: Patch, redirect: Redirect) -> None:
        self.patch = patch
        self._redirect = redirect

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG002
        """Begins a call."""
        return _enter(self._redirect)

    def leave(self, _: nn.Module, token: Any, output: Any) -> Any:
        """Ends it."""
        _exit(self._redirect, token)
        return output

    def fail(self, _: nn.Module, token: Any) -> None:
        """Ends a call that raised."""
        _exit(self._redirect, token)


def _enter(redirect: Redirect) -> Any:
    """Enters a scope unless this thread is inside one of this redirect."""
    if redirect.call.is_scoped:
        return None
    scope: Any = Scope(redirect)
    scope.__enter__()
    redirect.call.is_scoped = True
    return scope


def _exit(redirect: Redirect, scope: Any) -> None:
    if scope is not None:
        redirect.call.is_scoped = False
        scope.__exit__(None, None, None)
