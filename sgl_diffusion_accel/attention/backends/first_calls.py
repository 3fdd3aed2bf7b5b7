"""Which attention calls are verified: first ones alone, since the check costs more than the call."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion_accel.attention.backends.backend_table import Backend

_MOST_OF_A_LAYER = 8
"""Calls of one layer that are verified: one for each shape and mask, such as those of cond and uncond."""
_MOST_KINDS = 64
"""Kinds of calls that are verified where layers are not told apart."""


class FirstCalls:
    """Hands first calls to a check.

    Args:
        verify: Takes (layer, backend, output, sides, arguments), and raises if the output is wrong.
        by_layer: Whether those of each layer are handed over, one for each shape and mask. Else one for each kind of
            call, whatever its layer: shapes, type, and what else tells calls apart but for the numbers in them.
    """

    def __init__(self, verify: Callable[..., None], by_layer: bool) -> None:
        self._verify = verify
        self._by_layer = by_layer
        self._of_layers: dict[str, list[tuple[Any, ...]]] = {}  # layer to what has been verified: shapes and mask
        self._kinds: set[tuple[Any, ...]] = set()
        self._lock = threading.Lock()

    def check(
        self,
        layer: Callable[[], str],
        backend: Backend,
        output: Tensor,
        sides: tuple[Tensor, ...],
        more: dict[str, Any],
    ) -> None:
        """Verifies a call if it is a first one. One that is wrong stays one, and is refused each time.

        Args:
            layer: Finds the name of the layer, which takes longer than a kernel's start.
            backend: Computed the call.
            output: `[B, H, Q, D]`.
            sides: Query, key and value.
            more: `mask`, `is_causal`, `scale` and `enable_gqa`.
        """
        if sides[0].is_cuda and torch.cuda.is_current_stream_capturing():  # reading a value would break the graph
            return
        if self._by_layer:
            self._check_layer(layer(), backend, output, sides, more)
            return
        kind = _kind(sides, more)
        if kind not in self._kinds and len(self._kinds) < _MOST_KINDS:
            self._verify(layer(), backend, output, sides, more)
            with self._lock:
                self._kinds.add(kind)

    def _check_layer(
        self, layer: str, backend: Backend, output: Tensor, sides: tuple[Tensor, ...], more: dict[str, Any]
    ) -> None:
        mask, shapes = more["mask"], (sides[0].shape, sides[1].shape)
        with self._lock:
            verified = self._of_layers.setdefault(layer, [])
            is_known = any(
                known == shapes and kept() is mask and (kept is _no_mask) == (mask is None) for known, kept in verified
            )
            is_due = not is_known and len(verified) < _MOST_OF_A_LAYER
        if is_due:
            self._verify(layer, backend, output, sides, more)
            with self._lock:
                verified.append((shapes, weakref.ref(mask) if mask is not None else _no_mask))


def _kind(sides: tuple[Tensor, ...], more: dict[str, Any]) -> tuple[Any, ...]:
    mask = more["mask"]
    of_mask = None if mask is None else (mask.dtype, mask.shape)
    rest = (more["is_causal"], more["scale"], more["enable_gqa"])
    return (*(side.shape for side in sides), sides[0].dtype, sides[0].device, of_mask, *rest)


def _no_mask() -> None:
    """Stands for a weak reference to a mask."""
