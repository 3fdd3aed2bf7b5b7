"""Runs a call with and without a plan, and tells how far the two are apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from sgl_diffusion_accel.caching.cache_patch import refuse_cached
from sgl_diffusion_accel.caching.parts.stats import RunStats
from sgl_diffusion_accel.calibration.apply_plan import apply_cache_plan, check_model, responds_alike
from sgl_diffusion_accel.calibration.call_record import Recording, Watch
from sgl_diffusion_accel.calibration.designs.answers import Answers, answers_of_plan
from sgl_diffusion_accel.calibration.growth import same_start
from sgl_diffusion_accel.calibration.plan import CachePlan
from sgl_diffusion_accel.calls import Call, read_calls
from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError
from sgl_diffusion_accel.loop.pipeline_frames import guidance_of
from sgl_diffusion_accel.loop.scheduler_response import response_of
from sgl_diffusion_accel.targets import find_targets
from sgl_diffusion_accel.validate import of_type, real

SPEEDUPS = (2.0, 3.0, 5.0)
"""Where a plan is checked unless told otherwise."""


@dataclass(frozen=True)
class Uncached:
    """A call, run uncached.

    Attributes:
        call: The call.
        first: What is kept of the first step's output.
        final: The final latents in float32, on the host.
    """

    call: Call
    first: Tensor
    final: Tensor


class PairedRuns:
    """Runs of a pipeline, each call uncached first.

    Args:
        pipe: The pipeline.
        plan: Whose steps, scheduler and guidance the calls must have.
        watch: Records the runs.
    """

    def __init__(self, pipe: Any, plan: CachePlan, watch: Watch) -> None:
        self._pipe, self._plan, self._runs = pipe, plan, watch.runs
        self._begun: Uncached | None = None
        self._plain: Recording | None = None
        self._last: tuple[Recording, tuple[RunStats, ...], CachePlan, int] | None = None

    def begin(self, call: Call) -> Uncached:
        """Runs a call uncached.

        Returns:
            What runs by a plan are held against, for `go_on`.

        Raises:
            ConfigError: It is of another kind than those that the plan was made from, or its latents are not finite.
        """
        self._plain = self._last = None  # before another run is recorded
        run, final = self._run(call)
        guidance = guidance_of(self._pipe, call.arguments)
        wanted = self._plan.guidance
        if guidance is not None and wanted is not None and guidance != wanted:
            raise ConfigError(f"the plan is for guidance {wanted:g}, and a call has {guidance:g}. {_ALIKE}")
        response = response_of(self._pipe.scheduler, self._plan.steps)
        if response is None or not responds_alike(self._plan, response):
            raise ConfigError(
                f"the plan is for {self._plan.scheduler} with other settings than that of the pipeline. {_ALIKE}"
            )
        if not final.isfinite().all():
            raise ConfigError(
                "a call has ended with latents that are not finite, without any cache: nothing can be held against "
                "them. Check the call, or run it in float32."
            )
        self._begun, self._plain = Uncached(call, run.first, final), run
        return self._begun

    def go_on(self, begun: Uncached) -> None:
        """Goes on with a call that was begun before another one."""
        self._begun, self._plain, self._last = begun, None, None

    def square(self, plan: CachePlan, computed: int) -> float:
        """Runs the call by a plan.

        Args:
            plan: The plan.
            computed: How many steps are computed.

        Returns:
            Mean square of how far off the final latents are; infinity where they are not finite.

        Raises:
            ConfigError: The run has begun otherwise than the uncached one.
        """
        if self._begun is None:
            raise RuntimeError("begin(call) comes first")
        begun, self._last = self._begun, None  # before another run is recorded
        with apply_cache_plan(self._pipe, plan, computed_steps=computed) as patch:
            found, final = self._run(begun.call)
        if not same_start(begun.first, found.first):
            raise ConfigError(
                "a call draws other noise each time it is made, so that runs of it cannot be compared. Give it "
                "generator=torch.Generator().manual_seed(0), or latents."
            )
        self._last = found, patch.stats.runs, plan, computed
        square = float((final - begun.final).square().mean())
        return square if np.isfinite(square) else np.inf

    def answers(self) -> Answers:
        """How the model answered to the errors of the last run by a plan.

        It is to be the last one since `begin`: what it is held against is not kept for long.

        Returns:
            Nothing where other steps were computed than the plan says, as where it was left in mid-run, and see
            `answers_of_plan`.
        """
        if self._last is None or self._plain is None:
            raise RuntimeError("begin(call) and square(plan, computed) come first")
        run, stats, plan, computed = self._last
        plain, cached, design = self._plain.seen(), run.seen(), plan.design(computed)
        records = [record for part in stats for branch in part.branches.values() for record in branch.records]
        if plain is None or cached is None or any(each.computed != design.mask[each.step] for each in records):
            return ()
        return answers_of_plan(plan.moments.response, plain, cached, design.weights)

    def _run(self, call: Call) -> tuple[Recording, Tensor]:
        """The recording of a run, and its final latents in float32, on the host."""
        self._runs.clear()
        self._pipe(**call.fresh())
        runs, plan = list(self._runs), self._plan
        final = runs[0].final if len(runs) == 1 and len(runs[0].timesteps) == plan.steps else None
        if final is None or not np.allclose(runs[0].timesteps, plan.timesteps, rtol=1e-3):
            raise ConfigError(
                f"the plan is for {plan.steps} steps of {plan.scheduler}, and a call has made "
                f"{', '.join(str(len(run.timesteps)) for run in runs) or 'no'} steps, or at other timesteps. {_ALIKE}"
            )
        return runs[0], final.float().cpu()


_ALIKE = "Give calls like those that the plan was made from, or calibrate with these."


def read_pairs(
    pipe: Any,
    plan: CachePlan,
    calls: Iterable[Mapping[str, Any]],
    speedups: Iterable[float],
    *,
    asked: str,
    purpose: str,
) -> tuple[list[Call], list[int]]:
    """Checks what runs with and without a plan are asked for with.

    Args:
        pipe: The pipeline.
        plan: The plan.
        calls: Keyword arguments of `pipe(...)`.
        speedups: Steps of a run for each computed one.
        asked: What the user typed, for errors, see `read_calls`.
        purpose: What it is for, such as "a check".

    Returns:
        The calls, and the numbers of computed steps, the most first.

    Raises:
        ConfigError: No calls, no speed-ups or impossible ones, or a cache is on the pipeline.
        ConfigTypeError: Something has a wrong type.
        UnsupportedModelError: The plan is of another model.
    """
    of_type("plan", plan, CachePlan, "a CachePlan: calibrate(pipe, calls)")
    read, budgets = read_calls(pipe, calls, asked), budgets_of(plan, speedups)
    targets = find_targets(pipe)
    check_model(plan, targets)
    refuse_cached(targets, purpose)
    return read, budgets


def budgets_of(plan: CachePlan, speedups: Iterable[float]) -> list[int]:
    """Numbers of computed steps, the most first.

    Raises:
        ConfigError: No speed-ups, or impossible ones.
        ConfigTypeError: No list of numbers.
    """
    listed: Any = speedups
    if isinstance(listed, str) or not isinstance(listed, Iterable):
        raise ConfigTypeError(
            f"speedups is a {type(listed).__name__}; allowed: a list of numbers over 1, such as [3.0]."
        )
    given = [real("speedups", each) for each in listed]
    found = {max(1, round(plan.steps / each)) for each in given if np.isfinite(each) and each > 1}
    budgets = sorted(found - {plan.steps}, reverse=True)
    if not budgets or not all(np.isfinite(each) and each > 1 for each in given):
        raise ConfigError(f"speedups={given}; allowed: numbers over 1 that leave out a step, such as {list(SPEEDUPS)}.")
    return budgets
