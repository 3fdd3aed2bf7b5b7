"""Where in which denoising loop a transformer call is: which run, which step of how many, which branch.

A loop of one's own says so itself (`explicit.py`). Of a pipeline the answer is read from its frame: its local
`timesteps`, the cache context where it sets one, the names that it gives to the conditioning it passes
(`pipeline_frames.py`); the step is proved from its variables (`step_proof.py`). Frames are read because nothing else
tells: pipelines pass neither index nor schedule on, hooks see the arguments alone, and a step that is counted from
calls is wrong as soon as one comes from elsewhere. So it holds for any pipeline that happens to use the transformer, a
call from anywhere else is known to belong to no loop, and nothing is read from the device.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

from torch import Tensor, nn

from sgl_diffusion_accel.cache_contexts import cache_context_of
from sgl_diffusion_accel.frames import Locals, frames_from, key_of
from sgl_diffusion_accel.loop.code_loops import loops_around
from sgl_diffusion_accel.loop.context_loop import loop_of_context
from sgl_diffusion_accel.loop.conversions import conversion_of
from sgl_diffusion_accel.loop.explicit import StepIterator, loops_entered
from sgl_diffusion_accel.loop.given import switches_on
from sgl_diffusion_accel.loop.named_branch import branches_entered
from sgl_diffusion_accel.loop.pipeline_frames import (
    branch_by_name,
    callback_codes,
    guidance_of,
    is_negative,
    is_timesteps,
    may_be_loop,
    pipeline_of,
    schedule_in,
)
from sgl_diffusion_accel.loop.places import LoopCall, Unplaced
from sgl_diffusion_accel.loop.step_proof import Schedule, proved_step, schedule_of
from sgl_diffusion_accel.targets import unwrap

_PROGRESS_BARS = ("progress_bar", "pbar")
_GUIDER_NAME = "__guidance_identifier__"  # under which a guider of diffusers names the branches, "pred_cond", …
_TIMES = ("timestep", "timesteps", "t", "time", "sigma")

_NOT_OF_THE_LOOP = (
    "a loop by denoising_steps is under way, and the call does not come from the function that runs it. Make it there, "
    "or give each call of a step a branch of its own"
)
_SIDE_BY_SIDE = (
    "several loops by denoising_steps run side by side in one function, and the call is given the timestep of none of "
    "them, or of several. Give each loop a function of its own"
)


def locate(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LoopCall | Unplaced:
    """Finds the denoising loop from which `module` is being called.

    Args:
        module: The intercepted transformer.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        The position, or what is missing for a call that belongs to no known loop or is not proved to be at a step.
    """
    walk = _Walk(module, args, kwargs)
    own = walk.places
    # From the inside out: a pipeline that runs inside another one has a run of its own.
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # What a loop says of itself counts before what could be read from the same method.
        if own and key_of(frame) in own:
            return walk.in_own_loop(frame)
        if may_be_loop(frame.f_code):
            found = walk.visit(frame)
            if found is not None:
                return found
        walk.inner.append(frame)
        frame = frame.f_back
    return walk.outcome(sys._getframe(1))


class _Walk:
    """Goes through the frames around a call, from the inside out.

    Args:
        module: The transformer.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Attributes:
        places: The frames in which loops of one's own run.
        inner: The frames inside the present one.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._loops = loops_entered()
        self.places = {loop.place.key for loop in self._loops if loop.place is not None}
        self.inner: list[FrameType] = []
        self._module, self._args, self._kwargs = module, args, kwargs
        self._context = cache_context_of(module)
        self._helper: tuple[Any, LoopCall] | None = None
        self._missing: str | None = None

    def visit(self, frame: FrameType) -> LoopCall | Unplaced | None:
        """Looks at a frame that may be a pipeline's loop; returns where the call is once that is known."""
        with Locals(frame) as local:
            pipeline = pipeline_of(frame.f_code, local)
            if pipeline is None:
                return None
            # A callback runs inside the pipeline's frame. Without this its calls would be taken for calls of the step.
            callbacks = callback_codes(local)
            if callbacks and any(id(each.f_code) in callbacks for each in self.inner):
                return Unplaced("a step callback makes it for its own ends")
            call = self._read(frame, pipeline, local)
        # A method that tells less may be called by one that tells more, but only within one pipeline: another pipeline
        # around it has steps of its own.
        if call is None or (self._helper is not None and pipeline is not self._helper[0]):
            return None
        if any(_share_memory(loop.timesteps, call.timesteps) for loop in self._loops):
            return None  # a helper of the pipeline that is called in a loop of one's own
        if call.owner is not None:
            return call
        self._helper = self._helper or (pipeline, call)  # a method of the pipeline: its caller may tell more
        return None

    def _read(self, frame: FrameType, pipeline: Any, local: Mapping[str, Any]) -> LoopCall | None:
        scheduler = getattr(pipeline, "scheduler", None)
        state = local.get("block_state")
        given = (*self._args, *self._kwargs.values())
        known = getattr(scheduler, "timesteps", None)
        timesteps = schedule_in(frame, local, known) if state is None else state.timesteps
        if not is_timesteps(timesteps) or any(timesteps is value for value in given):
            timesteps = known  # the local ones are missing, or those of this step alone
        if not is_timesteps(timesteps):
            self._miss(frame, pipeline, "has no timesteps that are a tensor")
            return None
        # What the pipeline says of itself counts before what can be proved from outside.
        step = self._context[1].get("step_index") if self._context else None
        if type(step) is not int:
            step = proved_step(frame, local, schedule_of(timesteps, scheduler), self._times())
        if step is None:
            self._miss(frame, pipeline, "has no variable that proves the step: an element of its timesteps")
            return None
        owner = state or next((local[name] for name in _PROGRESS_BARS if local.get(name) is not None), None)
        boundary = local.get("boundary_timestep")
        name = self._named_here(frame, local)
        return LoopCall(
            loop=timesteps,
            total=len(timesteps) - _left_off(frame),
            step=step,
            branch=name or self._branch_read(pipeline, local),
            timesteps=timesteps,
            scheduler=scheduler,
            owner=owner,
            passed=() if name else self._tensors(),
            guidance=guidance_of(pipeline, local),
            boundary=float(boundary) if isinstance(boundary, (int, float)) else None,
            switches=switches_on(local),
            # Not by the pipeline's class: one that is derived from diffusers' may have a `__call__` of its own.
            is_published=str(frame.f_globals.get("__name__")).partition(".")[0] == "diffusers",
            conversion=conversion_of(pipeline),
        )

    def _times(self) -> list[Any]:
        """What the transformer is given that may be its timestep; others, such as `timestep_r`, are of other steps."""
        return [*self._args, *(value for name, value in self._kwargs.items() if name in _TIMES)]

    def _miss(self, frame: FrameType, pipeline: Any, what: str) -> None:
        self._missing = self._missing or f"{type(pipeline).__name__}.{frame.f_code.co_name} {what}"

    def _named_here(self, frame: FrameType, local: Mapping[str, Any]) -> str | None:
        """The branch's name, if the pipeline or who wrote its method has set one inside its loop."""
        if self._context:
            return self._context[0].removeprefix("pred_")
        named = self._branch_entered(frame)
        guider = getattr(local.get("guider_state_batch"), _GUIDER_NAME, None)
        return named or (guider.removeprefix("pred_") if isinstance(guider, str) else None)

    def _branch_entered(self, frame: FrameType) -> str | None:
        """The innermost branch that was entered in a frame, or inside of it."""
        entered = list(branches_entered())
        # Only inside the loop: a branch that is entered around a whole pipeline would put its cond and uncond under one
        # name.
        within = {key_of(each) for each in (*self.inner, frame)} if entered else set()
        return next((each.name for each in entered if each.place.key in within), None)

    def _branch_read(self, pipeline: Any, local: Mapping[str, Any]) -> str:
        """The branch by the name of the component that is called, else of the conditioning that it is given."""
        # Ideogram 4 has a denoiser for each branch: which component is called tells the branch.
        for name, part in vars(pipeline).items():
            if is_negative(name) and isinstance(part, nn.Module) and unwrap(part) is self._module:
                return "uncond"
        return branch_by_name(local, self._args, self._kwargs)

    def outcome(self, frame: FrameType) -> LoopCall | Unplaced:
        """Where the call is when no frame has told it at once."""
        if self._helper is not None:
            return self._helper[1]
        # The one that moved last first: it is the innermost of those around the call.
        for loop in reversed(self._loops):
            if loop.is_around(frame):
                call = self._of_own_loop(loop, loop.step, self._branch_around())
                is_named = not call.passed
                if is_named or loop.is_new(self._module):
                    return call
        if self._loops and self._missing is None:
            return Unplaced(_NOT_OF_THE_LOOP)
        # Many pipelines name their branches by a context that says nothing of steps. There the user is told what the
        # loop lacks, and not what the context lacks.
        if self._context is not None and (self._missing is None or "num_inference_steps" in self._context[1]):
            return self._of_context(*self._context)
        return Unplaced(
            self._missing or "it comes from no method of a diffusers pipeline that loops over its timesteps"
        )

    def in_own_loop(self, frame: FrameType) -> LoopCall | Unplaced:
        """A call in a frame that runs a loop, or several, that say themselves where they are."""
        key = key_of(frame)
        loops = [loop for loop in self._loops if loop.place is not None and loop.place.key == key]
        # Of nested loops the innermost began last, and none around it has moved since.
        loop = max(loops, key=lambda each: each.begun)
        if any(other.moved > loop.begun for other in loops if other is not loop):  # side by side, not in one another
            mine = [each for each in loops if _is_given_step_of(each, (*self._args, *self._kwargs.values()))]
            if len(mine) != 1:
                return Unplaced(_SIDE_BY_SIDE)
            (loop,) = mine
        loop.is_run_in_place = True
        call = self._of_own_loop(loop, loop.step_in(frame), self._branch_around())
        is_left = loops_around(frame.f_code, frame.f_lasti) == ()  # it was stepped by hand, and may be over
        return Unplaced(_NOT_OF_THE_LOOP) if is_left and call.passed and not loop.is_new(self._module) else call

    def _branch_around(self) -> str | None:
        """The innermost branch that is around the call. A generator that has stopped inside of one is none."""
        entered = list(branches_entered())
        stops = any(each.place.may_stop for each in entered)
        around = {key_of(each) for each in frames_from(sys._getframe(1))} if stops else set()
        return next((each.name for each in entered if not each.place.may_stop or each.place.key in around), None)

    def _of_own_loop(self, loop: StepIterator, step: int, branch: str | None) -> LoopCall:
        name = self._context[0] if self._context else branch
        return LoopCall(
            loop=loop,
            total=len(loop.timesteps),
            step=step,
            branch=name or "cond",
            timesteps=loop.timesteps,
            scheduler=loop.scheduler,
            owner=loop,
            passed=() if name else self._tensors(),
            guidance=loop.guidance,
            boundary=loop.boundary,
        )

    def _of_context(self, name: str, details: Mapping[str, Any]) -> LoopCall | Unplaced:
        """A cache context of diffusers that tells all there is to know."""
        step, total = details.get("step_index"), details.get("num_inference_steps")
        if type(step) is not int or type(total) is not int:
            given = {"step_index": step, "num_inference_steps": total}
            lacking = [key for key, value in given.items() if type(value) is not int]
            return Unplaced(
                f"its cache_context({name!r}) lacks {' and '.join(lacking)}: type cache_context({name!r}, "
                "step_index=i, num_inference_steps=n)"
            )
        if not 0 <= step < total:
            return Unplaced(f"its cache_context({name!r}) is at step {step} of {total}")
        loop = loop_of_context(self._module, name, step, total)
        if loop is None:
            return Unplaced(
                f"its cache_context({name!r}) comes twice in a step: a run that was given up and begun again, or two "
                "calls, each of which needs a name of its own"
            )
        return LoopCall(loop=loop, total=total, step=step, branch=name, owner=loop)

    def _tensors(self) -> tuple[Tensor, ...]:
        given = (*self._args, *self._kwargs.values())
        # Some models take their prompts as a list of tensors.
        values = (one for value in given for one in (value if isinstance(value, list) else [value]))
        return tuple(value for value in values if isinstance(value, Tensor))


def _is_given_step_of(loop: StepIterator, given: tuple[Any, ...]) -> bool:
    """Whether a call is given the timestep that a loop is at."""
    schedule = Schedule(loop.timesteps)
    tensors = [value for value in given if isinstance(value, Tensor)]
    return any(value is loop.timestep or schedule.index_of(value) == loop.step for value in tensors)


def _left_off(frame: FrameType) -> int:
    """How many timesteps at the end of the schedule a function's loop does not come to."""
    return sum(loop.left_off for loop in loops_around(frame.f_code, frame.f_lasti) or ())


def _share_memory(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
