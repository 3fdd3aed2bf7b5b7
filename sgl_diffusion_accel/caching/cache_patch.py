"""The patch that a cache leaves on a pipeline: applied to its transformers, with statistics."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from sgl_diffusion_accel.caching import patch_summary as report
from sgl_diffusion_accel.caching.blocks.block_handlers import BlockCacheHandler, BlockHandler
from sgl_diffusion_accel.caching.blocks.cached_model import CachedModel, Parts
from sgl_diffusion_accel.caching.blocks.layout import find_block_lists
from sgl_diffusion_accel.caching.foreign import has_foreign_cache
from sgl_diffusion_accel.caching.outputs.output_handlers import MakeCallPolicy, OutputCacheHandler
from sgl_diffusion_accel.caching.parts.stats import RunStats, Stats
from sgl_diffusion_accel.errors import ConfigError, UnsupportedModelError
from sgl_diffusion_accel.loop.session import Session
from sgl_diffusion_accel.patch import Patch, patches_of
from sgl_diffusion_accel.targets import Target, Targets, find_targets

KIND = "cache"

logger = logging.getLogger(__name__)


class CachePatch(Patch):
    """A cache on the transformers of a pipeline.

    Attributes:
        title: What the cache is, with its settings, in a line.
        config: The settings that it was applied with.
        components: Names of the transformers that it is on.
    """

    def __init__(self, title: str, config: object = None) -> None:
        super().__init__(KIND)
        self.title = title
        self.config = config
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

    def attach(self, target: Target, parts: Parts) -> None:
        """Puts the cache on the blocks of a transformer."""
        self.components.append(target.name)
        handler = BlockCacheHandler(self, CachedModel(target.name, target.module, parts), self._session)
        self.stand_before(target, handler)
        for list_index, blocks in enumerate(find_block_lists(target.module).values()):
            for index, block in enumerate(blocks):
                # All blocks, not the span alone: the first give the signal, and `BlockOrder` has to see each of them.
                self.intercept(block, BlockHandler(handler, list_index, index))

    def attach_whole(self, target: Target, policy: MakeCallPolicy) -> None:
        """Puts the cache around a transformer, whose calls it answers as wholes."""
        self.components.append(target.name)
        self.stand_before(target, OutputCacheHandler(self, target.name, target.module, self._session, policy))

    def _on_taken_off(self) -> None:
        self._session.runs.clear()

    def __repr__(self) -> str:
        return report.line(self.title, self.components, self.notice, self._session.stats)

    def __str__(self) -> str:
        return report.text(self.title, self.notice, self._session.stats)

    def _repr_html_(self) -> str:
        return report.html(self.title, self.notice, self._session.stats)


def put_on_blocks(targets: Targets, title: str, parts: Mapping[str, Parts], config: object = None) -> CachePatch:
    """Puts a cache on the blocks of transformers; one that is there already is taken off first.

    Args:
        targets: The transformers.
        title: What the cache is, in a line.
        parts: Their names to what the cache is made of; a component without parts is left alone.
        config: The settings that it was made from.
    """
    patch = CachePatch(title, config)
    # Before they are replaced: afterwards they are not found on the modules any more.
    _tell_of_replaced(targets)
    with patch.applying(targets):
        for target in targets:
            if target.name in parts:
                patch.attach(target, parts[target.name])
    return patch


def put_around(targets: Targets, title: str, policy: MakeCallPolicy, config: object = None) -> CachePatch:
    """Puts a cache of whole calls around transformers; a cache that is there already is taken off first.

    Args:
        targets: The transformers.
        title: What the cache is, in a line.
        policy: Makes what decides the steps of a run.
        config: The settings that it was made from.
    """
    patch = CachePatch(title, config)
    _tell_of_replaced(targets)
    with patch.applying(targets):
        for target in targets:
            patch.attach_whole(target, policy)
    return patch


def targets_of_cache(pipe: object) -> Targets:
    """The transformers of a pipeline that is to be cached.

    Raises:
        ConfigTypeError: `pipe` is no pipeline.
        UnsupportedModelError: It has no transformer, or one of diffusers' own caches is on one.
    """
    targets = find_targets(pipe)
    refuse_foreign_cache(targets)
    return targets


def _tell_of_replaced(targets: Sequence[Target]) -> None:
    """Warns where a cache that will be replaced is on other transformers, too."""
    patches = [patch for target in targets for patch in patches_of(target.module)]
    for old in dict.fromkeys(patches):
        if isinstance(old, CachePatch) and not old.is_open and len(old.components) > len(targets):
            logger.warning("the cache that is replaced was also on %s: it is gone there.", " and ".join(old.components))


def refuse_foreign_cache(targets: Iterable[Target]) -> None:
    """Raises UnsupportedModelError where one of diffusers' own caches is on a transformer."""
    for target in targets:
        if getattr(target.wrapper, "is_cache_enabled", False) or has_foreign_cache(target.module):
            raise UnsupportedModelError(
                f"pipe.{target.name} has one of diffusers' own caches on it, and two caches cannot share a model. "
                f"Type: pipe.{target.name}.disable_cache()"
            )


def refuse_cached(targets: Sequence[Target], purpose: str) -> None:
    """Raises where a cache is on a transformer, ours or another, for what needs uncached runs.

    Args:
        targets: The transformers.
        purpose: What needs them, for the error.

    Raises:
        ConfigError: One of this library's caches is on one of them.
        UnsupportedModelError: One of diffusers' own is.
    """
    refuse_foreign_cache(targets)
    if any(patch.kind == KIND for target in targets for patch in patches_of(target.module)):
        raise ConfigError(f"a cache is on this pipeline, and {purpose} needs uncached runs. Type: remove(pipe)")
