"""Gap control: chooses the computed steps as solvers of differential equations choose theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np
import numpy.typing as npt

from sgl_diffusion_accel.caching.parts.call_policy import CallPolicy
from sgl_diffusion_accel.caching.parts.multistep import Weights, correct, correction, extrapolate
from sgl_diffusion_accel.caching.parts.policies import Change, Decision, Position, Tally

Growth = Callable[[Sequence[int], int], float]
"""How the error of a prediction grows: computed steps, newest first, and a step after them to the error there, for
outputs of unit roughness."""

_USUAL_STEPS, _STRIDE = 50, 1.5
_FEWEST_WARM_UP = 2  # a slope needs two
_FALL = 5
_ORDER_FALLS, _ROUNDING = 4, 1e-3
_ROUGHNESS = 0.6
_SLOWEST = 0.25
_EARLY = 0.85  # of the run is left: where it is seen how fast guidance decides
_MOST = 30.0  # branches that differ by little more than rounding may seem to meet within a step


class LineGrowth:
    """The growth for predictions along the line through the last two outputs: (q(q + d)/2)^0.6.

    q is how far ahead the step is of the last computed one, and d how far that is from the one before. The power would
    be 1 for outputs that bend, as smooth ones do, and 1/2 for outputs that wander at random. Those of five trained
    models did both: their errors two to eight steps ahead grew with powers from 0.5 to 0.7.

    Distances are counted by the scheduler's weights, in noise levels for Euler's method, and not in steps: at the end
    of a run, where schedules take longer strides, the error at the next gap was else underrated by a third.

    Args:
        share: Share of each step's output in the final latents, `[S]`. A step counts for a quarter of the mean at
            least: midpoints have no weight, and take the model elsewhere all the same.
    """

    def __init__(self, share: npt.NDArray[np.float64]) -> None:
        strides = np.maximum(share * len(share), _SLOWEST)
        self._times: list[float] = np.concatenate([[0.0], np.cumsum(strides)]).tolist()

    def __call__(self, nodes: Sequence[int], step: int) -> float:
        """The error at a step after the computed ones, which come newest first."""
        ahead = self._times[step] - self._times[nodes[0]]
        width = self._times[nodes[0]] - self._times[nodes[1]] if len(nodes) > 1 else ahead
        return float((ahead * (ahead + width) / 2) ** _ROUGHNESS)


def late_growth(left: float, early: float) -> float:
    """How many times as large an error of the latents is at the end of the run.

    What a model shows is decided early in the run, where guidance pulls strongest: an error that is left there grows,
    one that is left later only remains. On five trained models the growth after a corrected gap was 1 to 11 in the
    first tenth of the run, and 0.4 to 1.6 from its middle on; 1 + A·σ⁵ follows it, with A between 0 and 14.

    Args:
        left: σ, the share of the run that is left, from 1 down.
        early: A.
    """
    return 1 + early * left**_FALL


@dataclass(frozen=True)
class GapSettings:
    """How gap control steers; found on small trained models, the same for all.

    Attributes:
        tolerance: Largest estimate of the error that a gap leaves, relative to the whole move of the latents, in a run
            of 50 steps; see `in_run_of`.
        warm_up: Steps computed at the start of a run of 50 steps, and fewer of shorter ones; see `in_run_of`.
        longest_gap: Most steps skipped in a row.
        growth: Most steps skipped in a row, for each step of the gap before.
        fewest_steps: Runs with fewer steps are computed in full.
        interpolation: Share of the predicted error that remains after the correction. Where none is made all remains.
        disturbance: How much the error of the latents, while it lasts, disturbs what the model says.
        propagation: The same for what it says until the end of the run, where little is left to put it right.
        early: How many times more than later an error counts at the very start of the run, at least; A of
            `late_growth`.
        reach: Share of the schedule that the run covers.
        memory: Weight of the last estimate of the roughness, in the geometric mean, where the new one is lower; and
            the share of the last one that it keeps at least.
    """

    tolerance: float = 1e-3
    warm_up: int = 3
    longest_gap: int = 12
    growth: int = 2
    fewest_steps: int = 10
    interpolation: float = 0.15
    disturbance: float = 0.45
    propagation: float = 0.75
    early: float = 2.0
    reach: float = 1.0
    memory: float = 0.3

    def in_run_of(self, steps: float, reach: float = 1.0) -> GapSettings:
        """The settings for a run: the tolerance times (50 / steps)^1.5, and a warm-up of the same share of the run.

        A run of fewer steps is itself farther from where it would end with many: by steps of Euler's method that each
        err as the square of their stride. With one tolerance for all, 20 steps were computed nearly in full, for an
        error a hundred times smaller than theirs. And of ten computed steps a third one at the start is dear: given to
        the end of the run instead, it was worth up to 4 dB.

        Args:
            steps: Of the schedule, those that a run leaves out at its start included.
            reach: Share of the schedule that the run covers: where it begins later, its start is no longer the place
                where it is decided what the picture shows.
        """
        tolerance = self.tolerance * (_USUAL_STEPS / max(steps, 1)) ** _STRIDE
        warm_up = min(self.warm_up, max(_FEWEST_WARM_UP, round(self.warm_up * steps / _USUAL_STEPS)))
        return replace(self, tolerance=tolerance, warm_up=warm_up, early=self.early * reach**_FALL, reach=reach)


@final
@dataclass
class GapControl(CallPolicy):
    """Chooses each gap from the error of the last prediction, as solvers of differential equations choose their step.

    At a computed step c the prediction from the two computed steps before it is held against the output:
    e = ‖predicted(c) - y_c‖ / ‖y_c‖. Relative to the growth g of errors over such a distance it is the roughness of the
    run, K = e / g; a later prediction will err by about K times the growth over its own distance (`LineGrowth`; where
    another predictor runs, what its `growth` says). These errors, weighed as the scheduler weighs the outputs into the
    final latents, are summed over the gap: Δ. After a gap that spans a share w of the run, with σ left of it, there
    remains about Δ·(ι + w·(ρ + ρ'/σ)): ι of it the correction does not see, and the rest comes of what the model says
    to latents that were off meanwhile. Until the end of the run that grows by 1 + A·σ⁵ (`late_growth`).

    A is measured, where two branches show it: at the first computed steps cond and uncond come nearer to each other as
    guidance decides what the picture shows, d = ‖c - u‖ / ‖c‖ falls as exp(-A·(1 - σ)), and an error grows the faster
    the faster that goes. On the emoji model A is 15 to 20 by this, on the smooth ones under 5; there 2, which is the
    least, was as good.

    Attributes:
        settings: How it steers.
        final: Weight of each step's output in the final latents, `[S]`.
        corrects: Whether computed steps put the gap before them right.
        switch: The first step of a second expert; the last step of the first one is computed, since nothing that the
            second one says could put right what was skipped before.
        growth: How the error of the predictor that runs grows; None for the line (`LineGrowth`).
        response: Of the scheduler, `[S + 1, S]`; None where the latents on the way go as the final ones.
        passing: Influence of outputs that have no weight in the final latents, `[S]`; see `passing_influence`. None
            where all have one.
    """

    settings: GapSettings
    final: npt.NDArray[np.float64]
    corrects: bool = True
    switch: int | None = None
    growth: Growth | None = None
    response: npt.NDArray[np.float64] | None = None
    passing: npt.NDArray[np.float64] | None = None
    _computed: list[int] = field(default_factory=list)
    _skipped: dict[int, Weights] = field(default_factory=dict)
    _roughness: float | None = None
    _begin: int = 0
    _first_distance: tuple[float, float] | None = None
    _early: float = 0.0

    def __post_init__(self) -> None:
        self._share = np.abs(self.final) / np.abs(self.final).sum()
        self._left = np.cumsum(self._share[::-1])[::-1]
        self._growth = self.growth or LineGrowth(self._share)
        self._influence = self._share if self.passing is None else self._share + self.passing
        self._rest = self._left_by_correction()
        self._skips = len(self.final) >= self.settings.fewest_steps and self.settings.tolerance > 0
        # Where nothing is skipped, the device must not be asked for errors.
        self.needs_error = self._skips

    def _left_by_correction(self) -> float:
        """Share of an error that a correction at the next step leaves by itself, where it is a compromise.

        The largest of the run: at its end, where such schedulers fall back to lower order and the share is smaller,
        errors were underrated by as much.
        """
        if self.response is None or not self.corrects:
            return 0.0
        final, found = self.final.tolist(), [0.0]
        for step, after in enumerate(self.response[2:].tolist()):
            if final[step] and final[step + 1]:
                share = correction(step, step + 1, final, after)
                in_the_end = abs(final[step] - share * final[step + 1])
                meanwhile = abs(after[step] - share * after[step + 1])
                found.append((in_the_end + self.settings.disturbance * meanwhile) / abs(final[step]))
        return max(found) if max(found) > _ROUNDING else 0.0

    def prepare(self, total: int) -> str | None:  # noqa: ARG002
        """See `Policy.prepare`. Tells that nothing is corrected, where that is so."""
        if self.corrects or not self._skips:
            return None
        return (
            "what is predicted is not put right at computed steps: the scheduler is not known (a loop of one's own "
            "says it by denoising_steps(..., scheduler=scheduler)), adds noise of its own, or is not linear. Compare "
            "the result with that of fewer steps."
        )

    def decide(self, position: Position, tally: Tally, change: Change) -> Decision:  # noqa: ARG002
        """See `Policy.decide`. What was computed it knows itself; no signal is taken."""
        decision = self._decide(position.step)
        if decision.compute:
            self.compute(position.step)
        return decision

    def compute(self, step: int) -> None:
        """Learns that a step is computed; for steps that it is not asked about."""
        self._computed.insert(0, step)

    def _decide(self, step: int) -> Decision:
        last = len(self.final) - 1
        if not self._skips:
            return Decision(True, "too few steps" if self.settings.tolerance > 0 else "tolerance 0")
        if step - self._begin < self.settings.warm_up:
            return Decision(True, "warm-up")
        # Schedulers that look back end with steps of lower order, whose outputs count several times as much. A skip of
        # the fifth step from the end cost up to 10 dB in runs of 20 steps on Wan's miniature.
        if step >= last - (_ORDER_FALLS if self._rest else 0):
            return Decision(True, "last step")
        if self.switch is not None and step == self.switch - 1:
            return Decision(True, "last step of an expert")
        if self._roughness is None or len(self._computed) < 2:
            return Decision(True, "nothing to predict from")
        newest, before = self._computed[:2]
        gap = step - newest
        if gap > min(self.settings.longest_gap, self.settings.growth * (newest - before)):
            return Decision(True, "longest gap")
        growth = [self._growth(self._computed, skipped) for skipped in range(newest + 1, step + 1)]
        predicted = self._roughness * float((self._influence[newest + 1 : step + 1] * growth).sum())
        width = float(self._share[newest : step + 1].sum())
        left = max(float(self._left[step]), 1e-9)
        settings = self.settings
        interpolation = settings.interpolation + self._rest if self.corrects else 1.0
        remains = interpolation + width * (settings.disturbance + settings.propagation / left)
        early = max(settings.early, self._early * settings.reach**_FALL)
        estimate = predicted * remains * late_growth(left, early)
        if estimate > self.settings.tolerance:
            return Decision(True, "estimated error over tolerance", estimate)
        return Decision(False, "estimated error within tolerance", estimate)

    def weights(self, step: int, nodes: Sequence[int]) -> Weights:
        if step != nodes[0]:
            taken = self._skipped[step] = extrapolate(nodes, step)
            return taken
        if self.final[step] == 0:  # nothing can be put right here: the next computed step does it
            return {step: 1.0}
        skipped, self._skipped = self._skipped, {}
        # Of the computed outputs only the last are kept: what was predicted from one that is gone cannot be put right.
        known = all(node in nodes for taken in skipped.values() for node in taken)
        if not (self.corrects and known):
            return {step: 1.0}
        following = None if self.response is None else self.response[step + 1].tolist()
        return correct(nodes, skipped, self.final.tolist(), following)

    def predicted(self, step: int, nodes: Sequence[int]) -> Weights | None:
        earlier = [node for node in nodes if node < step]
        # From one output alone it is that output. It errs more than the line, so that what follows is on the safe side.
        enough = 1 if self.settings.warm_up == _FEWEST_WARM_UP else 2
        return extrapolate(earlier, step) if len(earlier) >= enough else None

    def observe(self, step: int, error: float) -> None:
        earlier = [node for node in self._computed if node < step]
        growth = self._growth(earlier, step) if earlier else 0.0
        roughness = error / growth if growth else np.inf
        # In the clock of another predictor two steps at one noise level (Heun) have no growth and tell nothing, nor
        # does an error that is no number.
        # Without a roughness the next steps are computed.
        if not np.isfinite(roughness):
            self._roughness = None
        elif self._roughness is None:
            self._roughness = roughness
        else:
            # What is rougher is believed at once, what is calmer slowly: one lucky prediction must not open a gap.
            memory, before = self.settings.memory, self._roughness
            self._roughness = max(roughness, roughness ** (1 - memory) * before**memory, memory * before)

    def needs_distance(self, step: int) -> bool:
        return self._skips and float(self._left[step]) >= _EARLY

    def see_distance(self, step: int, distance: float) -> None:
        left = float(self._left[step])
        if not 0 < distance < np.inf:  # cond and uncond alike, or no number
            return
        if self._first_distance is None:
            self._first_distance = (left, distance)
        elif left < self._first_distance[0]:
            first_left, first = self._first_distance
            self._early = min(float(np.log(first / distance)) / (first_left - left), _MOST)

    def take_over(self, computed: Sequence[int], error: float) -> None:
        """Goes on in mid-run where another policy has computed some steps.

        Args:
            computed: The computed steps, newest first; at least two.
            error: Of the prediction at the newest, as for `observe`.
        """
        self._computed = list(computed)
        self.observe(computed[0], error)

    def restart(self, position: Position) -> None:
        step = position.step
        self._computed, self._skipped, self._roughness, self._begin = [step], {}, None, step

    def needs_later(self, step: int) -> bool:
        return self._skips and step < len(self.final) - 1
