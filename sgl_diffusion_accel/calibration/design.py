"""Designs a run from second moments: which steps are computed, with which weights, and what error is to be expected.

Let v_s be what the scheduler is given at step s of an uncached run, G the Gram matrix ⟨v_s, v_t⟩ over calibration runs
and C the scheduler's response. A cached run gives the scheduler a_s = Σ_c A[s, c] y_c instead, y_c the outputs of
computed steps, so that its latents are off by δ_s = Σ_j C[s, j] (a_j - v_j). All of these are combinations of the v, so
their sizes follow from G alone, for any choice of steps and weights. A computed step sees latents that are off, and
answers y_c = v_c + n_c with an unknown n_c, taken as noise of size κ/σ·‖δ_c‖/Σ_j |C[S, j]|, with σ the share of the run
that is left. The sum is the scale of the latents in units of the outputs: 1 for flow matching, about 15 for schedulers
with the noise levels of Stable Diffusion. And what a gap has left until it was put right goes on to grow by 1 + A·σ⁵
(`late_growth`), with an A that calibration measures: without that, plans of a model whose pictures are decided early
skipped there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sgl_diffusion_accel.caching.parts.call_policy import DEPTH
from sgl_diffusion_accel.caching.parts.gap_control import GapSettings, late_growth
from sgl_diffusion_accel.caching.parts.multistep import Weights, correct, extrapolate
from sgl_diffusion_accel.loop.scheduler_response import left_at, looks_back

Matrix = npt.NDArray[np.float64]


EARLY = GapSettings.early
"""How errors of the start grow where it was not measured; A of `late_growth`."""


@dataclass(frozen=True)
class DesignSettings:
    """What a design rests on besides the moments; found on small trained models.

    Attributes:
        depth: Computed outputs that a step is made of, at most.
        disturbance: κ, how strongly latents that are off disturb the model's answer.
        ridge: Pull of the fitted weights towards those of the line and its correction, relative to the size of an
            output.
        foresight: How far weights look at the final latents instead of those of the next step, 0 to 1.
    """

    depth: int = DEPTH
    disturbance: float = 0.3
    ridge: float = 3e-4
    foresight: float = 0.5

    @classmethod
    def of(cls, moments: Moments) -> DesignSettings:
        """The settings for a scheduler: more careful ones where it looks back, as UniPC and DPM-Solver do.

        What such a scheduler does with an output depends on the ones before it, so that a correction throws the latents
        off on the way. On the Wan miniature with 20 steps of UniPC, runs were eight times as far off as their designs
        expected, and are 2.7 times with these settings; with 50 steps they came 7 to 11 dB closer from 2.4x on.
        """
        return cls(disturbance=1.0, ridge=1e-2) if moments.looks_back else cls()


@dataclass(frozen=True)
class Moments:
    """What is known of the runs that a design is for.

    Attributes:
        gram: G, mean of v_s·v_t over elements and runs, `[S, S]`.
        response: C, `[S + 1, S]`.
        early: How many times more than later an error counts at the start of a run; A of `late_growth`.
    """

    gram: Matrix
    response: Matrix
    early: float = EARLY

    @property
    def steps(self) -> int:
        """Denoising steps, S."""
        return len(self.gram)

    @property
    def moved(self) -> float:
        """Mean square of how far the outputs move the latents in a run."""
        final = self.response[-1]
        return float(final @ self.gram @ final)

    @property
    def looks_back(self) -> bool:
        """Whether two outputs are weighed otherwise into the next latents than into the final ones."""
        return looks_back(self.response)

    @property
    def left(self) -> Matrix:
        """Share of the run that is left at each step, from 1 down; σ for Euler's method on flow matching. `[S]`."""
        # It is divided by, and the last output may have no weight at all (DEIS).
        left: Matrix = np.maximum(left_at(self.response[-1]), 1e-6)
        return left


@dataclass(frozen=True)
class Design:
    """A run, designed.

    Attributes:
        mask: Whether each step is computed.
        weights: For each step, the weights of computed steps' outputs.
        errors: Expected error of the latents before each step and at the end, relative to how far they move; `[S + 1]`.
    """

    mask: tuple[bool, ...]
    weights: tuple[Weights, ...]
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        """Expected relative error of the final latents (root mean square)."""
        return self.errors[-1]


def design(mask: Sequence[bool], moments: Moments, settings: DesignSettings) -> Design:
    """Finds the weights for a mask, step by step, and the errors that are to be expected."""
    return Draft(moments, settings).then(mask).design()


class Draft:
    """A run under design: the steps so far, and how far off they leave the latents.

    What is off is a combination of v_0 … v_{S-1} and n_0 … n_{S-1}; the n are independent, of each other and of the v.

    Args:
        moments: Of the runs.
        settings: See `DesignSettings`.

    Attributes:
        mask: The steps so far.
    """

    def __init__(self, moments: Moments, settings: DesignSettings) -> None:
        steps = moments.steps
        self.mask: tuple[bool, ...] = ()
        self._moments, self._settings = moments, settings
        self._final = moments.response[-1].tolist()
        # Relative to how far the latents move: with noise levels up to 15 the disturbance was overrated as many times.
        move = np.abs(moments.response[-1]).sum()
        self._disturbance = (settings.disturbance / (moments.left * move)) ** 2
        self._noise = np.zeros(steps)  # mean square of n
        self._off = np.zeros((2, steps, steps))  # a_s - v_s, in v and in n
        self._square = np.zeros(steps + 1)
        self._weights: list[Weights] = []

    def then(self, steps: Sequence[bool]) -> Draft:
        """Takes further steps."""
        for computed in steps:
            self._advance(len(self.mask), bool(computed))
            self.mask += (bool(computed),)
        return self

    def until(self, step: int) -> Draft:
        """A copy that has come to a step, to go on differently."""
        draft = Draft(self._moments, self._settings)
        draft.mask, draft._weights = self.mask[:step], self._weights[:step]
        draft._noise[:step] = self._noise[:step]
        draft._off[:, :step] = self._off[:, :step]
        draft._square[:step] = self._square[:step]
        return draft

    def design(self) -> Design:
        """The design, once all steps are taken."""
        self._square[-1] = self._mean_square(self._moments.response[-1] @ self._off) + self._grown()
        errors = np.sqrt(np.maximum(self._square, 0) / (self._moments.moved or 1.0))
        return Design(self.mask, tuple(self._weights), tuple(errors.tolist()))

    def _grown(self) -> float:
        """What the growth of errors adds to the mean square of the final one.

        An error counts from where its gap ends, since it is put right there: what each gap has left, until the next
        computed step has had its say, is taken by itself. Growth turns it in directions that nothing is known of, so
        that what it adds is independent.
        """
        final, moments = self._moments.response[-1], self._moments
        ends = [step for step, computed in enumerate(self.mask) if computed and self._final[step]]
        if not ends or not moments.early:
            return 0.0
        begins = [0, *(end + 1 for end in ends[:-1])]
        weighed = final[:, None] * self._off
        in_v, in_n = np.add.reduceat(weighed[:, : ends[-1] + 1], begins, axis=1)
        squares = ((in_v @ moments.gram) * in_v).sum(1) + in_n**2 @ self._noise
        factors = np.array([late_growth(left, moments.early) for left in moments.left[ends]])
        return float((factors**2 - 1) @ squares)

    def _advance(self, step: int, computed: bool) -> None:
        self._square[step] = self._mean_square(self._moments.response[step, :step] @ self._off[:, :step])
        if computed:
            self._noise[step] = self._disturbance[step] * self._square[step]
        nodes = [node for node in range(step) if self.mask[node]][::-1]
        weighed = next((node for node in nodes if self._final[node]), -1)  # at others nothing could be put right
        skipped = {each: self._weights[each] for each in range(weighed + 1, step) if not self.mask[each]}
        nodes = ([step, *nodes] if computed else nodes)[: self._settings.depth]
        weights = self._prior(step, nodes, skipped)
        # A computed step with nothing to put right gives its own output: exact until the first skipped step.
        if step and (not computed or skipped):
            weights = self._fit(step, nodes, weights)
        self._weights.append(weights)
        for node, weight in weights.items():
            self._off[:, step, node] += weight
        self._off[0, step, step] -= 1

    def _mean_square(self, combination: Matrix) -> float:
        """Mean square of a combination, `[2, S]`."""
        in_v, in_n = combination
        return float(in_v @ self._moments.gram @ in_v + self._noise @ in_n**2)

    def _prior(self, step: int, nodes: Sequence[int], skipped: dict[int, Weights]) -> Weights:
        if step not in nodes:
            return extrapolate(nodes, step)
        known = all(node in nodes for taken in skipped.values() for node in taken)
        following = self._moments.response[step + 1].tolist()
        return correct(nodes, skipped, self._final, following) if known else {step: 1.0}

    def _fit(self, step: int, nodes: list[int], prior: Weights) -> Weights:
        """Least squares for the latents of the next step and the final ones, with a ridge towards the prior."""
        settings, response, gram = self._settings, self._moments.response, self._moments.gram
        start = np.array([prior.get(node, 0.0) for node in nodes])
        # The noise of the answers is independent of all else, and so adds to the diagonal alone.
        inner = gram[np.ix_(nodes, nodes)] + np.diag(self._noise[nodes])
        size, target = 0.0, np.zeros(len(nodes))
        for row, share in ((step + 1, 1 - settings.foresight), (-1, settings.foresight)):
            width = response[row, step]
            in_v, in_n = response[row, :step] @ self._off[:, :step]
            # What the latents would be off by if this step gave nothing. The weights are to make up for it.
            in_v[step] -= width
            size += share * width * width
            target -= share * width * (gram[nodes] @ in_v + self._noise[nodes] * in_n[nodes])
        matrix = size * inner
        # The floor keeps the matrix regular where the outputs of a run are all zero.
        weight = settings.ridge * max(matrix.trace() / len(nodes), 1e-30)
        solved = np.linalg.solve(matrix + weight * np.eye(len(nodes)), target + weight * start)
        return dict(zip(nodes, solved.tolist(), strict=True))
