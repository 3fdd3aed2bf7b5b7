"""The step masks that have a name, and the shape of the late ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

Bins = tuple[tuple[int, ...], tuple[int, ...]]
"""Lengths of the stretches of computed and of skipped steps, which alternate, computed first."""

# The presets of SGLang-Diffusion and cache-dit, at the step counts for which they state them.
_BINS: dict[int, dict[str, Bins]] = {
    28: {
        "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
        "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
        "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
        "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
    },
    50: {
        "slow": ((22, 5, 5, 3, 2, 1), (2, 3, 3, 3, 1)),
        "medium": ((16, 3, 3, 3, 3, 1), (2, 5, 5, 5, 4)),
        "fast": ((11, 2, 2, 2, 2, 1), (2, 5, 7, 9, 7)),
        "ultra": ((7, 2, 2, 2, 1), (3, 9, 11, 13)),
    },
    9: {
        "slow": ((5, 3), (1,)),
        "medium": ((5, 1, 1), (1, 1)),
        "fast": ((4, 1, 1), (1, 2)),
        "ultra": ((3, 1, 1), (2, 2)),
    },
    8: {
        "slow": ((5, 2), (1,)),
        "medium": ((4, 1, 1), (1, 1)),
        "fast": ((3, 1, 1), (1, 2)),
        "ultra": ((2, 1, 1), (2, 2)),
    },
}
_FEW: dict[int, str] = {1: "1", 2: "11", 3: "111", 4: "1101", 5: "11011", 6: "111001", 7: "1110101"}

# Share of the steps that each late preset computes: about that of the preset without "late-".
_LATE = {"late-slow": 0.7, "late-medium": 0.54, "late-fast": 0.4, "late-ultra": 0.28}
_LATE_WARMUP = 3
_LATE_POWER = 1.4  # 1 spaces the computed steps evenly; 1.4 was best or near it on trained small models

PRESETS = (*_BINS[28], *_LATE)
"""Names of the preset masks: SGLang's, then the late ones, each from the mildest to the boldest."""


def alternate(compute_bins: Sequence[int], cache_bins: Sequence[int]) -> tuple[int, ...]:
    """Returns the mask that the bins describe."""
    steps: list[int] = []
    for index, length in enumerate(compute_bins):
        steps += [1] * length
        if index < len(cache_bins):
            steps += [0] * cache_bins[index]
    return tuple(steps)


@functools.lru_cache(maxsize=256)
def preset_steps(name: str, total: int) -> tuple[int, ...]:
    """Returns the mask of a preset for a run.

    SGLang's presets: as published for 28, 50, 9 and 8 steps; at other counts the published shape nearest in kind,
    with the share of computed steps between those published. Below 8 steps all presets are the same mild mask, and up
    to 3 steps everything is computed.

    Args:
        name: One of `PRESETS`.
        total: Number of denoising steps.
    """
    if name in _LATE:
        return late_steps(_LATE[name], total)
    if total in _FEW:
        return _few(total)
    if total in _BINS:
        return alternate(*_BINS[total][name])
    computed = round(_share(name, total) * total)
    compute_bins, cache_bins = _BINS[9 if total < 15 else 28 if total < 40 else 50][name]
    return alternate(_apportion(computed, compute_bins, 1), _apportion(total - computed, cache_bins, 0))


def _share(name: str, total: int) -> float:
    """Share of computed steps, on the line between the published ones beside `total`."""
    shares = {count: sum(bins[name][0]) / count for count, bins in _BINS.items()}
    below = max(count for count in shares if count <= total)
    above = min((count for count in shares if count >= total), default=below)
    weight = (total - below) / (above - below) if above > below else 0.0
    return shares[below] * (1 - weight) + shares[above] * weight


def _apportion(total: int, shape: Sequence[int], least: int) -> list[int]:
    """Divides a number into bins in proportion to `shape`, each with at least `least`."""
    bins = [least] * len(shape)
    for _ in range(total - sum(bins)):
        bins[max(range(len(bins)), key=lambda i: shape[i] * total / sum(shape) - bins[i])] += 1
    return bins


@functools.lru_cache(maxsize=256)
def late_steps(share: float, total: int) -> tuple[int, ...]:
    """Returns the mask that computes the first three steps and then ever more densely towards the end.

    After the warm-up of w steps the u-th part of the computed steps lies at step w - 1 + (N - w)·(1 - (1 - u)^1.4).

    Args:
        share: Share of the steps to compute.
        total: Number of denoising steps, N.
    """
    if total in _FEW:
        return _few(total)
    wanted = max(round(share * total), _LATE_WARMUP + 2)
    best: tuple[int, ...] = ()
    for points in range(1, 8 * total):
        chosen = {round(_LATE_WARMUP - 1 + (total - _LATE_WARMUP) * _progress(n / points)) for n in range(points + 1)}
        steps = tuple(int(step < _LATE_WARMUP or step in chosen) for step in range(total))
        if sum(steps) <= wanted:
            best = steps
        if sum(steps) >= wanted:
            break
    return best


def _progress(part: float) -> float:
    return 1.0 - math.pow(1.0 - part, _LATE_POWER)


def _few(total: int) -> tuple[int, ...]:
    return tuple(int(step) for step in _FEW[total])
