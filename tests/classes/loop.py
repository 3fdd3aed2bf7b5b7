"""A small denoising loop, as somebody writes one by hand around a bare transformer, and what was seen of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from sgl_diffusion_accel import branch, denoising_steps

from .base import Row

STEPS = 10
"""Of a run: the fewest that the adaptive cache skips any of."""


@dataclass
class Trace:
    """One run.

    Attributes:
        calls: The arguments of each call.
        outputs: What the loop got, the tensors of each call.
        computed: What the transformer itself returned, by step; a step whose call was answered for it is missing.
    """

    calls: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)
    computed: dict[int, list[Tensor]] = field(default_factory=dict)


def arguments(row: Row, model: nn.Module, as_tuple: bool = True) -> dict[str, Any]:
    """The arguments of the first call of a run."""
    given = row.prepare(model, row.given())
    given.pop("return_dict", None)
    can_choose = "return_dict" in inspect.signature(type(model).forward).parameters
    return {**given, "return_dict": False} if as_tuple and can_choose else given


def run(row: Row, model: nn.Module, given: dict[str, Any]) -> Trace:
    """Denoises by Euler's method in a loop that says where it is."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    sigmas, trace = scheduler.sigmas, Trace()
    latents = given[row.stream]
    with torch.no_grad(), _recording(model, trace):
        for step, _ in enumerate(denoising_steps(scheduler.timesteps, scheduler=scheduler)):
            call = {**given, row.stream: latents, row.time: _at(given[row.time], float(sigmas[step]))}
            trace.calls.append(call)
            with branch("cond"):
                output = model(**call)
            trace.outputs.append([tensor.clone() for tensor in tensors_of(output)])
            latents = _moved(latents, trace.outputs[-1], float(sigmas[step + 1] - sigmas[step]))
    return trace


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of an output, whatever it is made of."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


@contextmanager
def _recording(model: nn.Module, trace: Trace) -> Iterator[None]:
    def keep(_module: Any, _args: Any, output: Any) -> None:
        trace.computed[len(trace.outputs)] = [tensor.clone() for tensor in tensors_of(output)]

    hook = model.register_forward_hook(keep)
    yield
    hook.remove()


def _at(noisiest: Tensor, sigma: float) -> Tensor:
    return (noisiest * sigma).to(noisiest.dtype)


def _moved(latents: Any, outputs: list[Tensor], by: float) -> Any:
    """The latents of the next step; where the output is of another shape, they go their own way."""
    if isinstance(latents, list):
        return [_moved(each, [output], by) for each, output in zip(latents, outputs, strict=False)]
    return latents + by * outputs[0] if latents.shape == outputs[0].shape else 0.9 * latents + 0.05
