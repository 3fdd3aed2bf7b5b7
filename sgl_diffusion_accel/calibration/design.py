"""Designs a run from second moments: which steps are computed, with which weights, and what error is to be expected.

Let v_s be what the scheduler is given at step s of an uncached run, G the Gram matrix ⟨v_s, v_t⟩ over calibration runs
and C the scheduler's response. A cached run gives the scheduler a_s = Σ_c A[s, c] y_c instead, y_c the outputs of
computed steps, so that its latents are off by δ_s = Σ_j C[s, j] (a_j - v_j). All of these are combinations of the v, so
their sizes follow from G alone, for any choice of steps and weights. A computed step sees latents that are off, and
answers y_c = v_c + n_c with an unknown n_c, taken as noise of size κ/σ·‖δ_c‖, with σ the share of the run that is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sgl_diffusion_accel.caching.multistep import Weights, correct, extrapolate
from sgl_diffusion_accel.caching.pacing import DEPTH

Matrix = npt.NDArray[np.float64]


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


@dataclass(frozen=True)
class Moments:
    """What is known of the runs that a design is for.

    Attributes:
        gram: G, mean of v_s·v_t over elements and runs, `[S, S]`.
        response: C, `[S + 1, S]`.
    """

    gram: Matrix
    response: Matrix

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
    def left(self) -> Matrix:
        """Share of the run that is left at each step, from 1 down; σ for Euler's method on flow matching. `[S]`."""
        share = np.abs(self.response[-1]) / np.abs(self.response[-1]).sum()
        left: Matrix = np.maximum(np.cumsum(share[::-1])[::-1], 1e-6)
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
    state = _State(moments, settings)
    for step, computed in enumerate(mask):
        state.advance(step, bool(computed))
    errors = np.sqrt(np.maximum(state.squares(), 0) / (moments.moved or 1.0))
    return Design(tuple(map(bool, mask)), tuple(state.weights), tuple(map(float, errors)))


class _State:
    """A run under design. Vectors are in the basis v_0 … v_{S-1}, n_0 … n_{S-1}."""

    def __init__(self, moments: Moments, settings: DesignSettings) -> None:
        steps = moments.steps
        self._steps, self._settings = steps, settings
        self._response, self._left = moments.response, moments.left
        self._final = moments.response[-1].tolist()
        self._gram = np.zeros((2 * steps, 2 * steps))
        self._gram[:steps, :steps] = moments.gram
        self._off = np.zeros((steps, 2 * steps))  # a_s - v_s
        self._answers = np.zeros((steps, 2 * steps))  # y_c
        self._nodes: list[int] = []
        self._skipped: dict[int, Weights] = {}
        self._square = np.zeros(steps + 1)
        self.weights: list[Weights] = []

    def advance(self, step: int, computed: bool) -> None:
        """Takes one step."""
        delta = self._response[step, :step] @ self._off[:step]
        self._square[step] = delta @ self._gram @ delta
        if computed:
            self._compute(step)
        weights = self._prior(step, computed)
        if step and (not computed or self._skipped):
            weights = self._fit(step, weights)
        if computed:
            self._skipped.clear()
        else:
            self._skipped[step] = weights
        self.weights.append(weights)
        for node, weight in weights.items():
            self._off[step] += weight * self._answers[node]
        self._off[step, step] -= 1

    def squares(self) -> Matrix:
        """Mean squares of the latents' errors, at the end of the run as well."""
        delta = self._response[-1] @ self._off
        self._square[-1] = delta @ self._gram @ delta
        return self._square

    def _compute(self, step: int) -> None:
        noise = self._steps + step
        self._answers[step, step] = self._answers[step, noise] = 1
        self._gram[noise, noise] = (self._settings.disturbance / self._left[step]) ** 2 * self._square[step]
        self._nodes = [step, *self._nodes][: self._settings.depth]

    def _prior(self, step: int, computed: bool) -> Weights:
        if not computed:
            return extrapolate(self._nodes, step)
        known = all(node in self._nodes for taken in self._skipped.values() for node in taken)
        return correct(self._nodes, self._skipped, self._final) if known else {step: 1.0}

    def _fit(self, step: int, prior: Weights) -> Weights:
        """Least squares for the latents of the next step and the final ones, with a ridge towards the prior."""
        settings, nodes = self._settings, self._nodes
        start = np.array([prior.get(node, 0.0) for node in nodes])
        answers = self._answers[nodes]
        projected = answers @ self._gram
        inner = projected @ answers.T
        matrix = np.zeros_like(inner)
        target = np.zeros(len(nodes))
        for row, share in ((step + 1, 1 - settings.foresight), (-1, settings.foresight)):
            width = self._response[row, step]
            before = self._response[row, :step] @ self._off[:step]
            before[step] -= width
            matrix += share * width * width * inner
            target -= share * width * (projected @ before)
        weight = settings.ridge * max(matrix.trace() / len(nodes), 1e-30)
        solved = np.linalg.solve(matrix + weight * np.eye(len(nodes)), target + weight * start)
        return dict(zip(nodes, map(float, solved), strict=True))
