"""Looks at a run from outside: what the transformer returned, which blocks ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from zoo import Family, tensor_of


class FixedPath(FlowMatchEulerDiscreteScheduler):
    """A scheduler that ignores the model's output: every run passes through the same latents.

    So what the transformer returns at one call cannot reach another call but through a cache.
    """

    def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        following = super().step(torch.zeros_like(sample), timestep, sample, *args, **kwargs)
        if isinstance(following, tuple):
            return (following[0] * 0.9 + 0.05, *following[1:])
        following.prev_sample = following.prev_sample * 0.9 + 0.05
        return following


def transformer_outputs(family: Family, pipe: Any, **kw: Any) -> list[torch.Tensor]:
    """What the transformers returned in one run, in the order of the calls.

    `kw` goes to `family.call`; `swap=True` exchanges the prompt and the negative prompt.
    """
    seen: list[torch.Tensor] = []

    def record(module: Any, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) else output.sample
        seen.append(tensor_of(first).detach().clone())

    swap = kw.pop("swap", False)
    arguments = family.call(pipe, **kw)
    if swap:
        for key in [key for key in arguments if key.startswith("negative_") and arguments[key] is not None]:
            other = key.removeprefix("negative_")
            arguments[key], arguments[other] = arguments[other], arguments[key]
    hooks = [getattr(pipe, name).register_forward_hook(record) for name in family.transformers]
    try:
        with torch.no_grad():
            pipe(**arguments, return_dict=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@contextmanager
def count_blocks(family: Family, pipe: Any) -> Iterator[Counter[tuple[str, str, int]]]:
    """Counts how often each block runs, by (transformer, list, index)."""
    counts: Counter[tuple[str, str, int]] = Counter()
    hooks = []
    for component in family.transformers:
        for name, index, block in family.blocks(getattr(pipe, component)):
            key = (component, name, index)
            counts[key] = 0
            hooks.append(block.register_forward_hook(lambda *_, key=key: counts.update([key])))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
