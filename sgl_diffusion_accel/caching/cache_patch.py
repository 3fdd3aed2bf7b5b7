"""The patch that a cache leaves on a pipeline: applied to its transformers, with statistics."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import nn

from sgl_diffusion_accel.caching import patch_summary as report
from sgl_diffusion_accel.caching.blocks.block_handlers import BlockHandler, Controller
from sgl_diffusion_accel.caching.blocks.cached_model import CachedModel, Parts
from sgl_diffusion_accel.caching.blocks.layout import find_block_lists
from sgl_diffusion_accel.caching.foreign import has_foreign_cache
from sgl_diffusion_accel.caching.outputs.output_handlers import MakePace, OutputController
from sgl_diffusion_accel.caching.parts.stats import RunStats, Stats
from sgl_diffusion_accel.errors import ConfigError, UnsupportedModelError
from sgl_diffusion_accel.loop.session import Session
from sgl_diffusion_accel.patch import Patch, patches_of
from sgl_diffusion_accel.targets import unwrap

KIND = "cache"

logger = logging.getLogger(__name__)


class CachePatch(Patch):
    """A cache on the transformers of a pipeline.

    Attributes:
        title: What the cache is, with its settings, in a line.
        components: Names of the transformers that it is on.
    """

    def __init__(self, title: str) -> None:
        super().__init__(KIND)
        self.title = title
        self.components: list[str] = []
        self._session = Session()
        self._has_warned = False

    @property
    def stats(self) -> Stats:
        """What the cache did, run by run."""
        if self.replaced and not self._has_warned:
            self._has_warned = True
            logger.warning("%s: %s.", self.title, self.notice)
        return self._session.stats

    @property
    def run_here(self) -> RunStats | None:
        """What the cache did in the run whose call came last in this thread; None before any."""
        return self._session.run_here

    def held_bytes(self) -> int:
        """Bytes of the tensors that are kept for the runs under way; 0 between runs."""
        return self._session.nbytes()

    def attach(self, name: str, transformer: nn.Module, parts: Parts) -> None:
        """Puts the cache on one transformer.

        A wrapper (`targets.unwrap`) is intercepted as well: that of `torch.compile` may have kept the transformer's own
        `__call__`, and others do work of theirs that a skipped call has no use for.
        """
        self.components.append(name)
        wrapper, transformer = transformer, unwrap(transformer)
        controller = Controller(self, CachedModel(name, transformer, parts), self._session)
        self.intercept(transformer, controller)
        if wrapper is not transformer:
            self.intercept(wrapper, controller)
        for list_index, blocks in enumerate(find_block_lists(transformer).values()):
            for index, block in enumerate(blocks):
                self.intercept(block, BlockHandler(controller, list_index, index))

    def attach_whole(self, name: str, transformer: nn.Module, pace: MakePace) -> None:
        """Puts the cache around one transformer, whose calls it answers as a whole."""
        self.components.append(name)
        controller = OutputController(self, name, unwrap(transformer), self._session, pace)
        self.intercept(unwrap(transformer), controller)
        if unwrap(transformer) is not transformer:
            self.intercept(transformer, controller)

    def _on_taken_off(self) -> None:
        self._session.runs.clear()

    def __repr__(self) -> str:
        return report.line(self.title, self.components, self.notice, self._session.stats)

    def __str__(self) -> str:
        return report.text(self.title, self.notice, self._session.stats)

    def _repr_html_(self) -> str:
        return report.html(self.title, self.notice, self._session.stats)


def apply_cache(
    title: str, transformers: Mapping[str, nn.Module], parts: Mapping[str, Parts], pipe: object = None
) -> CachePatch:
    """Puts a cache on transformers; one that is there already is taken off first.

    Args:
        title: What the cache is, in a line.
        transformers: Component name to transformer.
        parts: The same names to what the cache is made of; a component without parts is left alone.
        pipe: The pipeline that they are of.
    """
    patch = CachePatch(title)
    _tell_of_replaced(transformers)
    with patch.applying(pipe, map(unwrap, transformers.values())):
        for name, transformer in transformers.items():
            if name in parts:
                patch.attach(name, transformer, parts[name])
    return patch


def apply_output_cache(
    title: str, transformers: Mapping[str, nn.Module], pace: MakePace, pipe: object = None
) -> CachePatch:
    """Puts a cache of whole calls on transformers; a cache that is there already is taken off first.

    Args:
        title: What the cache is, in a line.
        transformers: Component name to transformer.
        pace: Makes what decides the steps of a run.
        pipe: The pipeline that they are of.
    """
    patch = CachePatch(title)
    _tell_of_replaced(transformers)
    with patch.applying(pipe, map(unwrap, transformers.values())):
        for name, transformer in transformers.items():
            patch.attach_whole(name, transformer, pace)
    return patch


def _tell_of_replaced(transformers: Mapping[str, nn.Module]) -> None:
    """Warns where a cache that will be replaced is on other transformers, too."""
    patches = [patch for transformer in transformers.values() for patch in patches_of(unwrap(transformer))]
    for old in dict.fromkeys(patches):
        if isinstance(old, CachePatch) and not old.is_open and len(old.components) > len(transformers):
            logger.warning("the cache that is replaced was also on %s: it is gone there.", " and ".join(old.components))


def refuse_foreign_cache(transformers: Mapping[str, nn.Module]) -> None:
    """Raises UnsupportedModelError where one of diffusers' own caches is on a transformer."""
    for name, transformer in transformers.items():
        if getattr(transformer, "is_cache_enabled", False) or has_foreign_cache(unwrap(transformer)):
            raise UnsupportedModelError(
                f"pipe.{name} has one of diffusers' own caches on it, and two caches cannot share a model. "
                f"Type: pipe.{name}.disable_cache()"
            )


def refuse_cached(transformers: Mapping[str, nn.Module], purpose: str) -> None:
    """Raises where a cache is on a transformer, ours or another, for what needs uncached runs.

    Args:
        transformers: Component name to transformer.
        purpose: What needs them, for the error.

    Raises:
        ConfigError: One of this library's caches is on one of them.
        UnsupportedModelError: One of diffusers' own is.
    """
    refuse_foreign_cache(transformers)
    for transformer in transformers.values():
        if any(patch.kind == KIND for patch in patches_of(unwrap(transformer))):
            raise ConfigError(f"a cache is on this pipeline, and {purpose} needs uncached runs. Type: remove(pipe)")
