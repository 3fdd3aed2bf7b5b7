"""Which backends a model can have on this machine, as far as it is known before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sgl_diffusion_accel.attention.backends.backend_table import Backend
from sgl_diffusion_accel.attention.backends.registry import all_backends
from sgl_diffusion_accel.attention.backends.requirements import AttentionFacts, capability
from sgl_diffusion_accel.attention.sites import Site

_SMALLEST = 2  # bytes of a number that is computed with; smaller ones are only stored and cast before


def usable(pipe: object, module: nn.Module, sites: Sequence[Site]) -> list[str]:
    """The names of the backends that a component can have on this machine."""
    return [each.name for each in all_backends().values() if why_not(each, pipe, module, sites) is None]


def why_not(backend: Backend, pipe: object, module: nn.Module, sites: Sequence[Site]) -> str | None:
    """Why a component cannot have a backend on this machine without fetching anything, None if it can."""
    reasons = [backend.requirements.refuses(facts) for facts in model_facts(pipe, module, sites, backend)]
    return backend.lacks() or next((reason for reason in reasons if reason), None) or backend.would_fetch()


def model_facts(pipe: object, module: nn.Module, sites: Sequence[Site], backend: Backend) -> list[AttentionFacts]:
    """What a model tells before it runs, one entry for each head size.

    A model that is still on the CPU of a machine with a GPU may be moved, and cast, before it runs: then neither device
    nor dtype are held against it.
    """
    layers = [site.layer for site in sites] or [module]
    tensor = next((p for layer in layers for p in layer.parameters() if p.is_floating_point()), None)
    device = getattr(pipe, "_execution_device", None) or (tensor.device if tensor is not None else torch.device("cpu"))
    needs = backend.requirements.devices
    may_move = bool(needs) and device.type not in needs and "cuda" in needs and torch.cuda.is_available()
    known = sorted({size for layer in layers for size in [_head_size(layer)] if size is not None})
    sizes: list[int | None] = [*known] or [None]
    if may_move or device.type == "meta":
        return [AttentionFacts(head_size=size) for size in sizes]
    return [
        AttentionFacts(
            device=device.type,
            capability=capability(device),
            is_hip=torch.version.hip is not None,
            dtype=None if tensor is None or tensor.element_size() < _SMALLEST else tensor.dtype,
            head_size=size,
        )
        for size in sizes
    ]


def _head_size(layer: nn.Module) -> int | None:
    """The size of a layer's heads, as far as it tells."""
    for name in ("head_dim", "dim_head", "attention_head_dim"):
        size = getattr(layer, name, None)
        if isinstance(size, int):
            return size
    width, heads = getattr(layer, "inner_dim", None), getattr(layer, "heads", None)
    if isinstance(width, int) and isinstance(heads, int) and heads > 0:
        return width // heads
    config = getattr(layer, "config", None)
    for name in ("head_dim", "d_kv"):
        size = getattr(config, name, None)
        if isinstance(size, int):
            return size
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads > 0 else None


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used with a pipeline on this machine.

    Attributes:
        name: The name that `set_attention_backend` takes.
        aliases: Other names for it.
        is_usable: Whether it can be set. What only a call tells (masks, causal) is checked then.
        reason: Why not, or empty.
        is_exact: Whether it computes in the precision of its inputs.
        masks: Whether it takes masks.
        install: How to get it, or empty.
    """

    name: str
    aliases: tuple[str, ...]
    is_usable: bool
    reason: str
    is_exact: bool
    masks: bool
    install: str


class BackendTable(tuple[BackendStatus, ...]):
    """The table of attention backends; `print` shows it."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("backend", "usable", "exact", "masks", "why not")]
        rows += [
            (each.name, "yes" if each.is_usable else "no", _yes(each.is_exact), _yes(each.masks), each.reason)
            for each in self
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
            for row in rows
        )


def _yes(value: bool) -> str:
    return "yes" if value else "no"
