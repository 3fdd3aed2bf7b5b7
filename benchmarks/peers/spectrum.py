"""Spectrum (Han et al. 2026, arXiv 2603.01623): what the last block returns is forecast by Chebyshev polynomials."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor, nn

from sgl_diffusion_accel.comparing.measures.block_work import blocks_of

from .loop import Loop, following, replaced

FAMILY = "Spectrum"


@dataclass(frozen=True)
class Setting:
    """One setting; the defaults are those of the authors' code and of SGLang.

    Attributes:
        window: Steps from one computed step to the next at first, N; 1 with a `flex` of 0 computes all.
        flex: What each computed step after the warm-up adds to the window, α.
        weight: Of the polynomials' forecast; the rest is the line through the last two computed steps. 1 is the paper's
            method, the authors recommend 0.5 to 1.
        degree: Of the polynomials, M.
        ridge: Weight of the coefficients' squares in the regression, λ.
        warmup: Steps that are computed at the start of a run.
    """

    window: float = 2.0
    flex: float = 0.75
    weight: float = 1.0
    degree: int = 4
    ridge: float = 0.1
    warmup: int = 5

    @property
    def name(self) -> str:
        """A short name, such as `window 2, flex .75` or `window 2, flex .75, .5 of a line`."""
        line = "" if self.weight == 1 else f", {1 - self.weight:g} of a line"
        return f"window {self.window:g}, flex {self.flex:g}{line}".replace(" 0.", " .")

    def computed_steps(self, steps: int) -> set[int]:
        """Steps of a run that are computed: as many as the window's whole part lie from one to the next."""
        computed, window, skipped = set(range(self.warmup)), self.window, 0
        for step in range(self.warmup, steps):
            skipped = (skipped + 1) % int(window)
            if skipped == 0:
                computed.add(step)
                window = round(window + self.flex, 3)
        return computed


SETTINGS = tuple(Setting(flex=flex, weight=weight) for weight in (1.0, 0.5) for flex in (0.25, 0.75, 1.5, 3.0))
"""The two published growths of the window, 0.75 and 3, and two beside them."""


@contextlib.contextmanager
def apply(pipe: Any, setting: Setting, steps: int) -> Iterator[None]:
    """Has the blocks of the transformer skipped, and the last one's output forecast, until the context ends."""
    blocks = blocks_of(pipe.transformer)
    computed = setting.computed_steps(steps)
    with contextlib.ExitStack() as undo:
        loop = undo.enter_context(following(pipe.transformer, _Run))
        for block in blocks:
            skipping = _Block(block, loop, computed)
            if block is blocks[-1]:
                skipping = _LastBlock(block, loop, computed, lambda past, step: forecast(setting, steps, past, step))
            undo.enter_context(replaced(block, "forward", skipping))
        yield


@dataclass
class History:
    """Steps of one branch that were computed, and what the last block made of the latents at each, `[B, T, C]`."""

    steps: list[int] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)


@dataclass
class _Run:
    """The history of each branch, and what each block returned last."""

    histories: defaultdict[str, History] = field(default_factory=lambda: defaultdict(History))
    outputs: dict[int, Any] = field(default_factory=dict)


def forecast(setting: Setting, steps: int, past: History, step: int) -> Tensor:
    """Features at a step that is not computed.

    Every element is a polynomial in τ = 2 t / T − 1 of step t of T, with coefficients c from the computed steps,

        c = (ΦᵀΦ + λ I)⁻¹ Φᵀ H,   h(τ) = φ(τ)ᵀ c,   φ(τ) = (T₀(τ), …, T_M(τ))

    which is a weighted sum of the features H. The authors' code has 50 for T whatever the number of steps.
    """
    times = 2.0 * np.array([*past.steps, step]) / steps - 1.0
    basis = chebyshev.chebvander(times, setting.degree)
    known, wanted = basis[:-1], basis[-1]
    gram = known.T @ known + setting.ridge * np.eye(setting.degree + 1)
    weights = setting.weight * (known @ np.linalg.solve(gram, wanted))
    ahead = (step - past.steps[-1]) / (past.steps[-1] - past.steps[-2])
    weights[-2:] += (1 - setting.weight) * np.array([-ahead, 1 + ahead])
    features = torch.stack(past.features)
    return torch.einsum("k,k...->...", torch.as_tensor(weights).to(features), features)


class _Block:
    """The forward of a block: what it returned last stands for what nothing reads in a step that is skipped."""

    def __init__(self, block: nn.Module, loop: Loop[_Run], computed: set[int]) -> None:
        self._forward, self._loop, self._computed = block.forward, loop, computed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Computes the block, or returns at once."""
        run = self._loop.run
        if self._loop.step not in self._computed:
            return self._skipped(run)
        run.outputs[id(self)] = self._forward(*args, **kwargs)
        return run.outputs[id(self)]

    def _skipped(self, run: _Run) -> Any:
        return run.outputs[id(self)]


class _LastBlock(_Block):
    """The same with a forecast of the latents' features, which are the last of several outputs."""

    def __init__(
        self, block: nn.Module, loop: Loop[_Run], computed: set[int], forecast: Callable[[History, int], Tensor]
    ) -> None:
        super().__init__(block, loop, computed)
        self._forecast = forecast

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Computes the block and notes what it returns, or forecasts it."""
        outputs = super().__call__(*args, **kwargs)
        if self._loop.step in self._computed:
            history = self._loop.run.histories[self._loop.branch]
            history.steps.append(self._loop.step)
            history.features.append(outputs[-1] if isinstance(outputs, tuple) else outputs)
        return outputs

    def _skipped(self, run: _Run) -> Any:
        features = self._forecast(run.histories[self._loop.branch], self._loop.step)
        outputs = run.outputs[id(self)]
        return (*outputs[:-1], features) if isinstance(outputs, tuple) else features
