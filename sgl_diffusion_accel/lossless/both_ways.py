"""Makes a call both ways: as it comes, without its padding, and with other padding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion_accel.caching.parts.output_tensors import Tensors, take_apart
from sgl_diffusion_accel.errors import LosslessError
from sgl_diffusion_accel.lossless.call_handler import Call
from sgl_diffusion_accel.lossless.padding.cuts import Cut
from sgl_diffusion_accel.slots import ASIDE, Handler, slot_of
from sgl_diffusion_accel.targets import model_class, unwrap

_TRIMMED = {torch.float64: 1e-12, torch.float32: 1e-5}
_PADS = {torch.float64: 1e-12, torch.float32: 1e-6}
_TRIMMED_IN_HALVES, _PADS_IN_HALVES = 0.05, 0.005
"""Relative differences that rounding explains. Sums of fewer terms are taken in another order, which in half precision
a deep model makes a hundredth of; there the changed padding is the sharper test, whose sums keep their order."""


class Verification:
    """Makes the first call of each mask and shape three times more, and raises where it differs by more than rounding.

    Meanwhile nothing of this library stands in front of the model or of its blocks, for calls of this thread.

    Args:
        component: The transformer's name.

    Attributes:
        count: Calls that were verified.
        worst: Largest relative difference of a call without its padding to the same with it.
    """

    def __init__(self, component: str) -> None:
        self.count = 0
        self.worst = 0.0
        self._component = component
        self._same: set[Any] = set()

    def __str__(self) -> str:
        return f"{self.count} calls, largest relative difference {self.worst:.2g}"

    def cut(self, module: nn.Module, cut: Cut, call: Call, trimmed: Call, other_pads: Call) -> None:
        """Verifies a call whose padding is cut, if it is the first of its kind.

        Args:
            module: The transformer, or its wrapper.
            cut: What is cut of the call.
            call: Its arguments.
            trimmed: The same without padding.
            other_pads: The same with other padding.

        Raises:
            LosslessError: The outputs differ by more than rounding.
        """
        shapes = _shapes(call)
        if shapes in cut.verified:
            return
        with torch.no_grad(), _nothing_in_front(module):
            whole, other = (_tensors(_run(module, each), cut) for each in (call, other_pads))
        exact = {} if cut.row.rounds else _PADS
        self._check(module, "with its padding multiplied by ten", whole, other, exact, _PADS_IN_HALVES)
        with torch.no_grad(), _nothing_in_front(module, but_in_blocks=True):
            short = _tensors(cut.restore(_run(module, trimmed)), cut)
        exact = {} if cut.row.rounds else _TRIMMED
        found = self._check(module, "without its padding", whole, short, exact, _TRIMMED_IN_HALVES)
        self.worst = max(self.worst, found)
        cut.verified.add(shapes)
        self.count += 1

    def same(self, module: nn.Module, call: Call, changed: Call, how: str) -> None:
        """Verifies that other arguments give the same output, if these are the first of their shapes.

        Args:
            module: The transformer, or its wrapper.
            call: Its arguments.
            changed: The others.
            how: What they are, for the error.

        Raises:
            LosslessError: The outputs differ by more than rounding.
        """
        shapes = _shapes(call)
        if shapes in self._same:
            return
        with torch.no_grad(), _nothing_in_front(module):
            whole, other = (take_apart(_run(module, each))[0] for each in (call, changed))
        self.worst = max(self.worst, self._check(module, how, whole, other, _TRIMMED, _TRIMMED_IN_HALVES))
        self._same.add(shapes)
        self.count += 1

    def kept(self, module: nn.Module, part: str, kept: Tensor, made: Tensor) -> None:
        """Verifies that what a part of a model gave in an earlier call is what it gives now.

        Args:
            module: The transformer, or its wrapper.
            part: The part, for the error.
            kept: What it gave.
            made: What it gives.

        Raises:
            LosslessError: They differ by more than rounding.
        """
        how = f"of {part} than in an earlier call of the run"
        self.worst = max(self.worst, self._check(module, how, (made,), (kept,), _TRIMMED, _TRIMMED_IN_HALVES))

    def _check(
        self,
        module: nn.Module,
        how: str,
        whole: Tensors,
        other: Tensors,
        allowed: dict[torch.dtype, float],
        allowed_in_halves: float,
    ) -> float:
        worst = 0.0
        for one, two in zip(whole, other, strict=True):
            limit = allowed.get(one.dtype, allowed_in_halves)
            difference = _relative(one, two)
            if not difference <= limit:  # nan is no agreement
                raise LosslessError(
                    f"{model_class(unwrap(module)).__name__} ({self._component}) gives another output {how}: relative "
                    f"difference {difference:.2g}, of which rounding in {one.dtype} explains {limit:g}. What was left "
                    "out matters, or one of its kernels goes wrong with a mask. Type: remove(pipe), and please report "
                    "the model."
                )
            worst = max(worst, difference)
        return worst


def _relative(one: Tensor, two: Tensor) -> float:
    exact = torch.promote_types(one.dtype, torch.float32)
    one, two = one.to(exact), two.to(exact)
    return float((one - two).norm() / one.norm().clamp_min(torch.finfo(exact).tiny))


def _shapes(call: Call) -> tuple[torch.Size, ...]:
    return tuple(value.shape for value in (*call[0], *call[1].values()) if isinstance(value, Tensor))


def _run(module: nn.Module, call: Call) -> Any:
    args, kwargs = call
    return module(*args, **kwargs)


def _tensors(output: Any, cut: Cut) -> Tensors:
    return tuple(map(cut.what_counts, take_apart(output)[0]))


@contextlib.contextmanager
def _nothing_in_front(module: nn.Module, but_in_blocks: bool = False) -> Iterator[None]:
    """Lets all handlers of a model and its parts stand aside in this thread: a cache is to hear nothing of such calls.

    Args:
        module: The model, or its wrapper.
        but_in_blocks: Whether what takes the mask from blocks, and does no more, stays.
    """
    parts = set(module.modules())
    doors = (module, unwrap(module))

    def stands_aside(each: nn.Module, handler: Handler) -> bool:
        stays = but_in_blocks and each not in doors and getattr(handler, "only_enters", False)
        return each in parts and not stays

    # A cache outside of this call may have opened the short way past blocks already. It is open for this thread alone.
    detours = {slot.detour for each in parts if (slot := slot_of(each)) is not None and slot.detour is not None}
    kept = [(detour, detour.answer, detour.taken) for detour in detours]
    before = ASIDE.stands
    try:
        ASIDE.stands = stands_aside
        for detour in detours:
            detour.close()
        yield
    finally:
        ASIDE.stands = before
        for detour, answer, taken in kept:
            detour.answer, detour.taken = answer, taken
