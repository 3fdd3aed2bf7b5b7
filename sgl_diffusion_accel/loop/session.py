"""What the transformers of one patch share: the runs under way, and what was decided in them.

Every kind of patch comes in here: a transformer call is placed in its run, step and branch, once and in one way.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any

from torch import nn

from sgl_diffusion_accel.caching.parts.stats import RunStats, Stats
from sgl_diffusion_accel.loop.given import Latents, latents_given, tensors_given
from sgl_diffusion_accel.loop.locate import locate
from sgl_diffusion_accel.loop.named_branch import refuse_uneven
from sgl_diffusion_accel.loop.places import HOW_TO_PLACE, LoopCall, Unplaced
from sgl_diffusion_accel.loop.runs import Run, Runs
from sgl_diffusion_accel.targets import branch_label, unwrap

logger = logging.getLogger(__name__)


@dataclass(slots=True)  # not frozen, which would take most of its making
class Where:
    """Where a transformer call is.

    Attributes:
        run: The run.
        step: Index of the denoising step.
        branch: Name of the branch, unique among the components of a pipeline.
        latents: The form of what the transformer is called with; None where it takes no tensor.
        is_new: Whether the run begins with this call.
    """

    run: Run
    step: int
    branch: str
    latents: Latents | None
    is_new: bool

    @property
    def is_last(self) -> bool:
        """Whether it is at the run's last step."""
        return self.step >= self.run.total - 1


class Session:
    """The runs and the statistics that the transformers of one patch share.

    Args:
        otherwise: What happens to calls that cannot be placed, for the user; None to say nothing of them.
    """

    def __init__(self, otherwise: str | None = "are computed in full") -> None:
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
        return sum(run.kept.nbytes() for run in self.runs if run.kept is not None)

    def enter(self, component: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Where | None:
        """Places a call of a component in its run, step and branch.

        Args:
            component: Its name.
            module: The module that is called, in its wrapper or not.
            args: Positional arguments.
            kwargs: Keyword arguments.

        Returns:
            The place, None where there is none: the user is told once for each thing that is missing.
        """
        # Cache contexts are entered on the model itself, whichever wrapper is called.
        module = unwrap(module)
        call = locate(module, args, kwargs)
        with self._lock:  # runs of several threads, and statistics that they share
            if isinstance(call, LoopCall):
                if call.step < call.total:
                    return self._place(component, module, call, args, kwargs)
                call = Unplaced("its loop is over")
            is_new = self.stats.add_unplaced(call.missing)
        if is_new and self._otherwise is not None:
            logger.warning(
                "a call of %s cannot be placed in a denoising loop: %s. Such calls %s. %s",
                type(module).__name__, call.missing, self._otherwise, HOW_TO_PLACE,
            )  # fmt: skip
        return None

    def _place(
        self, component: str, module: nn.Module, call: LoopCall, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Where:
        latents = latents_given(args, kwargs)
        if latents is not None:
            refuse_uneven(call.branch, latents.samples)
        run, is_new = self.runs.find(call)
        if is_new:
            run.stats = self.stats.start(run.total)
            run.number = self.stats.started
            run.latents = None if latents is None else latents.shape
        self._threads.run = run.stats
        run.given = call.switches | tensors_given(args, kwargs)
        step, branch = run.advance(module, call)
        return Where(run, step, branch_label(component, branch), latents, is_new)


def unplaced_lines(stats: Stats, otherwise: str = "computed in full") -> list[str]:
    """Tells of the calls that could not be placed, and what to type."""
    if not stats.unplaced:
        return []
    found = [
        f"{several(count, 'call')} not placed, {otherwise}: {missing}" for missing, count in stats.unplaced.items()
    ]
    return [*found, HOW_TO_PLACE]


def several(count: int, what: str) -> str:
    """A number of things, in words."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
