"""What is calibrated on a miniature or fitted to it, on captions and noise that are not measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from miniatures import call_kwargs, captions, load_miniature
from sgl_diffusion_accel import (
    CachePlan,
    MagnitudeRatios,
    TeaCacheCoefficients,
    calibrate,
    check_plan,
    fit_teacache,
    tune_plan,
)

from .settings import planned_speedups, teacache_settings

CAPTIONS = 6
"""Captions that all is calibrated on, but for the plan that shows what one is worth."""

TUNED_ON = 4
"""Of them, how many designs are tried on."""

_CAPTION_SEED, _NOISE_SEED = 5, 0  # none of them is measured
_CHECK_SEED = 55  # of a caption and noise that are neither calibrated on nor measured

T = TypeVar("T")


class Of(NamedTuple):
    """What something is calibrated for: a miniature at its own size, and how it is run.

    Attributes:
        model: Name of the miniature.
        steps: Denoising steps.
        scheduler: One of `miniatures.pipelines.SCHEDULERS`.
        guidance: Guidance scale, None for the miniature's own.
    """

    model: str
    steps: int
    scheduler: str = "euler"
    guidance: float | None = None

    def load(self) -> Any:
        """A new pipeline."""
        return load_miniature(self.model, scheduler=self.scheduler)

    def call(self, caption_seed: int, seed: int) -> dict[str, Any]:
        """The arguments of a call with a caption and noise of their own."""
        return self._call(captions(self.model, 1, caption_seed)[0], seed)

    def calls(self, count: int = CAPTIONS) -> list[dict[str, Any]]:
        """The arguments of the calls that are calibrated on."""
        chosen = captions(self.model, CAPTIONS, _CAPTION_SEED)[:count]
        return [self._call(caption, _NOISE_SEED + index) for index, caption in enumerate(chosen)]

    def _call(self, caption: str, seed: int) -> dict[str, Any]:
        return call_kwargs(self.model, caption, seed=seed, steps=self.steps, guidance=self.guidance)


class Calibrated:
    """What was calibrated for a miniature; each is made when it is first asked for, and once.

    Args:
        of: What it is for.
        keep: Takes a name and what makes the thing, and returns it, made or found where an earlier process has left it;
            None where nothing is left.

    Attributes:
        of: What it is for.
        seconds: Time that was spent on it.
    """

    def __init__(self, of: Of, keep: Callable[[str, Callable[[], Any]], Any] | None = None) -> None:
        self.of, self.seconds, self._keep = of, 0.0, keep
        self._made: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returns, made once."""
        if name not in self._made:
            begin = time.monotonic()
            with torch.no_grad():
                self._made[name] = self._keep(name, make) if self._keep else make()
            self.seconds += time.monotonic() - begin
        found: T = self._made[name]
        return found

    def plan(self, of: Of, count: int = CAPTIONS) -> tuple[CachePlan, float]:
        """A plan, and the CPU time that calibration took over that of its calls."""
        return self.once(f"plan_{of.scheduler}_{of.steps}_{count}", lambda: _plan(of, count))

    def tuned_plan(self) -> tuple[CachePlan, float]:
        """The plan with designs tried at all speed-ups, and the CPU time that this took over that of one call."""
        plan, _ = self.plan(self.of)
        return self.once(f"tuned_plan_{self.of.scheduler}_{self.of.steps}", lambda: _tuned(self.of, plan))

    def magnitudes(self) -> MagnitudeRatios:
        """Magnitude ratios for MagCache."""
        return self.once(
            "magnitudes", lambda: calibrate(self.of.load(), self.of.calls(), teacache=False).magnitude_ratios
        )

    def teacache_fit(self, use_ret_steps: bool | None) -> TeaCacheCoefficients:
        """TeaCache's coefficients."""
        return self.once(
            f"teacache_{use_ret_steps}", lambda: fit_teacache(self.of.load(), self.of.calls(), use_ret_steps)
        )

    def teacache_fits(self) -> list[dict[str, Any]]:
        """The coefficients that were used, for the result's file."""
        choices = sorted({setting.use_ret_steps for setting in teacache_settings(self.of.model)}, key=bool)
        names = ("coefficients", "thresholds", "low", "high", "r_squared", "use_ret_steps")
        return [{name: getattr(self.teacache_fit(choice), name) for name in names} for choice in choices]

    def calibration(self, is_tuned: bool = False) -> dict[str, Any]:
        """What calibration cost and found, for the result's file; also after a check on one more call.

        Args:
            is_tuned: Also what tuning did.
        """
        plan, cost = self.plan(self.of)
        budgets = {
            f"{speedup:g}": max(1, round(self.of.steps / speedup)) for speedup in planned_speedups(self.of.steps)
        }
        checked = self.once(
            "checked_plan", lambda: check_plan(self.of.load(), plan, [self.of.call(_CHECK_SEED, _CHECK_SEED)])
        )
        tuning = {}
        if is_tuned:
            tuned, took = self.tuned_plan()
            gains = {f"{self.of.steps / each.computed_steps:.1f}": each.gain for each in tuned.tuned}
            tuning = {"tuning_cpu_time_in_calls": took, "tuning_gains": gains}
        return {
            "calls": plan.calls,
            "cpu_time_in_calls": cost,
            "expected_relative_error": {name: plan.expected_error(computed) for name, computed in budgets.items()},
            "checked_relative_error": {name: checked.expected_error(computed) for name, computed in budgets.items()},
            **tuning,
        }


def _plan(of: Of, count: int) -> tuple[CachePlan, float]:
    calls, pipe = of.calls(count), of.load()
    pipe(**calls[0])  # warm-up
    begin = time.thread_time()
    for call in calls:
        pipe(**call)
    middle = time.thread_time()
    plan = calibrate(pipe, calls, teacache=False, magnitudes=False)
    return plan, (time.thread_time() - middle) / (middle - begin)


def _tuned(of: Of, plan: CachePlan) -> tuple[CachePlan, float]:
    calls, pipe = of.calls(TUNED_ON), of.load()
    pipe(**calls[0])  # warm-up
    begin = time.thread_time()
    pipe(**calls[0])
    middle = time.thread_time()
    speedups = [each for each in planned_speedups(of.steps) if round(of.steps / each) < of.steps]
    plan = tune_plan(pipe, plan, calls, speedups)
    return plan, (time.thread_time() - middle) / (middle - begin)
