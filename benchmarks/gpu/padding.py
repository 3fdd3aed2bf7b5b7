"""Calls with their padding and, under `apply_lossless`, without: a few blocks of models whose prompts are padded."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.call_parts import AttentionCalls
from benchmarks.turns import take_turns
from sgl_diffusion_accel import LosslessPatch, apply_lossless
from sgl_diffusion_accel.clocks import clock_for, synchronise

from .models import Place
from .padded import PADDED, BuiltPadded, Padded, build_padded, text_tokens
from .rows import Row
from .store import PartLog
from .timing import relative_difference

ROUNDS = 5
_GIB = 2**30


def padding(log: PartLog, place: Place) -> None:
    """One row for each model."""
    log.about(title="padding cut by `apply_lossless`", dtype=str(place.dtype).removeprefix("torch."))
    for model in PADDED.values():
        log.row(_title(model, place), partial(measured, model, place))


def _title(model: Padded, place: Place) -> str:
    depth = " + ".join(str(each.measured) for each in model.lists if each.sees_picture)
    return f"{model.title}, {'tiny' if place.tiny else model.size}, {depth} blocks"


def measured(model: Padded, place: Place) -> Row:
    """One model: times, memory, tokens, attention calls with a mask, and the difference of outputs."""
    built = build_padded(model, place)
    try:
        return _row(built, place)
    finally:
        built.transformer.to("meta")
        built.given.clear()
        gc.collect()


def _row(built: BuiltPadded, place: Place) -> Row:
    whole, whole_peak, masked, _ = _seen(built, nullcontext, place)
    short, short_peak, still_masked, cut = _seen(built, apply_lossless, place)
    sides = {"whole": partial(_milliseconds, built, nullcontext), "cut": partial(_milliseconds, built, apply_lossless)}
    taken = take_turns({name: partial(side, place) for name, side in sides.items()}, ROUNDS)
    return {
        "padded_ms": statistics.median(taken["whole"]),
        "cut_ms": statistics.median(taken["cut"]),
        "times_as_fast": statistics.median(one / two for one, two in zip(taken["whole"], taken["cut"], strict=True)),
        "padded_peak_gib": whole_peak,
        "peak_gib": short_peak,
        "picture_tokens": built.pixels,
        "text_tokens": cut,
        "masked_calls": [masked, still_masked],
        "relative_difference": relative_difference(short, whole),
        "finite": bool(torch.isfinite(short.float()).all()),
    }


def _seen(
    built: BuiltPadded, apply: Callable[[Any], Any], place: Place
) -> tuple[Tensor, float | None, int, list[int] | None]:
    """Output, peak memory, attention calls with a mask in the blocks that see the picture, tokens of the text."""
    is_cuda = place.device.type == "cuda"
    picture = [each.path for each in built.model.lists if each.sees_picture]
    with apply(built.transformer) as patch:
        with AttentionCalls(built.transformer, picture) as attention:
            output = built.run()
        synchronise(place.device)
        if is_cuda:
            torch.cuda.reset_peak_memory_stats(place.device)
        built.run()
        synchronise(place.device)
        peak = torch.cuda.max_memory_allocated(place.device) / _GIB if is_cuda else None
        cut = text_tokens(built, patch.stats.calls["transformer"]) if isinstance(patch, LosslessPatch) else None
    return output, peak, attention.masked, cut


def _milliseconds(built: BuiltPadded, apply: Callable[[Any], Any], place: Place) -> float:
    """One call as the device sees it; the one before it reads the masks."""
    clock = clock_for(place.device)
    with apply(built.transformer):
        built.run()
        synchronise(place.device)
        begin = clock.now()
        built.run()
        end = clock.now()
        clock.settle()
        return clock.milliseconds(begin, end)
