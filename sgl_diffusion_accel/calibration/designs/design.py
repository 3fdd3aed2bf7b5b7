"""Designs a run from second moments: which steps are computed, with which weights, and what error is to be expected.

Let v_s be what the scheduler is given at step s of an uncached run, G the Gram matrix ⟨v_s, v_t⟩ over calibration runs
and C the scheduler's response. A cached run gives the scheduler a_s = Σ_c A[s, c] y_c instead, y_c the outputs of
computed steps, so that its latents are off by δ_s = Σ_j C[s, j] (a_j - v_j). A computed step sees latents that are off,
and answers y_c = v_c + n_c with

    n_c = (a_c δ_c + b_c (√(1-f) T δ_c + √f z_c)) / (σ_c Σ_j |C[S, j]|)

where a and b were measured (`answers.py`), T turns what is off into directions that nothing is known of, the same way
at all steps, and z_c is of the size of δ_c and in a direction of its own. All of these are combinations of the v, of
the v turned once and twice, and of the z, so that their sizes follow from G alone, for any choice of steps and weights.
What was turned twice counts as turned no further.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sgl_diffusion_accel.caching.parts.call_policy import DEPTH
from sgl_diffusion_accel.caching.parts.gap_control import GapSettings
from sgl_diffusion_accel.caching.parts.multistep import Weights, correct, extrapolate
from sgl_diffusion_accel.calibration.designs.answers import Answer, Answers, answer_at, left_in, scale_of
from sgl_diffusion_accel.loop.scheduler_response import looks_back

Matrix = npt.NDArray[np.float64]


_TURNS = 3
"""Levels of what is off: in the outputs themselves, turned once, and turned twice or more."""

_NEAREST = 4  # measured steps, which the cubic to another timestep goes through


@dataclass(frozen=True)
class DesignSettings:
    """What a design rests on besides the moments; found on small trained models.

    Attributes:
        depth: Computed outputs that a step is made of, at most.
        ridge: Pull of the fitted weights towards those of the line and its correction, relative to the size of an
            output.
        foresight: How far weights look at the final latents instead of those of the next step, 0 to 1.
        along: How much of the measured answer along an error holds for errors of a cached run, which are in other
            directions than that of the disturbance.
        across: The same for the answer across it.
        fresh: f, how much of the answer across an error is in a direction of its own at each step.
    """

    depth: int = DEPTH
    ridge: float = 3e-4
    foresight: float = 0.5
    along: float = 0.5
    across: float = 1.0
    fresh: float = 0.6

    @classmethod
    def of(cls, moments: Moments) -> DesignSettings:
        """The settings for a scheduler: more careful ones where it looks back, as UniPC and DPM-Solver do.

        What such a scheduler does with an output depends on the ones before it, so that a correction throws the latents
        off on the way.
        """
        return cls(ridge=1e-2) if moments.looks_back else cls()


@dataclass(frozen=True)
class Moments:
    """What is known of the runs that a design is for.

    Attributes:
        gram: G, mean of v_s·v_t over elements and runs, `[S, S]`.
        response: C, `[S + 1, S]`.
        answers: How the model answered in disturbed runs; without any, what is usual is expected.
        early: How many times more than later an error counts at the start of a run; A of `late_growth`, for the gap
            control that may take over from a plan.
        reach: Share of the schedule that the run covers.
    """

    gram: Matrix
    response: Matrix
    answers: tuple[Answers, ...] = ()
    early: float = GapSettings.early
    reach: float = 1.0

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
        return left_in(self.response)

    @property
    def answer(self) -> Answer:
        """How the model answers to latents that are off, at each step."""
        return answer_at(self.left * self.reach, self.answers)


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


def as_foreseen(made: Design, moments: Moments, settings: DesignSettings) -> Design:
    """A design with the errors that other settings let expect of its steps and weights."""
    draft = Draft(moments, settings)
    for computed, weights in zip(made.mask, made.weights, strict=True):
        draft.advance(computed, weights)
    return draft.design()


def design(mask: Sequence[bool], moments: Moments, settings: DesignSettings) -> Design:
    """Finds the weights for a mask, step by step, and the errors that are to be expected."""
    return Draft(moments, settings).then(mask).design()


class Draft:
    """A run under design: the steps so far, and how far off they leave the latents.

    What is off is a combination of v_0 … v_{S-1}, of the same turned once and twice, and of z_0 … z_{S-1}: `[4, S]`.
    The z are independent, of each other and of all else.

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
        answer, scale = moments.answer, scale_of(moments.response)
        self._along = settings.along * answer.along / scale
        self._across = settings.across * answer.across / scale
        self._fresh = np.zeros(steps)  # mean square of z
        self._answers = np.zeros((steps, _TURNS + 1, steps))  # y_s, for computed steps
        self._off = np.zeros((steps, _TURNS + 1, steps))  # a_s - v_s
        self._square = np.zeros(steps + 1)
        self._weights: list[Weights] = []

    def then(self, steps: Sequence[bool]) -> Draft:
        """Takes further steps."""
        for computed in steps:
            self.advance(bool(computed))
        return self

    def until(self, step: int) -> Draft:
        """A copy that has come to a step, to go on differently."""
        draft = copy.copy(self)
        draft.mask, draft._weights = self.mask[:step], self._weights[:step]
        for name in ("_fresh", "_answers", "_off", "_square"):
            known = getattr(self, name)
            begun = np.zeros_like(known)
            begun[:step] = known[:step]
            setattr(draft, name, begun)
        return draft

    def design(self) -> Design:
        """The design, once all steps are taken."""
        self._square[-1] = self._mean_square(self._left_off(len(self.mask)))
        errors = np.sqrt(np.maximum(self._square, 0) / (self._moments.moved or 1.0))
        return Design(self.mask, tuple(self._weights), tuple(errors.tolist()))

    def advance(self, computed: bool, weights: Weights | None = None) -> None:
        """Takes one step.

        Args:
            computed: Whether it is computed.
            weights: Those of the outputs that it is made of; None for the best.
        """
        step = len(self.mask)
        off = self._left_off(step)
        self._square[step] = self._mean_square(off)
        if computed:
            self._answers[step] = self._answer(step, off)
        weights = self._best(step, computed) if weights is None else weights
        self.mask += (computed,)
        self._weights.append(weights)
        for node, weight in weights.items():
            self._off[step] += weight * self._answers[node]
        self._off[step, 0, step] -= 1

    def _best(self, step: int, computed: bool) -> Weights:
        nodes = [node for node in range(step) if self.mask[node]][::-1]
        weighed = next((node for node in nodes if self._final[node]), -1)  # at others nothing could be put right
        skipped = {each: self._weights[each] for each in range(weighed + 1, step) if not self.mask[each]}
        nodes = ([step, *nodes] if computed else nodes)[: self._settings.depth]
        weights = self._prior(step, nodes, skipped)
        # A computed step with nothing to put right gives its own output: exact until the first skipped step.
        return self._fit(step, nodes, weights) if step and (not computed or skipped) else weights

    def _left_off(self, row: int, before: int | None = None) -> Matrix:
        """δ before a step, or what the steps before another one have left in it; `[4, S]`."""
        before = row if before is None else before
        off: Matrix = np.tensordot(self._moments.response[row, :before], self._off[:before], 1)
        return off

    def _answer(self, step: int, off: Matrix) -> Matrix:
        """y_s, `[4, S]`. Sets the size of its z."""
        share = self._settings.fresh
        answer: Matrix = self._along[step] * off
        turned = self._across[step] * np.sqrt(1 - share)
        answer[1:-1] += turned * off[:-2]
        answer[-2] += turned * off[-2]
        answer[0, step] += 1
        answer[-1, step] += 1
        fresh = off[-1] ** 2 @ self._fresh
        # What is off by a z turns as well, into directions that are as good as new.
        self._fresh[step] = self._across[step] ** 2 * (share * (self._square[step] - fresh) + fresh)
        return answer

    def _mean_square(self, combination: Matrix) -> float:
        """Mean square of a combination, `[4, S]`."""
        return float((self._weighed(combination) * combination).sum())

    def _weighed(self, combinations: Matrix) -> Matrix:
        """Combinations times the products of what they are of, `[…, 4, S]`."""
        products: Matrix = combinations @ self._moments.gram
        products[..., -1, :] = combinations[..., -1, :] * self._fresh
        return products

    def _prior(self, step: int, nodes: Sequence[int], skipped: dict[int, Weights]) -> Weights:
        if step not in nodes:
            return extrapolate(nodes, step)
        known = all(node in nodes for taken in skipped.values() for node in taken)
        following = self._moments.response[step + 1].tolist()
        return correct(nodes, skipped, self._final, following) if known else {step: 1.0}

    def _fit(self, step: int, nodes: list[int], prior: Weights) -> Weights:
        """Least squares for the latents of the next step and the final ones, with a ridge towards the prior."""
        settings, response = self._settings, self._moments.response
        start = np.array([prior.get(node, 0.0) for node in nodes])
        answers = self._answers[nodes]
        weighed = self._weighed(answers).reshape(len(nodes), -1)
        size, target = 0.0, np.zeros(len(nodes))
        for row, share in ((step + 1, 1 - settings.foresight), (len(response) - 1, settings.foresight)):
            width = response[row, step]
            off = self._left_off(row, step)
            # What the latents would be off by if this step gave nothing. The weights are to make up for it.
            off[0, step] -= width
            size += share * width * width
            target -= share * width * (weighed @ off.ravel())
        matrix = size * (weighed @ answers.reshape(len(nodes), -1).T)
        # The floor keeps the matrix regular where the outputs of a run are all zero.
        weight = settings.ridge * max(matrix.trace() / len(nodes), 1e-30)
        solved = np.linalg.solve(matrix + weight * np.eye(len(nodes)), target + weight * start)
        return dict(zip(nodes, solved.tolist(), strict=True))


def carry_over(gram: Matrix, measured: Sequence[float], wanted: Sequence[float]) -> Matrix:
    """The Gram matrix for other timesteps, by cubic interpolation of the outputs in the timestep.

    Args:
        gram: Of the outputs at the measured timesteps, `[S, S]`.
        measured: Their timesteps, falling.
        wanted: Timesteps of the other schedule; outside of the measured range the nearest measured one is taken.

    Returns:
        Of the outputs at the wanted timesteps, `[S', S']`.
    """
    weights = np.stack([_interpolation(measured, float(np.clip(each, measured[-1], measured[0]))) for each in wanted])
    # The outputs are interpolated, and not the entries: so the result is the Gram matrix of something.
    carried: Matrix = weights @ gram @ weights.T
    return carried


def _interpolation(measured: Sequence[float], wanted: float) -> Matrix:
    times = np.asarray(measured, dtype=np.float64)
    row = np.zeros(len(times))
    _, distinct = np.unique(-times, return_index=True)  # methods of second order come to a timestep twice
    # Timesteps fall, and the search wants rising numbers.
    place = np.searchsorted(-times[distinct], -wanted) - _NEAREST // 2
    start = int(np.clip(place, 0, max(len(distinct) - _NEAREST, 0)))
    near = distinct[start : start + _NEAREST].tolist()
    for node in near:
        others = [other for other in near if other != node]
        row[node] = np.prod([(wanted - times[other]) / (times[node] - times[other]) for other in others])
    return row
