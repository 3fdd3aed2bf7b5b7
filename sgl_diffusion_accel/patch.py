"""What was changed on a pipeline, and how it is undone.

A patch is data: a list of interceptions, undone last in, first out. Undoing twice is harmless.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from torch import nn

from sgl_diffusion_accel.intercept import intercept, release
from sgl_diffusion_accel.slots import Handler, slot_of
from sgl_diffusion_accel.targets import Pipe, Target, Targets, components_of, unwrap

_Self = TypeVar("_Self", bound="Patch")

_applied: weakref.WeakKeyDictionary[object, weakref.WeakSet[Patch]] = weakref.WeakKeyDictionary()
"""The patches that were applied to a pipeline; a component that was replaced since leads to none."""


class Patch:
    """What one call of this library changed, with its undo.

    Use it as a context manager to undo at the end of the block, also on an error. A patch that is applied within the
    block of another one of its kind takes that one's place until it is removed itself; then the outer one acts again.

    Attributes:
        kind: `"cache"`, `"attention"`, …; a new patch of a kind replaces the old one on the same module.
        is_open: Whether its `with` block is under way.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        # Weak: a patch that is kept, or that a module's handlers know, must not keep the model's memory.
        self._interceptions: list[tuple[weakref.ref[nn.Module], Handler, str]] = []
        self._components: dict[str, weakref.ref[nn.Module]] = {}
        self._pipe: weakref.ref[object] | None = None
        self.is_open = False
        self._is_suspended = False
        self._undone = False
        self._waiting: list[Patch] = []

    @property
    def active(self) -> bool:
        """Whether the changes are in place, on a component that the pipeline still has."""
        if self._undone or self._is_suspended:
            return False
        return not self._components or len(self.replaced) < len(self._components)

    @property
    def is_in_place(self) -> bool:
        """Whether its handlers are where it has put them: it is neither removed, nor does it wait for another one."""
        return not (self._undone or self._is_suspended)

    @property
    def replaced(self) -> tuple[str, ...]:
        """Components that the pipeline has given up for others since: the patch does nothing to the others."""
        pipe = self._pipe() if self._pipe is not None else None
        return () if pipe is None else tuple(n for n, part in self._components.items() if not _still_has(pipe, n, part))

    @property
    def notice(self) -> str:
        """What keeps the patch from acting where it was applied; empty where nothing does."""
        if self._undone:
            return "removed"
        if self._is_suspended:
            return "another one has taken its place for now"
        names = " and ".join(f"pipe.{name}" for name in self.replaced)
        return f"{names} was replaced since: nothing acts on it. Apply again" if names else ""

    def intercept(self, module: nn.Module, handler: Handler, beside: str = "") -> None:
        """Puts `handler` in front of `module` as part of this patch.

        Args:
            module: The module.
            handler: The handler; it takes the place of the one that this patch has put there.
            beside: A name for a further one that stands beside that.
        """
        kind = f"{self.kind} {beside}".rstrip()
        intercept(module, kind, handler)
        self._interceptions.append((weakref.ref(module), handler, kind))

    def stand_before(self, target: Target, handler: Handler, beside: str = "") -> None:
        """Puts `handler` in front of a component, wherever its calls come in; for the rest see `intercept`."""
        for door in target.doors:
            self.intercept(door, handler, beside)

    @contextlib.contextmanager
    def applying(self, targets: Targets) -> Iterator[None]:
        """Takes the place of the patches of this kind on components, while this one is put there.

        They come back if that fails. Else they are gone for good, but for those whose `with` block is open: they wait.

        Args:
            targets: What this patch is put on.
        """
        try:
            for target in targets:
                for old in dict.fromkeys(patch for patch in patches_of(target.module) if patch.kind == self.kind):
                    old._suspend()
                    self._waiting.append(old)
            yield
        except BaseException:
            self.remove()
            raise
        waiting, self._waiting = self._waiting, []
        for old in waiting:
            if not old.is_open:
                old.remove()
            # What waited for a patch that is gone for good now waits for this one.
            self._waiting += [old] if old.is_open else old._waiting
        self._belongs_to(targets.pipe)

    def _belongs_to(self, pipe: object) -> None:
        if isinstance(pipe, nn.Module):
            return
        parts = {name: unwrap(part) for name, part in components_of(pipe).items()}
        with contextlib.suppress(TypeError):  # an object that can be no key, or not be referred to
            _applied.setdefault(pipe, weakref.WeakSet()).add(self)
            self._pipe = weakref.ref(pipe)
            self._components = {n: weakref.ref(part) for n, part in parts.items() if self in patches_of(part)}

    def remove(self) -> None:
        """Undoes everything that this patch did, newest first. A second call does nothing."""
        if self._undone:
            return
        if not self._is_suspended:
            self._take_off()
        self._undone = True
        self._interceptions.clear()
        self._on_removed()
        # A patch that is itself waiting has no place to give back. Its turn comes in `_come_back`.
        if not self._is_suspended:
            self._let_back()

    def _take_off(self) -> None:
        for found, _, kind in reversed(self._interceptions):
            module = found()
            if module is not None and self in patches_of(module):  # not if another patch has taken this one's place
                release(module, kind)
        self._on_taken_off()

    def _suspend(self) -> None:
        """Takes off what this patch did, until `_come_back`."""
        self._take_off()
        self._is_suspended = True

    def _let_back(self) -> None:
        waiting, self._waiting = self._waiting, []
        for patch in waiting:
            patch._come_back()

    def _come_back(self) -> None:
        """Acts again after a patch that had taken this one's place, or hands on to those that wait for this one."""
        if self._undone:
            self._let_back()
            return
        modules = [
            (module, handler, kind) for found, handler, kind in self._interceptions if (module := found()) is not None
        ]
        others = [patch for module, *_ in modules for patch in patches_of(module) if patch.kind == self.kind]
        if others:  # applied elsewhere meanwhile, to a part of what this one is on
            others[0]._waiting.append(self)
            return
        self._is_suspended = False
        for module, handler, kind in modules:
            intercept(module, kind, handler)
        self._on_put_back()

    def _on_taken_off(self) -> None:
        """Takes off what the patch did besides its interceptions."""

    def _on_put_back(self) -> None:
        """Does that again."""

    def _on_removed(self) -> None:
        """Lets go of what the patch holds besides its interceptions."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._what()}{f' [{self.notice}]' if self.notice else ''}>"

    def _what(self) -> str:
        """What it is, in a line."""
        return self.kind

    def __enter__(self: _Self) -> _Self:
        self.is_open = not self._undone
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.is_open = False
        self.remove()


def _still_has(pipe: object, name: str, part: weakref.ref[nn.Module]) -> bool:
    present = getattr(pipe, name, None)
    # Unwrapped: torch.compile's wrapper around the same model replaces nothing.
    return isinstance(present, nn.Module) and unwrap(present) is part()


class PatchHandler:
    """A handler that knows the patch it belongs to, so that the patch can be found from the module."""

    patch: Patch


def patches_of(module: nn.Module) -> Iterator[Patch]:
    """Yields the patches on one module, newest first."""
    slot = slot_of(module)
    for handler in list(slot.handlers) if slot else []:
        if isinstance(handler, PatchHandler):
            yield handler.patch


def patches_on(pipe: Pipe) -> list[Patch]:
    """The patches of this library on a pipeline or a module, each once, newest of each component first.

    Args:
        pipe: A diffusers pipeline, or a module that was patched by itself.

    Raises:
        ConfigTypeError: `pipe` is neither.
    """
    return list(dict.fromkeys(patch for module in _modules(pipe) for patch in patches_of(module)))


def remove(pipe: Pipe) -> None:
    """Undoes everything that this library did to a pipeline or a transformer, newest first.

    Harmless when nothing was done.

    Args:
        pipe: A diffusers pipeline, or a module that was patched by itself.

    Raises:
        ConfigTypeError: `pipe` is neither.

    Example:
        >>> remove(pipe)
    """
    for module in _modules(pipe):
        while patches := list(patches_of(module)):  # one may come back where another is removed
            patches[0].remove()
    # Also those on a component that the pipeline has exchanged since, which is not among its modules any more.
    for patch in list(_applied_to(pipe)):
        patch.remove()


def _applied_to(pipe: object) -> Iterable[Patch]:
    try:
        return _applied.get(pipe, ())
    except TypeError:  # an object that can be no key
        return ()


def _modules(pipe: object) -> list[nn.Module]:
    return [unwrap(part) for part in components_of(pipe).values()]
