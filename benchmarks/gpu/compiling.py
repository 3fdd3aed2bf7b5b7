"""Compiled models: times with and without caches, and whether a second run compiles anything again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import caches
from .models import Built, Place
from .rows import Row, skipping, unpatched
from .store import PartLog
from .timing import DeviceTimes, relative_difference, run

_REGIONAL = ("adaptive", "static mask F0, TaylorSeer 2", "DBCache F1", "DBCache F1, TaylorSeer 1", "TeaCache")


def regional(log: PartLog, built: Built, place: Place, **how: Any) -> None:
    """Compiles each block, then measures it plain and with caches."""
    applied = {name: caches.SKIPPING[name] for name in _REGIONAL}
    _measure(log, built, place, applied, lambda: _compile_blocks(built, place, how))


def whole(log: PartLog, built: Built, place: Place, **how: Any) -> None:
    """Compiles the transformer as a whole, then measures it plain and with the cache that leaves it whole."""
    applied = {"adaptive": caches.SKIPPING["adaptive"]}
    _measure(log, built, place, applied, lambda: built.pipe.transformer.compile(**_options(place, how)))


def _compile_blocks(built: Built, place: Place, how: Mapping[str, Any]) -> None:
    built.pipe.transformer.compile_repeated_blocks(fullgraph=True, **_options(place, how))


def _options(place: Place, how: Mapping[str, Any]) -> dict[str, Any]:
    """On a CPU the code generator is left out: there it takes minutes, and what it makes is not what is measured."""
    return {"backend": "eager"} if place.device.type == "cpu" else dict(how)


def _measure(
    log: PartLog, built: Built, place: Place, applied: Mapping[str, caches.Apply], compile_it: Callable[[], None]
) -> None:
    """Plain and with each cache, first eager for its output, then compiled."""
    every: dict[str, caches.Apply | None] = {"unpatched": None, **applied}
    log.row("unpatched, eager", lambda: unpatched(built, place, None))
    eager = {name: _output(built, place, apply) for name, apply in every.items()}
    torch._dynamo.reset()
    try:
        compile_it()
        for name, apply in every.items():
            log.row(name, partial(_compiled, built, place, apply, eager[name]))
    finally:
        torch._dynamo.reset()


def _output(built: Built, place: Place, apply: caches.Apply | None) -> Tensor:
    with apply(built.pipe) if apply else nullcontext():
        return run(built, place, caches.STEPS, DeviceTimes(place.device)).output


def _compiled(built: Built, place: Place, apply: caches.Apply | None, eager: Tensor) -> Row:
    """A row, with the seconds of the first run, which compiles, and the graphs that it and the later runs made."""
    before, begin = _graphs(), time.perf_counter()
    output = _output(built, place, apply)
    seconds, first = time.perf_counter() - begin, _graphs()
    row = skipping(built, place, apply) if apply else unpatched(built, place, None)
    made = {"first_run_s": seconds, "graphs": first - before, "graphs_later": _graphs() - first}
    return row | made | {"relative_difference": relative_difference(output, eager)}


def _graphs() -> int:
    """Graphs that were compiled in this process so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
