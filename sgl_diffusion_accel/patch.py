"""What was changed on a pipeline, and how it is undone.

A patch is data: a list of interceptions, undone last in, first out. Undoing twice is harmless.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import TracebackType

from torch import nn

from sgl_diffusion_accel.errors import ConfigTypeError
from sgl_diffusion_accel.intercept import Handler, intercept, release, slot_of
from sgl_diffusion_accel.targets import unwrap


class Patch:
    """What one call of this library changed, with its undo.

    Use it as a context manager to undo at the end of the block, also on an error.

    Attributes:
        kind: `"cache"`, `"attention"`, …; a new patch of a kind replaces the old one on the same module.
        active: Whether the changes are in place.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        # Weak: a patch that is kept, or that a module's handlers know, must not keep the model's memory.
        self._interceptions: list[weakref.ref[nn.Module]] = []
        self._undone = False

    @property
    def active(self) -> bool:
        """Whether the changes are in place."""
        return not self._undone

    def intercept(self, module: nn.Module, handler: Handler) -> None:
        """Puts `handler` in front of `module` as part of this patch."""
        intercept(module, self.kind, handler)
        self._interceptions.append(weakref.ref(module))

    def remove(self) -> None:
        """Undoes everything that this patch did, newest first. A second call does nothing."""
        if self._undone:
            return
        self._undone = True
        while self._interceptions:
            module = self._interceptions.pop()()
            if module is not None and self in patches_of(module):  # not if another patch has taken this one's place
                release(module, self.kind)
        self._on_removed()

    def _on_removed(self) -> None:
        """Lets go of what the patch holds besides its interceptions."""

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


class PatchHandler:
    """A handler that knows the patch it belongs to, so that the patch can be found from the module."""

    patch: Patch


def patches_of(module: nn.Module) -> Iterator[Patch]:
    """Yields the patches on one module, newest first."""
    slot = slot_of(module)
    for handler in list(slot.handlers) if slot else []:
        if isinstance(handler, PatchHandler):
            yield handler.patch


def patches_on(pipe: object) -> list[Patch]:
    """The patches of this library on a pipeline or a module, each once, newest of each component first.

    Args:
        pipe: A diffusers pipeline, or a module that was patched by itself.

    Raises:
        ConfigTypeError: `pipe` is neither.
    """
    return list(dict.fromkeys(patch for module in _modules(pipe) for patch in patches_of(module)))


def remove(pipe: object) -> None:
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
        for patch in list(patches_of(module)):
            patch.remove()


def _modules(pipe: object) -> list[nn.Module]:
    if isinstance(pipe, nn.Module):
        return [unwrap(pipe)]
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise ConfigTypeError(f"expected a diffusers pipeline or a module, got {type(pipe).__name__}.")
    return [unwrap(part) for part in components.values() if isinstance(part, nn.Module)]
