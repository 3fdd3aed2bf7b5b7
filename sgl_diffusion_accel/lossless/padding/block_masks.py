"""The blocks of a transformer that are handed a mask, and whether it can be taken from them."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import nn

from sgl_diffusion_accel.attention.sites import find_sites, processor_of
from sgl_diffusion_accel.intercept import release
from sgl_diffusion_accel.lossless.call_handler import KIND
from sgl_diffusion_accel.lossless.padding.table import InBlocks
from sgl_diffusion_accel.targets import Target, is_in_compiled_wrapper, model_class


class BlockMasks:
    """The masks of one transformer's blocks.

    Args:
        target: The transformer.
        blocks: Where they are; None where the transformer makes none for its blocks.
    """

    def __init__(self, target: Target, blocks: InBlocks | None) -> None:
        self._module = weakref.ref(target.module)
        self._name = target.name
        self._in_wrapper = is_in_compiled_wrapper(target.wrapper)
        self._lists = blocks.lists if blocks is not None else ()
        own = blocks.own if blocks is not None else ""
        own_class: Any = getattr(sys.modules[model_class(target.module).__module__], own) if own else None
        self._own_code = own_class.__call__.__code__ if own else None
        # Found once: the walk through the blocks takes longer than a call may cost.
        sites = [site for block in self.blocks for site in find_sites(block)] if own else []
        self._layers = [weakref.ref(site.layer) for site in sites]

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks."""
        module = self._module()
        return [block for name in self._lists for block in getattr(module, name, ())]

    @property
    def is_compiled(self) -> bool:
        """Whether the transformer is compiled as a whole, which what stands before its blocks would cut into pieces."""
        return self._in_wrapper or getattr(self._module(), "_compiled_call_impl", None) is not None

    @property
    def hindrance(self) -> str:
        """Why the masks cannot be taken from the blocks; empty where they can."""
        if not self._lists:
            return ""
        if self.is_compiled:
            return (
                "it is compiled as a whole. To be rid of them, type: "
                f"pipe.{self._name}.compile_repeated_blocks(fullgraph=True)"
            )
        if torch.is_grad_enabled() and getattr(self._module(), "gradient_checkpointing", False):
            return "they run once more for gradients, outside of the transformer's call"
        if not all(map(self._has_known_processor, self._layers)):
            return "their attention processors are others than diffusers' own"
        return ""

    def can_drop(self) -> bool:
        """Whether the blocks can be given no mask; before those of a model compiled as a whole nothing is left."""
        hindrance = self.hindrance
        if hindrance and self.is_compiled:
            for block in self.blocks:
                release(block, KIND)
        return not hindrance

    def _has_known_processor(self, found: weakref.ref[nn.Module]) -> bool:
        # The code and not the class: an attention backend gives them a class of its own, with a copy of the same code.
        layer = found()
        processor: Any = type(processor_of(layer)) if layer is not None else None
        return getattr(getattr(processor, "__call__", None), "__code__", None) == self._own_code  # noqa: B004
