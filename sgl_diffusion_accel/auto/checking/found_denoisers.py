"""The transformers of a pipeline: parameters, memory, blocks, attention backends."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from sgl_diffusion_accel.attention.sites import find_scopes, find_sites
from sgl_diffusion_accel.attention.usable import usable
from sgl_diffusion_accel.auto.checking.findings import Denoiser
from sgl_diffusion_accel.caching.blocks.layout import find_block_lists
from sgl_diffusion_accel.caching.blocks.odd_models import ODD_MODELS
from sgl_diffusion_accel.errors import UnsupportedModelError
from sgl_diffusion_accel.targets import Target

_USUAL = (torch.bfloat16, torch.float32)
"""Types in which weights are loaded; told of models that have none yet."""


class _OnHost:
    """In the place of a pipeline without weights, on a machine without a GPU."""

    _execution_device = torch.device("cpu")


def denoiser_of(pipe: object, target: Target) -> Denoiser:
    """What is known of a transformer before it runs.

    Args:
        pipe: The pipeline.
        target: The transformer.
    """
    blocks, wiring = _blocks(target)
    parameters = list(target.module.parameters())
    count = sum(each.numel() for each in parameters)
    is_loaded = not any(each.device.type == "meta" for each in parameters)
    weights = Counter[str]()
    for each in parameters if is_loaded else ():
        weights[_name(each.dtype)] += each.numel() * each.element_size()
    return Denoiser(
        component=target.name,
        model=target.model,
        parameters=count,
        weights=dict(weights) if is_loaded else {_name(dtype): count * dtype.itemsize for dtype in _USUAL},
        is_loaded=is_loaded,
        blocks=blocks,
        wiring=wiring,
        attention=_backends(pipe if is_loaded or torch.cuda.is_available() else _OnHost(), target.module),
    )


def _blocks(target: Target) -> tuple[dict[str, int], str]:
    try:
        lists = find_block_lists(target.module)
    except UnsupportedModelError as error:
        return {}, str(error)
    odd = ODD_MODELS.get(target.model)
    row = (
        "" if odd is None or odd.max_bn is None else f"; at most {odd.max_bn} last blocks may be computed by themselves"
    )
    counts = {name: len(blocks) for name, blocks in lists.items()}
    return counts, f"their wiring is learned at the first computed step, and refused there if it cannot be{row}"


def _backends(pipe: object, module: nn.Module) -> tuple[str, ...]:
    sites = [site for site in find_sites(module) if site.can_redirect]
    return tuple(usable(pipe, module, sites)) if sites or find_scopes(module) else ()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
