"""The patch that `set_attention_backend` leaves on a pipeline."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from torch import nn

from sgl_diffusion_accel.attention.auto import MeasuredChoice, Timing
from sgl_diffusion_accel.attention.redirect import LAYER, Redirect
from sgl_diffusion_accel.attention.sites import Scope, Site, find_scopes, redirected
from sgl_diffusion_accel.caching.engine import Session
from sgl_diffusion_accel.patch import Patch, PatchHandler
from sgl_diffusion_accel.targets import unwrap

KIND = "attention"


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


class AttentionPatch(Patch):
    """Attention backends on the components of a pipeline.

    Attributes:
        backends: Component to the name of its backend.
    """

    def __init__(self) -> None:
        super().__init__(KIND)
        self.backends: dict[str, str] = {}
        self._redirects: dict[str, Redirect] = {}
        self._choices: dict[str, MeasuredChoice] = {}
        self._processors: list[tuple[weakref.ref[nn.Module], Any, Any, dict[str, Any]]] = []
        self._layers: dict[str, int] = {}

    @property
    def calls(self) -> dict[str, dict[str, int]]:
        """Attention calls that went to a backend: component, then backend. Calls in compiled code are not counted."""
        return {component: dict(redirect.calls) for component, redirect in self._redirects.items()}

    @property
    def fallbacks(self) -> dict[tuple[str, str], int]:
        """Attention calls that went to PyTorch's own attention, by (layer, reason)."""
        return {key: count for redirect in self._redirects.values() for key, count in redirect.fallbacks.items()}

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
        component: str,
        module: nn.Module,
        sites: Sequence[Site],
        redirect: Redirect,
        name: str,
        steps: Steps,
        choice: MeasuredChoice | None,
    ) -> None:
        """Redirects the attention of one component: the sites given, or without any the modules that compute it."""
        wrapper, module = module, unwrap(module)
        self.backends[component] = name
        self._redirects[component] = redirect
        scopes = [] if sites else find_scopes(module)
        self._layers[component] = len(sites) or len(scopes)
        if choice is not None:
            self._choices[component] = choice
        for scope in scopes:
            self.intercept(scope, _ScopeHandler(self, redirect))
        if module in scopes:
            return
        handler = _Handler(self, redirect, steps)
        self.intercept(module, handler)
        if wrapper is not module:
            self.intercept(wrapper, handler)
        classes: dict[type, type] = {}
        for site in sites:
            made = redirected(site, redirect, classes)
            _set_processor(site.layer, made)
            self._processors.append((weakref.ref(site.layer), site.processor, made, dict(vars(made))))

    def _on_taken_off(self) -> None:
        for redirect in self._redirects.values():  # somebody may have kept a redirected processor
            redirect.is_on = False
        for found, original, made, was in reversed(self._processors):
            layer = found()
            if layer is None or _processor(layer) is not made:
                continue  # something else has been put there since: leave it
            _carry_over(made, original, was)
            _set_processor(layer, original)

    def _on_put_back(self) -> None:
        for redirect in self._redirects.values():
            redirect.is_on = True
        for index, (found, original, made, was) in enumerate(self._processors):
            layer = found()
            if layer is not None and _processor(layer) is original:
                _carry_over(original, made, was)
                self._processors[index] = found, original, made, dict(vars(made))
                _set_processor(layer, made)

    def _on_removed(self) -> None:
        self._processors.clear()

    def _replaced(self) -> int:
        """Layers whose processor something else has replaced."""
        if self._is_suspended:
            return 0
        layers = [(layer(), made) for layer, _, made, _ in self._processors]
        return sum(1 for layer, made in layers if layer is not None and _processor(layer) is not made)

    def _what(self) -> str:
        return "; ".join(f"attention of {component}: {name}" for component, name in self.backends.items())

    def __str__(self) -> str:
        lines = []
        notice = f" [{self.notice}]" if self.notice else ""
        for component, name in self.backends.items():
            lines.append(f"attention of {component}: {name}, in {self._layers[component]} places{notice}")
            calls = ", ".join(f"{count} by {each}" for each, count in self.calls[component].items())
            lines.append(f"  calls: {calls or 'none yet (compiled ones are not counted)'}")
        for reason, (layers, calls_) in _by_reason(self.fallbacks).items():
            lines.append(f"  {calls_} calls of {layers} layers went to PyTorch's own attention: {reason}")
        if any(choice.was_compiled for choice in self._choices.values()):
            lines.append(
                "  compiled calls took PyTorch's own attention: nothing can be timed there; run once uncompiled"
            )
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


def _carry_over(source: Any, target: Any, was: Mapping[str, Any]) -> None:
    """Sets on one processor what others have set on another meanwhile, such as diffusers' own backend."""
    changes = {key: value for key, value in vars(source).items() if key != LAYER and was.get(key) is not value}
    vars(target).update(changes)


def _processor(layer: nn.Module) -> Any:
    return vars(layer).get("processor") or layer._modules.get("processor")


def _set_processor(layer: nn.Module, processor: Any) -> None:
    """Puts a processor where the old one was; `nn.Module` would move one that is a module to the end."""
    home = layer._modules if "processor" in layer._modules else vars(layer)
    home["processor"] = processor


class _Handler(PatchHandler):
    """Stands in front of a component: turns the backend on and off by the denoising step."""

    def __init__(self, patch: AttentionPatch, redirect: Redirect, steps: Steps) -> None:
        self.patch = patch
        self._redirect = redirect
        self._steps = steps
        self._session = Session()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begins a call of the component."""
        if self._steps:
            where = self._session.enter(unwrap(module), args, kwargs)
            self._redirect.is_on = where is not None and self._steps.includes(where[1], where[0].total)

    def leave(self, _: nn.Module, token: None, output: Any) -> Any:  # noqa: ARG002
        """Ends it."""
        return output

    def fail(self, _: nn.Module, token: None) -> None:
        """Nothing is left to be undone."""


class _ScopeHandler(PatchHandler):
    """Stands in front of a module without processors: redirects the attention that is called inside."""

    def __init__(self, patch: AttentionPatch, redirect: Redirect) -> None:
        self.patch = patch
        self._redirect = redirect

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG002
        """Begins a call."""
        scope: Any = Scope(self._redirect)
        scope.__enter__()
        return scope

    def leave(self, _: nn.Module, token: Any, output: Any) -> Any:
        """Ends it."""
        token.__exit__(None, None, None)
        return output

    def fail(self, _: nn.Module, token: Any) -> None:
        """Ends a call that raised."""
        token.__exit__(None, None, None)
