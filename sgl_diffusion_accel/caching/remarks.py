"""What a cache tells its user about runs."""

from __future__ import annotations

import logging

from sgl_diffusion_accel.caching.runs import Run
from sgl_diffusion_accel.caching.stats import RunStats

logger = logging.getLogger(__name__)


class Remarks:
    """Remarks of one component: each goes into the statistics of its run, and is logged once.

    Args:
        component: The component's name.
    """

    def __init__(self, component: str) -> None:
        self._component = component
        self._said: set[str] = set()

    def tell(self, run: Run, remark: str | None, level: int = logging.WARNING) -> None:
        """Tells of a run, if there is something to be told."""
        if remark is None:
            return
        stats: RunStats | None = run.data.get("stats")
        if stats is not None:
            stats.remark(self._component, remark)
        if remark not in self._said:
            self._said.add(remark)
            logger.log(level, "%s: %s", self._component, remark)
