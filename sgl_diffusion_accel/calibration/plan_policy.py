"""Follows a plan through one run, and leaves it where the run is not what calibration foresaw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np

from sgl_diffusion_accel.caching.parts.call_policy import DEPTH, CallPolicy
from sgl_diffusion_accel.caching.parts.gap_control import GapControl, GapSettings
from sgl_diffusion_accel.caching.parts.multistep import Weights, extrapolate
from sgl_diffusion_accel.caching.parts.policies import Change, Decision, Position, Tally
from sgl_diffusion_accel.calibration.designs.design import Design, Moments
from sgl_diffusion_accel.loop.scheduler_response import passing_influence

_LINE = 2  # steps that a line goes through
_TURN = 2.0  # how many times as far as beside it the line errs where the runs turned


@final
class PlanPolicy(CallPolicy):
    """Computes the steps of a design, and weighs their outputs as it says.

    At each computed step the prediction from the two before it is held against the output, which costs nothing but a
    look. How far it is off was foreseen by the moments. Where it is `guard` times as far, the run is another than those
    that the plan was made from, and gap control takes over for the rest of it.

    Args:
        design: For the steps of the run.
        moments: What it was designed from.
        guard: How many times the foreseen error is borne; None never looks, but after a turn (`turn`).
        settings: Of the gap control that takes over.
    """

    # Calibration records what the scheduler is given, whichever expert of Wan2.2 it comes from.
    spans_models = True

    def __init__(
        self, design: Design, moments: Moments, guard: float | None = None, settings: GapSettings | None = None
    ) -> None:
        self.needs_error = guard is not None
        self._design = design
        self._moments = moments
        self._guard = guard
        self._settings = settings or GapSettings(early=moments.early).in_run_of(moments.steps)
        self._computed: list[int] = []
        self._instead: GapControl | None = None
        computed = [step for step, each in enumerate(design.mask) if each]
        self._last_use = {
            step: max((later for later, weights in enumerate(design.weights) if step in weights), default=step)
            for step in computed
        }

    def decide(self, position: Position, tally: Tally, change: Change) -> Decision:
        step = position.step
        if self._instead is not None:
            return self._instead.decide(position, tally, change)
        if self._design.mask[step]:
            self._computed.insert(0, step)
        return Decision(self._design.mask[step], "plan", self._design.errors[step])

    def weights(self, step: int, nodes: Sequence[int]) -> Weights:
        if self._instead is not None:
            return self._instead.weights(step, nodes)
        return self._design.weights[step]

    def predicted(self, step: int, nodes: Sequence[int]) -> Weights | None:
        if not self.needs_error:
            return None
        earlier = [node for node in nodes if node < step]
        return extrapolate(earlier, step) if len(earlier) > 1 else None

    def observe(self, step: int, error: float) -> None:
        if self._instead is not None:
            self._instead.observe(step, error)
        # `not <=`, so that NaN is over it as well.
        elif self._guard is not None and not error <= self._guard * self.foreseen(step):
            off = f"a prediction was over {self._guard:g} times as far off as calibration foresaw"
            self._hand_over(off).take_over(self._computed, error)

    def turn(self, position: Position, is_computed: bool) -> bool:
        """See `CallPolicy.turn`.

        A plan whose runs had the same turn is followed, and one that computes this step: the guard will see whether it
        was foreseen. Else gap control takes over, from here on.
        """
        if self._instead is None and (is_computed or self._foresaw_turn(position.step)):
            return False
        turned = "the model was given inputs of another kind from a step on, which calibration did not see"
        (self._instead or self._hand_over(turned)).restart(position)
        return True

    def _foresaw_turn(self, step: int) -> bool:
        """Whether the runs of the calibration turned at a step: the line through the two before errs as at no other."""
        if not _LINE <= step - 1 < step + _LINE < len(self._design.mask):
            return False
        at, before, behind = (self._line_error([each - 1, each - 2], each) for each in (step, step - 1, step + _LINE))
        return at > _TURN * max(before, behind)

    def _hand_over(self, why: str) -> GapControl:
        """Leaves the rest of the run to gap control."""
        self.remark = (
            f"the plan was left in mid-run, and the adaptive cache chose the other steps: {why}. Where that is often "
            "so, calibrate with more such calls"
        )
        response = self._moments.response
        passing = passing_influence(response)
        self._instead = GapControl(self._settings, response[-1], response=response, passing=passing)
        # Gap control goes by errors, also where the plan had no guard.
        self.needs_error = self._instead.needs_error
        return self._instead

    def foreseen(self, step: int) -> float:
        """Error of the line at a computed step that the moments let expect, relative to the step's output."""
        return self._line_error([node for node in self._computed if node < step][: DEPTH - 1], step)

    def _line_error(self, nodes: Sequence[int], step: int) -> float:
        """The same for the line through any two steps, the newest first."""
        gram = self._moments.gram
        difference = np.zeros(len(gram))
        for node, weight in extrapolate(nodes, step).items():
            difference[node] += weight
        difference[step] -= 1
        return float(np.sqrt(max(difference @ gram @ difference, 0.0) / max(gram[step, step], 1e-30)))

    def needs_later(self, step: int) -> bool:
        if self._instead is not None:
            return self._instead.needs_later(step)
        # The guard's line needs the two steps before each computed one, also where no weight of the plan does.
        return self._last_use.get(step, step) > step or (self._guard is not None and step < len(self._design.mask) - 1)
