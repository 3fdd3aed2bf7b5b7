"""Where in which denoising loop a transformer call is: which run, which step of how many, which branch.

The answer is read from the pipeline that is calling: its local `timesteps` and loop index, the cache context where it
sets one, the names that it gives to the conditioning it passes. So it holds for any pipeline that happens to use the
transformer, and a call from anywhere else is known to belong to no loop. Nothing is read from the device.
"""

from __future__ import annotations

import functools
import re
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from types import CodeType, FrameType, FunctionType
from typing import Any, TypeGuard

from torch import Tensor, nn

from sgl_diffusion_accel.intercept import cache_context_of
from sgl_diffusion_accel.targets import unwrap

_PROGRESS_BARS = ("progress_bar", "pbar")
_CALLBACKS = ("callback_on_step_end", "callback")
_NEGATIVE = re.compile(r"(^|_)(neg|negative|uncond)", re.IGNORECASE)
_GUIDANCE = ("true_cfg_scale", "current_guidance_scale", "guidance_scale")
_GUIDANCE_OF = ("_guidance_scale", "guidance_scale")
_GUIDER_NAME = "__guidance_identifier__"  # under which a guider of diffusers names the branches, "pred_cond", …
_CONDITIONING = re.compile(r"prompt|embed|text|cond", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class LoopCall:
    """What the calling pipeline tells about one transformer call.

    Attributes:
        scheduler: The pipeline's scheduler, if it has one.
        timesteps: The timesteps of this run, one a step; a new object at every run.
        owner: An object that lives exactly as long as the run (its progress bar), or None.
        step: Index into `timesteps`, or None where the pipeline does not tell.
        timestep: The loop's current timestep; a new object at every step.
        branch: `"cond"`, `"uncond"`, or whatever name the pipeline has set.
        passed: The tensors that are passed, where the name is not the pipeline's word: the conditioning among them is
            the same at every step, and tells branches apart.
        guidance: The scale with which the pipeline combines its branches, None where it does not tell.
        boundary: The timestep below which a second transformer takes over, None if there is none.
    """

    scheduler: Any
    timesteps: Tensor
    owner: Any
    step: int | None
    timestep: Any
    branch: str
    passed: tuple[Tensor, ...] = ()
    guidance: float | None = None
    boundary: float | None = None


def locate(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LoopCall | None:
    """Finds the denoising loop from which `module` is being called.

    Args:
        module: The intercepted transformer.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        The position as the pipeline tells it, or None for a call that belongs to no known loop.
    """
    frame: FrameType | None = sys._getframe(1)
    fallback: tuple[Any, LoopCall] | None = None
    passed: set[CodeType] = set()
    while frame is not None:
        code = frame.f_code
        interesting = _interesting.get(code)
        if interesting is None:
            interesting = _interesting[code] = _may_be_loop(code)
        if interesting:
            with _Locals(frame) as local:
                pipeline = _pipeline_of(local)
                if pipeline is not None and passed & _callback_codes(local):
                    return None  # a step callback calls the transformer for its own ends
                call = _read(pipeline, local, module, args, kwargs) if pipeline is not None else None
            if call is not None and (fallback is None or pipeline is fallback[0]):
                if call.step is not None and call.owner is not None:
                    return call
                fallback = fallback or (pipeline, call)  # a helper of the pipeline: its caller may tell more
        passed.add(code)
        frame = frame.f_back
    return fallback[1] if fallback else None


_interesting: weakref.WeakKeyDictionary[CodeType, bool] = weakref.WeakKeyDictionary()


def _may_be_loop(code: CodeType) -> bool:
    """Whether a function could be a denoising loop, without looking at its variables."""
    variables = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
    return "timesteps" in variables or "timesteps" in code.co_names or {"block_state", "components"} <= variables


class _Locals:
    """A frame's local variables, let go of again at the end.

    Before Python 3.13 reading them leaves a snapshot on the frame, which would keep each tensor that it names alive
    until the next reading: it is emptied, but for frames of others, who may have asked for it with `locals()`.
    """

    def __init__(self, frame: FrameType) -> None:
        self._frame = frame

    def __enter__(self) -> Mapping[str, Any]:
        self._mapping = self._frame.f_locals
        self._is_mine = sys.getrefcount(self._mapping) <= _OWN_REFERENCES  # else the function has called locals()
        return self._mapping

    def __exit__(self, *_: object) -> None:
        is_snapshot = sys.version_info < (3, 13) and self._frame.f_code.co_flags & _OPTIMIZED
        if is_snapshot and self._is_mine and _pipeline_of(self._mapping) is not None:
            self._mapping.clear()
        del self._mapping, self._frame


_OWN_REFERENCES = 3  # the frame's, the attribute's, and the one that counting makes
_OPTIMIZED = 0x0001  # the code object of a function, whose locals are not the mapping itself


def _pipeline_of(local: Mapping[str, Any]) -> Any:
    """The pipeline to which a frame belongs; a modular one is handed on as `components` beside its `block_state`."""
    from diffusers import DiffusionPipeline

    if isinstance(local.get("self"), DiffusionPipeline):
        return local["self"]
    return local.get("components") if hasattr(local.get("block_state"), "timesteps") else None


def _callback_codes(local: Mapping[str, Any]) -> set[CodeType]:
    """Code of the user's callback that a pipeline calls from within its loop."""
    codes: set[CodeType] = set()
    for name in _CALLBACKS:
        callback = local.get(name)
        while isinstance(callback, functools.partial):
            callback = callback.func
        method = getattr(callback, "__func__", vars(type(callback)).get("__call__"))
        codes.update(function.__code__ for function in (callback, method) if isinstance(function, FunctionType))
    return codes


def _read(
    pipeline: Any, local: Mapping[str, Any], module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> LoopCall | None:
    scheduler = getattr(pipeline, "scheduler", None)
    state = local.get("block_state")
    timesteps = local.get("timesteps") if state is None else state.timesteps
    if not _is_timesteps(timesteps) or any(timesteps is value for value in (*args, *kwargs.values())):
        timesteps = getattr(scheduler, "timesteps", None)  # the local ones are missing, or those of this step alone
    if not _is_timesteps(timesteps):
        return None
    owner = state or next((local[name] for name in _PROGRESS_BARS if local.get(name) is not None), None)
    context = cache_context_of(module)
    timestep = local.get("t")
    step = context[1].get("step_index") if context else None
    if step is None:
        step = _index_in(timesteps, timestep)
    if step is None:
        step = local["i"] if type(local.get("i")) is int else _index_in(timesteps, *local.values())
    if step is None and owner is None:
        return None  # neither where in the loop it is, nor when the loop ends
    guidance = guidance_of(pipeline, local)
    boundary = local.get("boundary_timestep")
    boundary = float(boundary) if isinstance(boundary, (int, float)) else None
    name = context[0] if context else getattr(local.get("guider_state_batch"), _GUIDER_NAME, None)
    if name:
        return LoopCall(scheduler, timesteps, owner, step, timestep, name.removeprefix("pred_"), (), guidance, boundary)
    values = (one for value in (*args, *kwargs.values()) for one in (value if isinstance(value, list) else [value]))
    passed = tuple(value for value in values if isinstance(value, Tensor))
    branch = "uncond" if _is_for_uncond(pipeline, module) else _branch_by_name(local, args, kwargs)
    return LoopCall(scheduler, timesteps, owner, step, timestep, branch, passed, guidance, boundary)


def guidance_of(pipeline: Any, local: Mapping[str, Any]) -> float | None:
    """The scale of classifier-free guidance, by the names that pipelines use.

    Args:
        pipeline: The pipeline.
        local: Variables of its loop, or the arguments of its call.

    Returns:
        The scale, 1 where guidance is off, None where nothing tells.
    """
    if local.get("do_classifier_free_guidance", local.get("do_true_cfg")) is False:
        return 1.0
    values = [local.get(name) for name in _GUIDANCE] + [getattr(pipeline, name, None) for name in _GUIDANCE_OF]
    return next((float(value) for value in values if isinstance(value, (int, float))), None)


def _is_timesteps(candidate: object) -> TypeGuard[Tensor]:
    return isinstance(candidate, Tensor) and candidate.ndim == 1 and len(candidate) > 0


def _index_in(timesteps: Tensor, *candidates: Any) -> int | None:
    """Index of the first candidate that is an element of `timesteps`, told by where it lies in memory.

    A loop over a tensor hands out views of its elements. So the step is known without reading a value from the device.
    """
    for candidate in candidates:
        if isinstance(candidate, Tensor) and candidate.ndim == 0 and _share_memory(candidate, timesteps):
            offset, stride = int(candidate.storage_offset() - timesteps.storage_offset()), timesteps.stride(0)
            if stride and offset % stride == 0 and 0 <= offset // stride < len(timesteps):
                return offset // stride
    return None


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _is_for_uncond(pipeline: Any, module: nn.Module) -> bool:
    """Whether the pipeline has the module for the branch without the prompt, by the name of the component."""
    parts = ((name, part) for name, part in vars(pipeline).items() if isinstance(part, nn.Module))
    return any(unwrap(part) is module for name, part in parts if _NEGATIVE.search(name))


def _branch_by_name(local: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Tells cond from uncond by the name under which the pipeline holds the conditioning tensor that it passes."""
    passed = {id(value) for value in (*args, *kwargs.values()) if isinstance(value, (Tensor, list))}
    names = [name for name, value in local.items() if id(value) in passed and _CONDITIONING.search(name)]
    return "uncond" if any(_NEGATIVE.search(name) for name in names) else "cond"
