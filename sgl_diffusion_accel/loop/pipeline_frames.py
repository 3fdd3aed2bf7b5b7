"""What the frame of a pipeline's denoising loop tells: its schedule, its guidance, its callbacks, its branch.

Frames are read because nothing else tells: pipelines pass neither index nor schedule on, and hooks see the arguments
alone. Names are those that diffusers' pipelines use; a loop that has none of them is not placed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from types import CodeType, FrameType, FunctionType
from typing import Any, TypeGuard

from torch import Tensor

from sgl_diffusion_accel.loop.code_loops import loops_around, sets
from sgl_diffusion_accel.loop.step_proof import Schedule, first_of

_CALLBACKS = ("callback_on_step_end", "callback")
_NEGATIVE = re.compile(r"(^|_)(neg|negative|uncond)", re.IGNORECASE)
# In this order: where there is a true scale (FLUX), `guidance_scale` is an input of the model and combines nothing.
_GUIDANCE = ("true_cfg_scale", "current_guidance_scale", "guidance_scale")
_GUIDANCE_OF = ("_guidance_scale", "guidance_scale")
_CONDITIONING = re.compile(r"prompt|embed|text|cond", re.IGNORECASE)

_known: dict[int, tuple[CodeType, bool]] = {}  # by identity: the hash of code goes through all of its constants
_MOST_KNOWN = 4096


def may_be_loop(code: CodeType) -> bool:
    """Whether a function could be a denoising loop, without looking at its variables."""
    # Asked for every frame on the stack at every call, and most frames belong to others. Code is cheap to look at;
    # reading variables makes a snapshot of all of them.
    known = _known.get(id(code))
    if known is None:
        variables = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
        may_be = "timesteps" in variables or "timesteps" in code.co_names or {"block_state", "components"} <= variables
        if len(_known) >= _MOST_KNOWN:  # cells of a notebook, run again and again
            _known.clear()
        known = _known[id(code)] = (code, may_be)
    return known[1]


def pipeline_of(code: CodeType, local: Mapping[str, Any]) -> Any:
    """The pipeline to which a frame belongs; a modular one is handed on as `components` beside its `block_state`."""
    kind = _pipeline_class()
    if isinstance(local.get("self"), kind):
        return local["self"]
    first = local.get(code.co_varnames[0]) if code.co_argcount else None
    if isinstance(first, kind) and _is_method(code, type(first)):
        return first  # whatever its author calls it
    return local.get("components") if hasattr(local.get("block_state"), "timesteps") else None


@functools.cache
def _pipeline_class() -> type:
    from diffusers import DiffusionPipeline  # late: it imports much, and a module may be patched without it

    kind: type = DiffusionPipeline
    return kind


def _is_method(code: CodeType, kind: type) -> bool:
    found = (vars(each).get(code.co_name) for each in kind.__mro__)
    return any(getattr(each, "__code__", None) is code for each in found)


def callback_codes(local: Mapping[str, Any]) -> set[int]:
    """Identities of the code of the user's callback that a pipeline calls from within its loop."""
    # By their code: a frame does not tell which function object it runs.
    codes: set[int] = set()
    for name in _CALLBACKS:
        callback = local.get(name)
        if callback is None:
            continue
        while isinstance(callback, functools.partial):
            callback = callback.func
        method = getattr(callback, "__func__", vars(type(callback)).get("__call__"))
        codes.update(id(function.__code__) for function in (callback, method) if isinstance(function, FunctionType))
    return codes


def guidance_of(pipeline: Any, local: Mapping[str, Any]) -> float | None:
    """The scale of classifier-free guidance, by the names that pipelines use.

    Args:
        pipeline: The pipeline.
        local: Variables of its loop, or the arguments of its call.

    Returns:
        The scale, 1 where guidance is off, None where nothing tells.
    """
    # The scale alone does not tell: Qwen-Image keeps its 4.0 where no negative prompt is given, and runs one branch.
    if local.get("do_classifier_free_guidance", local.get("do_true_cfg")) is False:
        return 1.0
    values = [local.get(name) for name in _GUIDANCE] + [getattr(pipeline, name, None) for name in _GUIDANCE_OF]
    return next((float(value) for value in values if isinstance(value, (int, float))), None)


def is_timesteps(candidate: object) -> TypeGuard[Tensor]:
    """Whether it may be the timesteps of a run, `[S]`, and not one timestep for each sample of a batch."""
    if not isinstance(candidate, Tensor) or candidate.ndim != 1 or len(candidate) == 0:
        return False
    return len(candidate) == 1 or candidate.stride(0) != 0  # else one timestep for each sample


def schedule_in(frame: FrameType, local: Mapping[str, Any], known: Any) -> Any:
    """A function's `timesteps`, unless they are those of a batch.

    They are, where the loop over the scheduler's sets them at each turn, or where they are an argument and no part of
    the scheduler's.
    """
    timesteps = local.get("timesteps")
    if not is_timesteps(timesteps) or not is_timesteps(known):
        return timesteps
    code = frame.f_code
    is_given = "timesteps" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    if is_given and not sets(code, "timesteps") and first_of(timesteps, known) is None:
        return None
    # `timesteps = t.expand(batch)` inside the loop over the steps has the name of the schedule, and is one step of it.
    loops = loops_around(code, frame.f_lasti) or ()
    if not any("timesteps" in loop.stored for loop in loops):
        return timesteps
    schedule = Schedule(known)
    over_steps = (loop for loop in loops if schedule.has_any(local.get(name) for name in loop.fresh))
    step_loop = next(over_steps, None)  # the innermost of them
    return None if step_loop is not None and "timesteps" in step_loop.stored else timesteps


@functools.lru_cache(maxsize=1024)
def is_negative(name: str) -> bool:
    """Whether a name is of what the unconditional branch is given."""
    return _NEGATIVE.search(name) is not None


def branch_by_name(local: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Tells cond from uncond by the name under which the pipeline holds the conditioning tensor that it passes."""
    # By identity: comparing values would wait for the device.
    passed = {id(value) for value in (*args, *kwargs.values()) if isinstance(value, (Tensor, list))}
    names = [name for name, value in local.items() if id(value) in passed and _CONDITIONING.search(name)]
    return "uncond" if any(map(is_negative, names)) else "cond"
