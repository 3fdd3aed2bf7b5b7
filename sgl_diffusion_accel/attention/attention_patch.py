"""The patch that `set_attention_backend` leaves on a pipeline."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from torch import nn

from sgl_diffusion_accel.attention.attention_handlers import ComponentHandler, ScopeHandler, Steps
from sgl_diffusion_accel.attention.measured_choice import MeasuredChoice, Timing
from sgl_diffusion_accel.attention.redirect import LAYER, Redirect
from sgl_diffusion_accel.attention.sites import Site, find_others, find_scopes, processor_of, redirected
from sgl_diffusion_accel.loop.session import Session, unplaced_lines
from sgl_diffusion_accel.patch import Patch, patches_of
from sgl_diffusion_accel.targets import TRANSFORMERS, Target

logger = logging.getLogger(__name__)

KIND = "attention"


@dataclass(frozen=True)
class _Exchanged:
    """A processor that has been put in another's place.

    Attributes:
        component: Where its layer is.
        layer: The layer.
        original: The processor that was there.
        made: The redirected one.
        was: The attributes of the redirected one when it was put there.
    """

    component: str
    layer: weakref.ref[nn.Module]
    original: Any
    made: Any
    was: dict[str, Any]

    @property
    def is_replaced(self) -> bool:
        """Whether something else has been put there since."""
        layer = self.layer()
        return layer is not None and processor_of(layer) is not self.made


class AttentionPatch(Patch):
    """Attention backends on the components of a pipeline.

    Args:
        config: The settings that it was applied with.

    Attributes:
        config: The same.
        backends: Component to the name of its backend.
        session: Where its calls are, for one that acts at some denoising steps alone.
        unseen: Component to the calls of it that ended without any attention call in its redirected layers, as far as
            is known: neither by the backend nor by PyTorch's own. Compiled code is left out.
    """

    def __init__(self, config: object = None) -> None:
        super().__init__(KIND)
        self.config = config
        self.backends: dict[str, str] = {}
        self.session = Session("keep the model's own attention")
        self.unseen: Counter[str] = Counter()
        self._seen: set[str] = set()
        self._lock = threading.Lock()  # of these two
        self._redirects: dict[str, Redirect] = {}
        self._choices: dict[str, MeasuredChoice] = {}
        self._processors: list[_Exchanged] = []
        self._layers: dict[str, int] = {}
        self._left: dict[str, list[str]] = {}

    @property
    def calls(self) -> dict[str, dict[str, int]]:
        """Attention calls that went to a backend: component, then backend. Calls in compiled code are not counted."""
        return {component: redirect.counts()[0] for component, redirect in self._redirects.items()}

    @property
    def fallbacks(self) -> dict[tuple[str, str], int]:
        """Attention calls that went to PyTorch's own attention, by (layer, reason)."""
        return {key: count for redirect in self._redirects.values() for key, count in redirect.counts()[1].items()}

    @property
    def choices(self) -> dict[str, str]:
        """With `"auto"`: kind of call to the backend that was picked."""
        return {label: name for choice in self._choices.values() for label, name in choice.picks.items()}

    @property
    def timings(self) -> dict[str, list[Timing]]:
        """With `"auto"`: kind of call to what was measured; nothing for choices that were remembered."""
        return {label: found for choice in self._choices.values() for label, found in choice.timings.items()}

    def attach(
        self,
        target: Target,
        sites: Sequence[Site],
        redirect: Redirect,
        name: str,
        steps: Steps,
        choice: MeasuredChoice | None,
    ) -> None:
        """Redirects the attention of one component: the sites given, or without any the modules that compute it."""
        component, module = target.name, target.module
        self.backends[component] = name
        self._redirects[component] = redirect
        scopes = [] if sites else find_scopes(module)
        self._layers[component] = len(sites) or len(scopes)
        self._left[component] = find_others(module) if sites else []
        if choice is not None:
            self._choices[component] = choice
        for scope in scopes:
            if scope is not module:
                self.intercept(scope, ScopeHandler(self, redirect))
        if scopes and component not in TRANSFORMERS:
            steps = Steps()  # a text encoder or a VAE has no denoising steps
        handler = ComponentHandler(self, self.session, self._ended, target, redirect, steps, module in scopes)
        self.stand_before(target, handler)
        classes: dict[type, type] = {}
        for site in sites:
            made = redirected(site, redirect, classes)
            _set_processor(site.layer, made)
            was = dict(vars(made))
            self._processors.append(_Exchanged(component, weakref.ref(site.layer), site.processor, made, was))

    def _ended(self, redirect: Redirect, module: nn.Module, seen: int) -> None:
        """Ends a call of a component, in which so many attention calls of redirected layers were seen.

        None at all means that the layers go another way than the one that was redirected, and the user is told; or that
        a cache has skipped them. One that skips computes first: so the first call tells, and later ones where nothing
        can skip.
        """
        component = redirect.component
        if seen:
            self._seen.add(component)
            return
        if redirect.was_traced or not redirect.is_on:
            return
        if component in self._seen and _may_skip(module) and not self._all_replaced(component):
            return
        with self._lock:
            self.unseen[component] += 1
            is_first = self.unseen[component] == 1
        if is_first:
            logger.warning(
                "the attention backend %r serves nothing in a call of %s (%s): it ended without any attention call in "
                "the %d places where the backend is set: %s",
                self.backends[component],
                component,
                type(module).__name__,
                self._layers[component],
                self._why_unseen(),
            )

    def _why_unseen(self) -> str:
        if self._replaced():
            return f"{self._replaced()} layers were given other processors since. Set the backend again after that."
        return "something computes attention there that cannot be redirected."

    def _on_taken_off(self) -> None:
        self.session.runs.clear()
        for redirect in self._redirects.values():  # somebody may have kept a redirected processor
            redirect.is_on = False
        for each in reversed(self._processors):
            layer = each.layer()
            if layer is None or each.is_replaced:
                continue  # something else has been put there since: leave it
            _carry_over(each.made, each.original, each.was)
            _set_processor(layer, each.original)

    def _on_put_back(self) -> None:
        for redirect in self._redirects.values():
            redirect.is_on = True
        for index, each in enumerate(self._processors):
            layer = each.layer()
            if layer is not None and processor_of(layer) is each.original:
                _carry_over(each.original, each.made, each.was)
                self._processors[index] = replace(each, was=dict(vars(each.made)))
                _set_processor(layer, each.made)

    def _on_removed(self) -> None:
        self._processors.clear()

    def _replaced(self) -> int:
        """Layers whose processor something else has replaced."""
        if self._is_suspended:
            return 0
        return sum(each.is_replaced for each in self._processors)

    def _all_replaced(self, component: str) -> bool:
        mine = [each for each in self._processors if each.component == component]
        return bool(mine) and all(each.is_replaced for each in mine)

    def __repr__(self) -> str:
        backends = ", ".join(f"{name} on {component}" for component, name in self.backends.items())
        parts = [f"attention: {backends}", self.notice or "active"]
        if self.session.stats.outside:
            parts.append(f"{self.session.stats.outside} calls not placed in a loop: see print(patch)")
        if self.unseen:
            parts.append(f"{sum(self.unseen.values())} calls that it served nothing of: see print(patch)")
        return f"<{'; '.join(parts)}>"

    def __str__(self) -> str:
        lines = []
        notice = f" [{self.notice}]" if self.notice else ""
        for component, name in self.backends.items():
            lines.append(f"attention of {component}: {name}, in {self._layers[component]} places{notice}")
            calls = ", ".join(f"{count} by {each}" for each, count in self.calls[component].items())
            lines.append(f"  calls: {calls or 'none yet (compiled ones are not counted)'}")
            if self._left[component]:
                left = ", ".join(self._left[component][:4])
                lines.append(f"  keep PyTorch's own, having no processor: {left}")
        for reason, (layers, calls_) in _by_reason(self.fallbacks).items():
            lines.append(f"  {calls_} calls of {layers} layers went to PyTorch's own attention: {reason}")
        for component, count in self.unseen.items():
            lines.append(
                f"  {count} calls of {component} ended without any attention call in these places, and the backend "
                f"served none of it: {self._why_unseen()}"
            )
        lines += [f"  {told}" for told in unplaced_lines(self.session.stats, "kept the model's own attention")]
        if any(choice.was_compiled for choice in self._choices.values()):
            lines.append(
                "  compiled calls took PyTorch's own attention: nothing can be timed there; run once uncompiled"
            )
        if any(redirect.was_unverified for redirect in self._redirects.values()):
            lines.append("  compiled calls were not verified: no value can be looked at there; run once uncompiled")
        if self._replaced():
            lines.append(
                f"  {self._replaced()} layers were given other processors since, and use no backend: set it again"
            )
        lines += [f"  {label}: {name}" for label, name in self.choices.items()]
        for label, found in self.timings.items():
            lines.append(f"  measured for {label}:")
            for each in sorted(found, key=lambda timing: timing.milliseconds or float("inf")):
                time = "      –" if each.milliseconds is None else f"{each.milliseconds:9.4g} ms"
                error = "" if each.error is None else f"  error {each.error:.2g}"
                lines.append(f"    {each.backend:<12}{time}{error}{'  out: ' + each.note if each.note else ''}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def _by_reason(fallbacks: Mapping[tuple[str, str], int]) -> dict[str, tuple[int, int]]:
    """Reason to (layers, calls)."""
    found: dict[str, tuple[int, int]] = {}
    for (_, reason), count in fallbacks.items():
        layers, calls = found.get(reason, (0, 0))
        found[reason] = (layers + 1, calls + count)
    return found


_CACHED = ("is_cache_enabled", "_is_cached")
"""Attributes by which a model tells that diffusers' own caches, or those of cache-dit, are on."""


def _may_skip(module: nn.Module) -> bool:
    """Whether something else stands in front of a module, or in it, that may answer without computing attention."""
    others = any(patch.kind != KIND for patch in patches_of(module))
    return others or any(getattr(module, name, False) for name in _CACHED)


def _carry_over(source: Any, target: Any, was: Mapping[str, Any]) -> None:
    """Sets on one processor what others have set on another meanwhile, such as diffusers' own backend."""
    changes = {key: value for key, value in vars(source).items() if key != LAYER and was.get(key) is not value}
    vars(target).update(changes)


def _set_processor(layer: nn.Module, processor: Any) -> None:
    """Puts a processor where the old one was; `nn.Module` would move one that is a module to the end."""
    home = layer._modules if "processor" in layer._modules else vars(layer)
    home["processor"] = processor
