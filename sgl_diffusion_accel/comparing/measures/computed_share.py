"""Tells what one run has computed: which share of the blocks, and at which steps."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from sgl_diffusion_accel.caching.cache_patch import CachePatch
from sgl_diffusion_accel.caching.parts.stats import RunStats
from sgl_diffusion_accel.comparing.measures.block_work import BlockWork, is_compiled
from sgl_diffusion_accel.patch import patches_on
from sgl_diffusion_accel.targets import find_targets

Maps = Mapping[str, tuple[bool, ...]]
"""Branch to whether each denoising step was computed."""


class Computed:
    """Watches one run of a patched pipeline.

    Caches of this library keep the count themselves, which costs nothing. For all else the work of the linear layers
    is counted by hooks, if it is asked for: that takes a little time.

    Args:
        pipe: The pipeline, patched.
        count: Whether to count where no cache of this library does.

    Attributes:
        counts_itself: Whether caches of this library, on all transformers, tell what was computed.
        compiles: Whether compiled code is likely to be compiled anew, being patched by something else.
        share: After the run: share of the blocks that were computed; None if it was not counted.
        maps: After the run: which steps were computed, where a cache of this library was on.

    Example:
        >>> with Computed(pipe, count=True) as computed:
        ...     output = pipe(**call)
        >>> computed.share
        1.0
    """

    def __init__(self, pipe: Any, count: bool) -> None:
        targets = find_targets(pipe)
        caches = {id(patch): patch for patch in patches_on(pipe) if isinstance(patch, CachePatch)}
        self._caches = [(cache, cache.stats.started) for cache in caches.values()]
        covered = all(any(isinstance(patch, CachePatch) for patch in patches_on(target.module)) for target in targets)
        self.counts_itself = covered
        self.share: float | None = None
        self.maps: Maps = {}
        self.compiles = not covered and any(is_compiled(target.wrapper) for target in targets)
        hooks = count and not covered and not self.compiles
        self._work = [BlockWork(target.module) for target in targets] if hooks else []

    def __enter__(self) -> Computed:
        for work in self._work:
            work.__enter__()
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for work in self._work:
            work.__exit__(error, value, traceback)
        runs = [run for cache, before in self._caches for run in _runs_since(cache, before)]
        self.maps = {name: branch.computed for run in runs for name, branch in run.branches.items()}
        full = sum(work.full for work in self._work)
        if self.counts_itself:
            self.share = _share(runs)
        elif full:
            self.share = sum(work.total for work in self._work) / full


def _runs_since(cache: CachePatch, before: int) -> tuple[RunStats, ...]:
    new = cache.stats.started - before
    return cache.stats.runs[-new:] if new else ()


def _share(runs: list[RunStats]) -> float:
    """Over all runs and branches; 1 where nothing ran in a loop that a cache knows, since then nothing is skipped."""
    records = [record for run in runs for branch in run.branches.values() for record in branch.records]
    blocks = sum(record.blocks for record in records)
    return sum(record.blocks_run for record in records) / blocks if blocks else 1.0
