"""`CachePlan`: what calibration has learned, as a small file that can be read by anybody."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sgl_diffusion_accel._version import __version__
from sgl_diffusion_accel.caching.magcache.magnitudes import MagnitudeRatios
from sgl_diffusion_accel.caching.teacache.coefficients import TeaCacheCoefficients
from sgl_diffusion_accel.calibration.designs.answers import Answers
from sgl_diffusion_accel.calibration.designs.design import Design, Matrix, Moments
from sgl_diffusion_accel.calibration.designs.design_search import fewest_steps
from sgl_diffusion_accel.calibration.designs.tuned import Tuned, design_tuned
from sgl_diffusion_accel.calibration.growth import early_growth
from sgl_diffusion_accel.calibration.plan_checks import ENOUGH, Check, factor_at
from sgl_diffusion_accel.calibration.plan_fields import checked, symmetric
from sgl_diffusion_accel.calibration.plan_file import parts, read, refuse, write
from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.validate import count, of_type, real


@dataclass(frozen=True)
class CachePlan:
    """What `calibrate` has learned of a pipeline: how its runs move, and how its scheduler follows.

    Attributes:
        pipeline: Class of the pipeline.
        transformers: Classes of its transformers.
        config: Digest of their configs.
        scheduler: Class of the scheduler.
        timesteps: Timesteps of the runs, one for each denoising step.
        guidance: Guidance scale of the runs, None where it is unknown or differs.
        latents: Shape of the latents, `[B, …]`.
        calls: How many runs were recorded.
        gram: Mean products ⟨v_s, v_t⟩ / elements of what the scheduler was given at each step, upper triangle by rows.
        response: Weight of the output at each step in the latents after each step, lower triangle by rows.
        checks: How far runs by the plan were measured to be off, see `check_plan`.
        teacache: Coefficients for `apply_teacache` from the same runs, None if they were not recorded.
        magnitudes: Magnitude ratios for `apply_magcache` from the same runs, None if they were not recorded.
        growth: How many times as large a disturbance of the latents was at the end of a run: pairs of the share of the
            run that was left when it was made, and the growth. Empty where it was not measured.
        answers: How the model answered to latents that were off, one entry for each disturbed run: for each later step
            the share of the run that was left, and how far the output was off along the error of the latents and across
            it, relative to that error and times the share. Empty where it was not measured.
        held_out: How many times as far off the last call would have been by a plan that had not seen it, at 3x. Near
            1 more calls would teach little. None for one call, and where it was not worth the search.
        tuned: Which of several designs was the best for a number of computed steps, see `tune_plan`.
        library: Version of this library that made it.

    Raises:
        ConfigError: A number that cannot be, timesteps that rise, triangles of another number of steps, a `gram` that
            is no Gram matrix, or a `response` without any weight.
        ConfigTypeError: Something has a wrong type.
    """

    pipeline: str
    transformers: tuple[str, ...]
    config: str
    scheduler: str
    timesteps: tuple[float, ...]
    guidance: float | None
    latents: tuple[int, ...]
    calls: int
    gram: tuple[float, ...]
    response: tuple[float, ...]
    checks: tuple[Check, ...] = ()
    teacache: TeaCacheCoefficients | None = None
    magnitudes: MagnitudeRatios | None = None
    growth: tuple[tuple[float, float], ...] = ()
    answers: tuple[Answers, ...] = ()
    held_out: float | None = None
    tuned: tuple[Tuned, ...] = ()
    library: str = __version__

    def __post_init__(self) -> None:
        for name, value in checked(vars(self)).items():
            object.__setattr__(self, name, value)

    @property
    def steps(self) -> int:
        """Denoising steps of the runs."""
        return len(self.timesteps)

    @functools.cached_property
    def moments(self) -> Moments:
        """What designs are made from."""
        steps = self.steps
        response = np.zeros((steps + 1, steps))
        response[1:][np.tril_indices(steps)] = self.response
        return Moments(self.gram_matrix, response, self.answers, early_growth(self.growth))

    @property
    def gram_matrix(self) -> Matrix:
        """The products as a matrix, `[S, S]`."""
        return symmetric(self.gram, self.steps)

    @property
    def teacache_coefficients(self) -> TeaCacheCoefficients:
        """Coefficients for `apply_teacache`, with the range and R² of the fit.

        Raises:
            ConfigError: They were not recorded.
        """
        if self.teacache is None:
            raise ConfigError(
                "this plan has no TeaCache coefficients: the model has no signal for them, or calibrate was told "
                "teacache=False. Type: plan = calibrate(pipe, calls, teacache=True)"
            )
        return self.teacache

    @property
    def magnitude_ratios(self) -> MagnitudeRatios:
        """Magnitude ratios for `apply_magcache`, with their spread over the calls.

        Raises:
            ConfigError: They were not recorded.
        """
        if self.magnitudes is None:
            raise ConfigError(
                "this plan has no magnitude ratios: the model has no blocks that can be watched, its runs have fewer "
                "than 3 steps, or calibrate was told magnitudes=False. Type: plan = calibrate(pipe, calls, "
                "magnitudes=True)"
            )
        return self.magnitudes

    def design(self, computed_steps: int) -> Design:
        """The steps to compute and the weights, for runs like those recorded.

        Args:
            computed_steps: How many steps are computed, from 1 to `steps`.

        Raises:
            ConfigError: More steps than there are, or none.
            ConfigTypeError: Not a whole number.
        """
        computed = count("computed_steps", computed_steps, 1)
        if computed > self.steps:
            raise ConfigError(f"computed_steps={computed}; allowed: a whole number from 1 to {self.steps}.")
        return _designed(self, computed)

    def expected_error(self, computed_steps: int) -> float:
        """Error to be expected of the final latents, relative to how far they move in the run (root mean square).

        Without checks it is what the design says, which takes it that the model answers to any error as it did to one
        disturbance; with them (`check_plan`) it is that times the factor by which it was exceeded.

        Args:
            computed_steps: How many steps are computed, from 1 to `steps`.

        Raises:
            ConfigError: More steps than there are, or none.
            ConfigTypeError: Not a whole number.
        """
        return self.design(computed_steps).error * factor_at(self.checks, computed_steps)

    def steps_for(self, max_error: float) -> int:
        """The fewest computed steps whose expected error is within `max_error`.

        Args:
            max_error: Relative root-mean-square error of the final latents, as `expected_error` estimates it.

        Raises:
            ConfigError: Not positive.
            ConfigTypeError: Not a number.
        """
        wanted = real("max_error", max_error)
        if not wanted > 0:
            raise ConfigError(f"max_error={max_error}; allowed: a positive number, such as 0.02.")
        return fewest_steps(self.expected_error, self.steps, wanted)

    def merge(self, *others: CachePlan) -> CachePlan:
        """Joins recordings of the same setting from several processes or machines; checks and tuning begin anew.

        Raises:
            ConfigError: They are of different pipelines, models, schedules or guidance.
        """
        for other in others:
            of_type("a plan to be merged", other, CachePlan, "a CachePlan")
            for name in ("pipeline", "transformers", "config", "scheduler", "timesteps", "guidance", "latents"):
                if getattr(self, name) != getattr(other, name):
                    raise ConfigError(
                        f"these plans cannot be merged: {name} is {_short(getattr(self, name))} in one and "
                        f"{_short(getattr(other, name))} in the other. Calibrate with calls alike."
                    )
            if not np.allclose(self.response, other.response, rtol=1e-6, atol=1e-9):
                raise ConfigError(
                    f"these plans cannot be merged: {self.scheduler} had other settings in one than in the other. "
                    "Calibrate with calls alike."
                )
        plans = (self, *others)
        calls = sum(plan.calls for plan in plans)
        gram = np.sum([np.asarray(plan.gram) * (plan.calls / calls) for plan in plans], axis=0).tolist()
        teacache = max(plans, key=lambda plan: plan.calls if plan.teacache else 0).teacache
        checks = () if others else self.checks
        ratios = [plan.magnitudes for plan in plans if plan.magnitudes is not None]
        magnitudes = ratios[0].merge(*ratios[1:]) if ratios else None
        growth = tuple(each for plan in plans for each in plan.growth)
        return replace(
            self,
            calls=calls,
            gram=gram,
            checks=checks,
            teacache=teacache,
            magnitudes=magnitudes,
            growth=growth,
            answers=tuple(each for plan in plans for each in plan.answers),
            held_out=None if others else self.held_out,
            tuned=() if others else self.tuned,
        )

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, of some tens of kilobytes."""
        fields = {name: value for name, value in asdict(self).items() if name != "teacache"}
        write(path, {**fields, "teacache": None if self.teacache is None else self.teacache.to_json()})

    @classmethod
    def load(cls, path: str | Path) -> CachePlan:
        """Reads a plan.

        Raises:
            ConfigError: The file is damaged, of another format, or no plan.
            FileNotFoundError: There is no such file.

        Example:
            >>> plan = CachePlan.load("plan.json")  # doctest: +SKIP
        """
        fields = read(path, cls.__dataclass_fields__, ("growth", "answers", "held_out", "tuned"))
        if "answers" not in fields:  # its checks are of steps that were chosen otherwise
            fields["checks"] = fields["tuned"] = []
        try:
            return cls(**{**fields, **parts(fields)})
        except (TypeError, ValueError) as error:
            raise refuse(path, error) from error

    def __str__(self) -> str:
        usual = {max(1, round(self.steps / ratio)) for ratio in (1.5, 2, 3, 4, 5)}
        tuned = {each.computed_steps: f", tuned: {each}" for each in self.tuned}
        rows = [
            f"  {self.steps / n:4.1f}x  {n:3d} steps computed  expected error {self.expected_error(n):.2%}"
            f"{tuned.get(n, '')}"
            for n in sorted(usual | set(tuned), reverse=True)
        ]
        guidance = "" if self.guidance is None else f", guidance {self.guidance:g}"
        head = f"plan for {self.pipeline}, {self.scheduler}, {self.steps} steps{guidance}, from {_calls(self.calls)}"
        if self.growth:
            head += f", errors of the start grow {1 + early_growth(self.growth):.1f} times"
        if self.checks:
            head += f", errors checked on {_calls(self.checks[0].calls)}"
        if self.held_out is not None:
            advice = "more calls would help" if self.held_out > ENOUGH else "more calls would change little"
            head += f"; without the last call its error would be {self.held_out:.1f} times as large: {advice}"
        return "\n".join([head, *rows])


@functools.lru_cache(maxsize=256)
def _designed(plan: CachePlan, computed: int) -> Design:
    return design_tuned(plan.tuned, computed, plan.moments)


def _calls(number: int) -> str:
    return "1 call" if number == 1 else f"{number} calls"


def _short(value: Any) -> str:
    return f"{len(value)} values from {value[0]:g}" if isinstance(value, tuple) and len(value) > 4 else repr(value)
