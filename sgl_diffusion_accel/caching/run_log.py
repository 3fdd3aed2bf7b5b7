"""What a cache notes of each transformer call, and what it tells its user about runs."""

from __future__ import annotations

import logging

from sgl_diffusion_accel.caching.parts.gap_control import GapSettings
from sgl_diffusion_accel.caching.parts.policies import Decision
from sgl_diffusion_accel.loop.runs import Run
from sgl_diffusion_accel.loop.session import Where

logger = logging.getLogger(__name__)


class RunLog:
    """The log of one component: decisions and remarks go into the statistics of their run; remarks are logged once.

    Args:
        component: The component's name.
        blocks: Blocks that it has.
        skippable: Those of them that a skipped call does not run.
    """

    def __init__(self, component: str, blocks: int, skippable: int) -> None:
        self._component = component
        self._blocks = blocks
        self._skippable = skippable
        self._said: set[str] = set()

    def decided(self, where: Where, decision: Decision) -> None:
        """Notes what was decided for a call."""
        run = where.run
        if run.stats is not None:
            executed = self._blocks - (0 if decision.compute else self._skippable)
            run.stats.add(where.branch, where.step, self._component, decision, executed, self._blocks)
        if not decision.compute:
            self.tell(run, few_steps_remark(run.total))

    def tell(self, run: Run, remark: str | None, level: int = logging.WARNING) -> None:
        """Tells of a run, if there is something to be told."""
        if remark is None:
            return
        if run.stats is not None:
            run.stats.remark(self._component, remark)
        if remark not in self._said:
            self._said.add(remark)
            logger.log(level, "%s: %s", self._component, remark)


FEW = GapSettings.fewest_steps
"""Runs with fewer steps are remarked on."""


def few_steps_remark(total: int) -> str | None:
    """What is to be said of a skipped step in a run of so many steps, None where they are enough.

    The adaptive cache computes all of fewer than ten steps. Other caches do what was asked for, since a speed-up or a
    mask is a wish, but never without a word: of four steps each is a quarter of the way, so that two have little in
    common. Measured on two miniatures, half of 4 steps computed by a plan: 34 and 22 dB, where 2 uncached steps reach
    31 and 18 dB; half of 16 steps: 66 and 48 dB. A model distilled for few steps has no such smooth path.
    """
    if total >= FEW:
        return None
    return (
        f"a run of {total} steps, and some of them are skipped: so few have little in common, least of all in a model "
        "distilled for few steps. Compare the result with that of an uncached run."
    )
