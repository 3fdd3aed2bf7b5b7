"""Stands in front of a whole transformer and answers for it at the steps that are skipped.

Nothing inside the transformer is touched: no block, no processor. So it works for every model that is called once a
step and branch, whatever it is made of, and the model may be compiled as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from sgl_diffusion_accel.caching.blocks.layout import find_block_lists
from sgl_diffusion_accel.caching.cache_handler import CacheHandler
from sgl_diffusion_accel.caching.outputs.output_run import OutputRun
from sgl_diffusion_accel.caching.parts.call_policy import CallPolicy
from sgl_diffusion_accel.caching.run_log import RunLog
from sgl_diffusion_accel.errors import UnsupportedModelError
from sgl_diffusion_accel.loop.runs import Run
from sgl_diffusion_accel.loop.session import Session, Where
from sgl_diffusion_accel.patch import Patch
from sgl_diffusion_accel.slots import Instead
from sgl_diffusion_accel.targets import expert_of

MakeCallPolicy = Callable[[Run], CallPolicy]
"""Makes what decides the steps of a run, at its start."""


class ComputedCall:
    """A transformer call that is being computed.

    Args:
        where: Where it is.
        kept: What is kept of its run.
    """

    __slots__ = ("_branch", "_guidance", "_kept", "run")

    def __init__(self, where: Where, kept: OutputRun) -> None:
        self.run = where.run
        self._kept = kept
        self._branch = where.branch
        self._guidance = where.run.guidance

    def finish(self, output: Any) -> Any:
        """Keeps what was computed, and returns it, corrected by what was skipped before."""
        return self._kept.computed(self._branch, output, self._guidance, self.run.scheduler)

    def cut_off(self, output: Any) -> Any:
        """The same, and nothing is asked any more: what was skipped before is corrected here or never."""
        return self._kept.computed(self._branch, output, self._guidance)

    def abandon(self) -> None:
        """Nothing: what is kept is the run's, and gone with it."""


class CallBeside:
    """A transformer call that is always computed, such as that of skip-layer guidance.

    Args:
        where: Where it is.
        kept: What is kept of its run.
    """

    __slots__ = ("_kept", "run")

    def __init__(self, where: Where, kept: OutputRun) -> None:
        self.run = where.run
        self._kept = kept

    def finish(self, output: Any) -> Any:
        """Shows what it returned to what waits for the scheduler's step."""
        self._kept.beside(output)
        return output

    def cut_off(self, output: Any) -> Any:
        """Nothing is asked any more."""
        return output

    def abandon(self) -> None:
        """Nothing: it holds nothing."""


class OutputCacheHandler(CacheHandler[ComputedCall | CallBeside]):
    """Caches the calls of one transformer as wholes.

    Args:
        patch: The patch that it belongs to.
        component: The transformer's name.
        module: The transformer.
        session: Shared by the transformers of the patch.
        policy: Makes what decides the steps of a run.
    """

    def __init__(
        self, patch: Patch, component: str, module: nn.Module, session: Session, policy: MakeCallPolicy
    ) -> None:
        blocks = count_blocks(module)
        super().__init__(patch, component, session, RunLog(component, blocks, blocks))
        self._policy = policy

    def _begin(self, module: nn.Module, where: Where) -> ComputedCall | Instead:  # noqa: ARG002
        kept = self._kept(where.run)
        decision = kept.decide(where, expert_of(self._component))
        self._log.decided(where, decision)
        self._log.tell(where.run, kept.remark)
        if decision.compute:
            return ComputedCall(where, kept)
        output = kept.skip(where.branch)
        if where.is_last:
            kept.end(where.branch)
        return Instead(output)

    def _beside(self, where: Where) -> CallBeside | None:
        return CallBeside(where, where.run.kept) if isinstance(where.run.kept, OutputRun) else None

    def _kept(self, run: Run) -> OutputRun:
        if not isinstance(run.kept, OutputRun):
            policy = self._policy(run)
            run.kept = OutputRun(policy)
            self._log.tell(run, policy.prepare(run.total))
        return run.kept


def count_blocks(module: nn.Module) -> int:
    """Blocks in a transformer's lists; 1 where it has no lists that are known."""
    try:
        return sum(len(blocks) for blocks in find_block_lists(module).values()) or 1
    except UnsupportedModelError:
        return 1
