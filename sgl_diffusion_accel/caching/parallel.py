"""Keeps the ranks of a parallel run in step: all of them take the same decision."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from sgl_diffusion_accel.caching.signals import Reduce


def signal_reduction(transformer: nn.Module) -> Reduce | None:
    """Returns how to combine a signal over ranks, None where each rank holds all of it.

    Under context parallelism every rank sees its own part of the tokens. One all-reduce of two numbers gives all of
    them the distance over all tokens. Tensor parallelism gives every rank the whole hidden states and needs nothing.

    Args:
        transformer: The transformer, with diffusers' parallel configuration if it has one.
    """
    config: Any = getattr(transformer, "_parallel_config", None)
    context = getattr(config, "context_parallel_config", None)
    mesh = getattr(context, "_flattened_mesh", None)
    if mesh is None or not dist.is_available() or not dist.is_initialized():
        return None
    group = mesh.get_group()

    def reduce(means: Tensor) -> None:
        dist.all_reduce(means, group=group)  # a sum: the distance is a ratio of the two, so the count drops out

    return reduce
