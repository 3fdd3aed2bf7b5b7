"""The tiny pipelines of the cases, what their runs compute, and what a patch has left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from invariants.families import present
from sgl_diffusion_accel.slots import SLOT, original_class
from zoo import Family
from zoo.base import normal

BLOCKS = 2
"""Blocks of a model: the first one is always computed by a block cache, and two may be skipped."""

PAD = 4
"""Tokens of padding in each prompt of the model "qwen, padded"."""

MODELS = ("wan", "qwen, padded")


class Work:
    """Counts how much of the blocks is computed: blocks that run, or compiled graphs that run.

    Attributes:
        done: How many.
    """

    def __init__(self) -> None:
        self.done = 0

    def compile(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        """A compiler backend that runs what was captured as it is: what is compiled of it is no matter of a patch."""

        def counted(*args: Any) -> Any:
            self.done += 1
            return graph.forward(*args)

        return counted

    def count(self, *_: Any) -> None:
        """For a hook."""
        self.done += 1


def family_of(model: str) -> Family:
    return present(model.split(",", maxsplit=1)[0])


def call(model: str, pipe: Any, steps: int) -> dict[str, Any]:
    """The arguments of a run, floats in the type of the transformer."""
    given = family_of(model).call(pipe, steps=steps)
    if model == "qwen, padded":
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            given[name] = torch.cat([given[name], normal(1, PAD, given[name].shape[-1], seed=9)], 1)
            mask = given[f"{name}_mask"]
            given[f"{name}_mask"] = torch.cat([mask, torch.zeros(1, PAD, dtype=mask.dtype)], 1)
    dtype = pipe.transformer.dtype
    is_float = {name: isinstance(value, Tensor) and value.is_floating_point() for name, value in given.items()}
    return {name: value.to(dtype) if is_float[name] else value for name, value in given.items()}


def relative(output: Tensor, expected: Tensor) -> float:
    """How far two outputs are apart, as a share of the second one's size."""
    return ((output.double() - expected.double()).norm() / expected.double().norm()).item()


def leftovers(pipe: Any) -> Iterator[str]:
    """What this library has left on the modules of a pipeline."""
    for name, module in pipe.components.items():
        for path, part in module.named_modules() if isinstance(module, nn.Module) else ():
            if type(part) is not original_class(part):
                yield f"class of {name}.{path}"
            if SLOT in vars(part):
                yield f"slot of {name}.{path}"
            # The compiler keeps the call of the model as it found it, under the name of who held it then.
            held = {"forward"} if isinstance(part, torch._dynamo.OptimizedModule) else set()
            found = (key for key, value in _attributes(part) if key not in held and _is_ours(value))
            yield from (f"{key} of {name}.{path}" for key in found)
    if type(pipe.scheduler) is not original_class(pipe.scheduler) or SLOT in vars(pipe.scheduler):
        yield "scheduler"


def _attributes(part: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, value in vars(part).items():
        yield key, value
        if isinstance(value, dict):
            yield from ((f"{key}[{each!r}]", one) for each, one in value.items())


def _is_ours(value: Any) -> bool:
    module = getattr(value, "__module__", None) or type(value).__module__
    return isinstance(module, str) and module.startswith("sgl_diffusion_accel")


@contextmanager
def counting(pipe: Any, family: Family, work: Work) -> Iterator[None]:
    """Counts the blocks that run without being compiled."""
    hooks = [block.register_forward_hook(work.count) for _, _, block in family.blocks(pipe.transformer)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
