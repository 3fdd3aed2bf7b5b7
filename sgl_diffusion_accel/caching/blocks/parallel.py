"""Keeps the ranks of a context-parallel run in step: each holds a part of the tokens, all take the same decision."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from sgl_diffusion_accel.caching.parts.signals import Reduce


def _group(transformer: nn.Module) -> Any:
    """The ranks that share the tokens of a transformer, by diffusers' configuration; None without parallelism.

    Tensor parallelism gives every rank the whole hidden states and needs nothing.
    """
    config: Any = getattr(transformer, "_parallel_config", None)
    mesh = getattr(getattr(config, "context_parallel_config", None), "_flattened_mesh", None)
    return mesh.get_group() if mesh is not None and dist.is_initialized() else None


def signal_reduction(transformer: nn.Module) -> Reduce | None:
    """Returns how to combine a signal over ranks, None where each rank holds all of it.

    One all-reduce of two numbers gives every rank the distance over all tokens.

    Args:
        transformer: The transformer, with diffusers' parallel configuration if it has one.
    """
    group = _group(transformer)
    if group is None:
        return None

    def reduce(means: Tensor) -> None:
        dist.all_reduce(means, group=group)  # a sum: the distance is a ratio of the two, so the count drops out

    return reduce


def local_part(whole: Tensor, like: Tensor, transformer: nn.Module) -> Tensor:
    """Returns this rank's part of a tensor.

    Some models hand their first block all tokens and divide them inside it: whole goes in, a part comes out.

    Args:
        whole: What a block takes, `[B, T, C]`.
        like: What belongs to it on this rank, `[B, T / ranks, C]` or of the same shape.
        transformer: The transformer.

    Returns:
        The part that `like` belongs to; `whole` itself where the shapes agree or no such part exists.
    """
    if whole.shape == like.shape:
        return whole
    differing = [dim for dim in range(whole.ndim) if whole.ndim == like.ndim and whole.shape[dim] != like.shape[dim]]
    group = _group(transformer) if len(differing) == 1 else None
    if group is None:
        return whole
    return whole.tensor_split(dist.get_world_size(group), differing[0])[dist.get_rank(group)]
