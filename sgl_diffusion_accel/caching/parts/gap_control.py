"""Gap control: chooses the computed steps as solvers of differential equations choose theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
import numpy.typing as npt

from sgl_diffusion_accel.caching.parts.call_policy import CallPolicy
from sgl_diffusion_accel.caching.parts.multistep import Weights, correct, extrapolate
from sgl_diffusion_accel.caching.parts.policies import Change, Decision, Position, Tally

Growth = Callable[[Sequence[int], int], float]
"""How the error of a prediction grows: computed steps, newest first, and a step after them to the error there, for
outputs of unit curvature (unit slope where the last output is repeated)."""


def growth_of_line(nodes: Sequence[int], step: int) -> float:
    """The growth for the line through the last two nodes, q(q + d)/2 at q steps past them, d being their distance."""
    ahead = step - nodes[0]
    width = nodes[0] - nodes[1] if len(nodes) > 1 else ahead
    return ahead * (ahead + width) / 2


@dataclass(frozen=True)
class GapSettings:
    """How gap control steers; found on small trained models, the same for all.

    Attributes:
        tolerance: Largest estimate of the error that a gap leaves, relative to the whole move of the latents.
        warm_up: Steps computed at the start of a run.
        longest_gap: Most steps skipped in a row.
        growth: Most steps skipped in a row, for each step of the gap before.
        fewest_steps: Runs with fewer steps are computed in full.
        interpolation: Share of the predicted error that remains after the correction.
        propagation: How much the error of the latents, while it lasts, disturbs what the model says.
        memory: Share of the last estimate of the curvature that is kept where the new one is lower.
    """

    tolerance: float = 1e-3
    warm_up: int = 3
    longest_gap: int = 12
    growth: int = 2
    fewest_steps: int = 10
    interpolation: float = 0.05
    propagation: float = 1.0
    memory: float = 0.8


@final
@dataclass
class GapControl(CallPolicy):
    """Chooses each gap from the error of the last prediction, as solvers of differential equations choose their step.

    At a computed step c the line through the two computed steps before it, b and a, is held against the output:
    e = ‖line(c) - y_c‖ / ‖y_c‖. With d = c - b and h = b - a the curvature is K = e / (d(d + h)/2), and q steps past c
    the line will err by about K·q(q + d)/2 (where another prediction runs, by what its `growth` says). These errors,
    weighed as the scheduler weighs the outputs into the final latents, are summed over the gap. What remains of the
    sum after the correction is a share of it; more remains the further the gap reaches towards the end of the run,
    where little is left to put it right.

    Attributes:
        settings: How it steers.
        final: Weight of each step's output in the final latents, `[S]`.
        corrects: Whether computed steps put the gap before them right.
        switch: The first step of a second expert; the last step of the first one is computed, since nothing that the
            second one says could put right what was skipped before.
        growth: How the error of the predictor that runs grows.
        passing: Influence of outputs that have no weight in the final latents, `[S]`; see `passing_influence`. None
            where all have one.
    """

    settings: GapSettings
    final: npt.NDArray[np.float64]
    corrects: bool = True
    switch: int | None = None
    growth: Growth = growth_of_line
    passing: npt.NDArray[np.float64] | None = None
    _computed: list[int] = field(default_factory=list)
    _skipped: dict[int, Weights] = field(default_factory=dict)
    _curvature: float | None = None
    _begin: int = 0

    def __post_init__(self) -> None:
        self._share = np.abs(self.final) / np.abs(self.final).sum()
        self._left = np.cumsum(self._share[::-1])[::-1]
        self._influence = self._share if self.passing is None else self._share + self.passing
        self._skips = len(self.final) >= self.settings.fewest_steps and self.settings.tolerance > 0
        # Where nothing is skipped, the device must not be asked for errors.
        self.needs_error = self._skips

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
        if step >= last:
            return Decision(True, "last step")
        if self.switch is not None and step == self.switch - 1:
            return Decision(True, "last step of an expert")
        if self._curvature is None or len(self._computed) < 2:
            return Decision(True, "nothing to predict from")
        newest, before = self._computed[:2]
        gap = step - newest
        if gap > min(self.settings.longest_gap, self.settings.growth * (newest - before)):
            return Decision(True, "longest gap")
        growth = [self.growth(self._computed, skipped) for skipped in range(newest + 1, step + 1)]
        predicted = self._curvature * float((self._influence[newest + 1 : step + 1] * growth).sum())
        reach = float(self._share[newest : step + 1].sum()) / max(float(self._left[step]), 1e-9)
        estimate = predicted * (self.settings.interpolation + self.settings.propagation * reach)
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
        return correct(nodes, skipped, self.final.tolist()) if self.corrects and known else {step: 1.0}

    def predicted(self, step: int, nodes: Sequence[int]) -> Weights | None:
        earlier = [node for node in nodes if node < step]
        return extrapolate(earlier, step) if len(earlier) > 1 else None

    def observe(self, step: int, error: float) -> None:
        earlier = [node for node in self._computed if node < step]
        growth = self.growth(earlier, step) if earlier else 0.0
        curvature = error / growth if growth else np.inf
        # Two steps at one noise level (Heun) have no growth and tell nothing, nor does an error that is no number.
        # Without a curvature the next steps are computed.
        if not np.isfinite(curvature):
            self._curvature = None
        elif self._curvature is None:
            self._curvature = curvature
        else:
            self._curvature = max(curvature, self.settings.memory * self._curvature)

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
        self._computed, self._skipped, self._curvature, self._begin = [step], {}, None, step

    def needs_later(self, step: int) -> bool:
        return self._skips and step < len(self.final) - 1
