"""Stands in front of a whole transformer and answers for it at the steps that are skipped.

Nothing inside the transformer is touched: no block, no processor. So it works for every model that is called once a
step and branch, whatever it is made of, and the model may be compiled as a whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sgl_diffusion_accel.caching.blocks.layout import find_block_lists
from sgl_diffusion_accel.caching.blocks.odd_models import full_call_argument, full_call_remark
from sgl_diffusion_accel.caching.foreign import FORBIDDEN, refuse_late_cache
from sgl_diffusion_accel.caching.outputs.output_run import OutputRun
from sgl_diffusion_accel.caching.parts.gap_control import Pace
from sgl_diffusion_accel.caching.parts.policies import Decision
from sgl_diffusion_accel.caching.parts.stats import RunStats
from sgl_diffusion_accel.caching.remarks import Remarks, few_steps_remark
from sgl_diffusion_accel.errors import UnsupportedModelError
from sgl_diffusion_accel.intercept import Instead
from sgl_diffusion_accel.loop.runs import Run
from sgl_diffusion_accel.loop.session import Session
from sgl_diffusion_accel.patch import Patch, PatchHandler
from sgl_diffusion_accel.targets import branch_label, expert_of, unwrap

MakePace = Callable[[Run], Pace]
"""Makes what decides the steps of a run, at its start."""

_KEY = "outputs"


class _Call:
    """A transformer call that is being computed."""

    __slots__ = ("branch", "guidance", "kept", "run")

    def __init__(self, run: Run, kept: OutputRun, branch: str, guidance: float | None) -> None:
        self.run = run
        self.kept = kept
        self.branch = branch
        self.guidance = guidance


class OutputController(PatchHandler):
    """Caches the calls of one transformer.

    Args:
        patch: The patch that it belongs to.
        name: The component's name.
        module: The transformer.
        session: Shared by the transformers of the patch.
        pace: Makes what decides the steps of a run.
    """

    forbids_enable_cache = FORBIDDEN

    def __init__(self, patch: Patch, name: str, module: nn.Module, session: Session, pace: MakePace) -> None:
        self.patch = patch
        self._name = name
        self._session = session
        self._pace = pace
        self._threads = threading.local()
        self._blocks = count_blocks(module)
        self._remarks = Remarks(name)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Begins a transformer call, or answers for it."""
        if getattr(self._threads, "busy", False):  # a wrapper (`targets.unwrap`) has entered this call already
            return None
        where = self._session.enter(unwrap(module), args, kwargs)
        if where is None:
            return None
        run, step, branch = where[0], where[1], branch_label(self._name, where[2])
        if step == 0:
            refuse_late_cache(module)
        argument = full_call_argument(kwargs)
        if argument is not None:
            self._log(run, step, branch, Decision(True, "arguments forbid skipping"))
            self._remarks.tell(run, full_call_remark(argument))
            return None
        kept = run.data.get(_KEY)
        if not isinstance(kept, OutputRun):
            kept = run.data[_KEY] = OutputRun(self._pace(run))
            self._remarks.tell(run, kept.pace.remark)
        decision = kept.decide(step, expert_of(self._name), branch, _signature(args, kwargs), run.given)
        self._log(run, step, branch, decision)
        if not decision.compute:
            self._remarks.tell(run, few_steps_remark(run.total))
            output = kept.skip(branch)
            if step == run.total - 1:
                kept.end(branch)
            return Instead(output)
        self._threads.busy = True
        return _Call(run, kept, branch, run.guidance)

    def leave(self, _: nn.Module, token: _Call | None, output: Any) -> Any:
        """Ends a computed call: keeps its output."""
        if token is None:
            return output
        self._threads.busy = False
        try:
            return token.kept.computed(token.branch, output, token.guidance)
        except BaseException:
            self._session.runs.discard(token.run)
            raise

    def fail(self, _: nn.Module, token: _Call | None) -> None:
        """Ends a call that raised, and with it the run's memory."""
        if token is not None:
            self._threads.busy = False
            self._session.runs.discard(token.run)

    def _log(self, run: Run, step: int, branch: str, decision: Decision) -> None:
        stats: RunStats | None = run.data.get("stats")
        if stats is not None:
            stats.add(branch, step, self._name, decision, self._blocks if decision.compute else 0, self._blocks)


def count_blocks(module: nn.Module) -> int:
    """Blocks in a transformer's lists; 1 where it has no lists that are known."""
    try:
        return sum(len(blocks) for blocks in find_block_lists(module).values()) or 1
    except UnsupportedModelError:
        return 1


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Shape, dtype and device of the first tensor of a call, or list of them, with its length: the latents."""
    for value in (*args, *kwargs.values()):
        several = value if isinstance(value, (list, tuple)) else [value]
        if several and isinstance(several[0], Tensor):
            return several[0].shape, several[0].dtype, several[0].device, len(several)
    return ()
