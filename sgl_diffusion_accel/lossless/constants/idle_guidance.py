"""Leaves out a second stage's branch without the prompt where guidance multiplies it by nothing.

Wan2.2 has two experts, each with a guidance scale. Whether the branch without the prompt is computed goes by the first
one alone: with `guidance_scale=4, guidance_scale_2=1` it is computed in the second stage, too, and enters the result as
uncond + 1 · (cond − uncond), which is cond. With cond in its place, this is what comes out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from sgl_diffusion_accel.caching.parts.output_tensors import take_apart
from sgl_diffusion_accel.loop.runs import Kept
from sgl_diffusion_accel.loop.session import Session, Where
from sgl_diffusion_accel.lossless.call_handler import Doors
from sgl_diffusion_accel.patch import Patch, PatchHandler
from sgl_diffusion_accel.slots import Instead
from sgl_diffusion_accel.targets import Target

COMPONENT = "transformer_2"
"""The second expert."""

_COND, _UNCOND = "cond", "uncond"


class _WithPrompt(Kept):
    """The output with the prompt, of the step at which the run is.

    Args:
        step: The step.
        output: The output.
    """

    def __init__(self, step: int, output: Any) -> None:
        self.step = step
        self.output = output

    def nbytes(self) -> int:
        """Bytes of the output."""
        return sum(tensor.nbytes for tensor in take_apart(self.output)[0])


class _Entered(NamedTuple):
    """A call that is under way, and where it is, if guidance is 1 there."""

    where: Where | None


class IdleGuidance(PatchHandler):
    """Stands in front of the second expert, and of its caches: they need not hear of what is not computed.

    Args:
        patch: The patch that it belongs to.
        target: The expert.

    Attributes:
        skipped: Calls that were left out.
    """

    is_outer = True

    def __init__(self, patch: Patch, target: Target) -> None:
        self.patch = patch
        self.skipped = 0
        self._session = Session(otherwise=None)
        self._doors = Doors(target)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Entered | Instead | None:
        """Begins a call with the prompt, or answers for the one without."""
        if self._doors.is_second(module):
            return None
        where = self._session.enter(COMPONENT, module, args, kwargs)
        # How a loop or a pipeline of one's own combines the branches is not known, and in some of them a scale of 1 is
        # no idle one: cond + scale · (cond − uncond). Nor is it known at which step a call is that is not placed.
        if where is None or where.run.guidance != 1.0 or not where.run.is_published:
            self._doors.pass_through()
            return _Entered(None)
        kept, where.run.kept = where.run.kept, None
        if where.branch == _UNCOND and isinstance(kept, _WithPrompt) and kept.step == where.step:
            self.skipped += 1
            return Instead(kept.output)
        self._doors.pass_through()
        return _Entered(where)

    def leave(self, _: nn.Module, token: _Entered | None, output: Any) -> Any:
        """Ends a call, and keeps its output for the next one of the step."""
        if token is None:
            return output
        self._doors.leave()
        where = token.where
        if where is not None and where.branch == _COND:
            where.run.kept = _WithPrompt(where.step, output)
        return output

    def fail(self, _: nn.Module, token: _Entered | None) -> None:
        """Ends a call that raised."""
        if token is None:
            return
        self._doors.leave()
        if token.where is not None:
            self._session.runs.discard(token.where.run)

    def held_bytes(self) -> int:
        """Bytes of the outputs that are kept; 0 between runs."""
        return self._session.nbytes()

    def line(self) -> str:
        """What was left out."""
        return f"{self.skipped} calls without the prompt were left out: guidance multiplies them by 0"

    def forget(self) -> None:
        """Lets go of the outputs and the runs."""
        self._session.runs.clear()
