"""The patch that `apply_auto` leaves on a pipeline: several patches as one."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Any

from torch import nn

from sgl_diffusion_accel.attention.attention_patch import AttentionPatch
from sgl_diffusion_accel.auto import auto_summary
from sgl_diffusion_accel.auto.auto_config import AutoConfig
from sgl_diffusion_accel.caching.cache_patch import CachePatch
from sgl_diffusion_accel.caching.parts.stats import Stats
from sgl_diffusion_accel.lossless.lossless_patch import LosslessPatch
from sgl_diffusion_accel.patch import Patch, PatchHandler, patches_of

KIND = "auto"

_ENOUGH_CALLS = 8
"""Calls after which it is known which attention kernel is fastest: of two steps at least, with up to four branches."""

_OWN = "sdpa"


class AutoHandler(PatchHandler):
    """Watches a transformer's calls from outside of all others, so that an attention that gains nothing can go."""

    is_watching = True

    def __init__(self, patch: AutoPatch) -> None:
        self.patch: AutoPatch = patch

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Nothing: a call goes through as it is."""

    def leave(self, _: nn.Module, token: None, output: Any) -> Any:  # noqa: ARG002
        """Ends a call."""
        self.patch.after_call()
        return output

    def fail(self, _: nn.Module, token: None) -> None:
        """Nothing."""


class AutoPatch(Patch):
    """What `apply_auto` chose for a pipeline, as one patch.

    Attributes:
        config: The settings that it was applied with.
        left_out: Kind to why there is no such part.
    """

    def __init__(self, config: AutoConfig) -> None:
        super().__init__(KIND)
        self.config = config
        self.left_out: dict[str, str] = {}
        self._parts: dict[str, Patch] = {}
        self._set_aside: list[Patch] = []
        self._calls = 0
        self._lock = threading.Lock()

    @property
    def parts(self) -> Mapping[str, Patch]:
        """Its parts by kind, `"lossless"`, `"cache"` and `"attention"`; those that were left out are missing."""
        return MappingProxyType(self._parts)

    @property
    def stats(self) -> Stats:
        """What its cache did, run by run; empty where it has none."""
        cache = self._parts.get("cache")
        return cache.stats if isinstance(cache, CachePatch) else Stats()

    def held_bytes(self) -> int:
        """Bytes of the tensors that are kept for the runs under way; 0 between runs."""
        held = (part for part in self._parts.values() if isinstance(part, (CachePatch, LosslessPatch)))
        return sum(part.held_bytes() for part in held)

    def add(self, part: Patch) -> None:
        """Makes a patch that has just been applied a part of this one."""
        self._parts[part.kind] = part

    def leave_out(self, kind: str, why: str) -> None:
        """Notes that there is no part of a kind, and why."""
        self._parts.pop(kind, None)
        self.left_out[kind] = why

    def after_call(self) -> None:
        """Takes attention off again once PyTorch's own has turned out to be the fastest for all calls."""
        part = self._parts.get("attention")
        if not isinstance(part, AttentionPatch) or self._calls >= _ENOUGH_CALLS:
            return
        with self._lock:
            self._calls += 1
            choices = set(part.choices.values()) if self._calls == _ENOUGH_CALLS else set()
            if choices == {_OWN} and part.is_in_place:
                part.remove()
                self.leave_out("attention", "it was measured, and PyTorch's own is the fastest on these calls")

    def remove(self) -> None:
        """Removes all of its parts, the last one first. A second call does nothing."""
        if self._undone:
            return
        for part in reversed(self._parts.values()):
            part.remove()
            # While this one waits for another, so do its parts: what waits for them comes back after both.
            self._waiting += part._waiting
            part._waiting = []
        super().remove()

    def _on_taken_off(self) -> None:
        self._set_aside = [part for part in reversed(self._parts.values()) if part.is_in_place]
        for part in self._set_aside:
            part._suspend()

    def _on_put_back(self) -> None:
        for part in reversed(self._set_aside):
            part._come_back()
        self._set_aside = []

    def __enter__(self) -> AutoPatch:
        for part in self._parts.values():
            part.__enter__()
        return super().__enter__()

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for part in self._parts.values():
            part.is_open = False
        super().__exit__(error, value, traceback)

    def standing(self, kind: str) -> list[Patch]:
        """The patches of a kind on its transformers that are none of its parts."""
        modules = [module for found, *_ in self._interceptions if (module := found()) is not None]
        found = (each for module in modules for each in patches_of(module) if each.kind == kind)
        return [each for each in dict.fromkeys(found) if each is not self._parts.get(kind)]

    def _what(self) -> str:
        return auto_summary.line(self)

    def __str__(self) -> str:
        return auto_summary.text(self)

    def _repr_html_(self) -> str:
        return auto_summary.html(self)
