"""What the transformers of one patch share: the runs under way, and what was decided in them."""

from __future__ import annotations

import logging
import threading
from typing import Any

from torch import nn

from sgl_diffusion_accel.caching.parts.stats import RunStats, Stats
from sgl_diffusion_accel.loop.given import tensors_given
from sgl_diffusion_accel.loop.locate import locate
from sgl_diffusion_accel.loop.places import HOW_TO_PLACE, LoopCall, Unplaced
from sgl_diffusion_accel.loop.runs import Kept, Run, Runs

logger = logging.getLogger(__name__)


class Session:
    """The runs and the statistics that the transformers of one patch share.

    Args:
        otherwise: What happens to calls that cannot be placed, for the user.
    """

    def __init__(self, otherwise: str = "are computed in full") -> None:
        self.runs = Runs()
        self.stats = Stats()
        self._otherwise = otherwise
        self._lock = threading.Lock()
        self._threads = threading.local()

    @property
    def run_here(self) -> RunStats | None:
        """What is noted of the run whose call came last in this thread."""
        return getattr(self._threads, "run", None)

    def nbytes(self) -> int:
        """Bytes of the tensors that are kept for all runs under way."""
        return sum(part.nbytes() for run in self.runs for part in run.data.values() if isinstance(part, Kept))

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Run, int, str] | None:
        """Tells the run, step and branch of a transformer call, None where it cannot be placed."""
        call = locate(module, args, kwargs)
        with self._lock:
            if isinstance(call, LoopCall):
                if call.step < call.total:
                    run, new = self.runs.find(call)
                    if new:
                        run.data["stats"] = self.stats.start(run.total)
                        run.data["number"] = self.stats.started
                    self._threads.run = run.data.get("stats")
                    run.given = call.switches | tensors_given(args, kwargs)
                    return run, *run.advance(module, call)
                call = Unplaced("its loop is over")
            is_new = self.stats.add_unplaced(call.missing)
        if is_new:
            logger.warning(
                "a call of %s cannot be placed in a denoising loop: %s. Such calls %s. %s",
                type(module).__name__, call.missing, self._otherwise, HOW_TO_PLACE,
            )  # fmt: skip
        return None
