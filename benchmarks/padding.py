"""Measures calls with their padding and, under `apply_lossless`, without, at true widths and text lengths on a CPU.

    python -m benchmarks.padding [--pairs 3] [--only hunyuanvideo15 krea2] [--host-only]

Blocks of HunyuanVideo 1.5, HunyuanVideo, HunyuanImage 2.1, Ideogram 4 and Krea 2, one of each kind, with random weights
and a small picture, so that a call takes seconds. Both sides run in turn on one thread. Since with one block what lies
outside of the blocks weighs more than it does, the times of blocks are taken apart, and a call as deep as the released
model is computed from them. Then what the patch itself costs the host (`benchmarks/lossless_host.py`). Writes
`benchmarks/results/padding.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion_accel import LosslessPatch, apply_lossless, environment

from . import lossless_host
from .call_parts import AttentionCalls, block_seconds, tensor_peak
from .gpu.models import Place
from .gpu.padded import PADDED, BuiltPadded, Grid, Padded, build_padded, text_tokens
from .gpu.timing import relative_difference
from .turns import RESULTS, be_quiet, parser, quartiles, take_turns, write

WITH, WITHOUT = "with padding", "without"
SIDES: dict[str, Callable[[Any], Any]] = {WITH: nullcontext, WITHOUT: apply_lossless}


@dataclass(frozen=True)
class Call:
    """Seconds of one call, by the clock and of the thread, and the thread's in a call as deep as the released model."""

    wall: float
    cpu: float
    released: float


@dataclass(frozen=True)
class Seen:
    """One call's output, and what is the same in every call.

    Attributes:
        output: What is read of it.
        peak: Most bytes of tensors at one time, beyond weights and inputs.
        attention: Attention calls in the blocks that see the picture, and those of them with a mask.
        cut: Text tokens before and after, if any were cut.
    """

    output: Tensor
    peak: int
    attention: tuple[int, int]
    cut: list[int] | None


def main() -> None:
    """Runs the measurement from the command line."""
    command = parser(__doc__, pairs=3)
    command.add_argument("--only", nargs="+", default=list(PADDED), choices=list(PADDED))
    command.add_argument("--host-only", action="store_true", help="measure the host's time alone, and keep the rows")
    given = command.parse_args()
    be_quiet()
    path, place = RESULTS / "padding.json", Place(torch.device("cpu"), torch.float32)
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}, "host": {}}
    result |= {"environment": environment.describe(place.device), "pairs": given.pairs, "dtype": "float32"}
    for name in () if given.host_only else given.only:
        row = measure(PADDED[name], place, given.pairs, PADDED[name].small)
        rows = {**result["rows"], name: row}
        result["rows"] = {known: rows[known] for known in PADDED if known in rows}
        write("padding", result)  # a measurement that is stopped keeps what it has
        print(f"{row['title']}: {row['times']['cpu']['median']:.2f} times as fast, {row['relative_difference']:.1e}")
    result["host"] = lossless_host.measure_all(given.pairs * 5)
    write("padding", result)
    for name, found in result["host"].items():
        print(f"{name}: {found['us']['median']:.1f} µs a call")


def measure(model: Padded, place: Place, pairs: int, grid: Grid | None = None) -> dict[str, Any]:
    """One model with its padding and without.

    Args:
        model: Which one.
        place: Where.
        pairs: Rounds of both sides.
        grid: Of the picture's latents; None for the true one.
    """
    built = build_padded(model, place, grid, lambda _: 1)
    seen = {side: _seen(built, apply) for side, apply in SIDES.items()}  # these calls are the warm-up, too
    calls = take_turns({side: partial(_timed, built, apply) for side, apply in SIDES.items()}, pairs, warm_up=0)
    return {
        "title": model.title,
        "transformer": model.transformer,
        "blocks": {each.path: [built.depths[each.path], each.released] for each in model.lists},
        "picture_tokens": built.pixels,
        "text_tokens": seen[WITHOUT].cut,
        **{f"{clock}_s": {side: _spread(calls[side], clock) for side in SIDES} for clock in Call.__annotations__},
        "times": {clock: _ratios(calls, clock) for clock in Call.__annotations__},
        "peak_mib": {side: seen[side].peak / 2**20 for side in SIDES},
        "attention_calls": seen[WITH].attention[0],
        "masked_attention_calls": {side: seen[side].attention[1] for side in SIDES},
        "relative_difference": relative_difference(seen[WITHOUT].output, seen[WITH].output),
    }


def _seen(built: BuiltPadded, apply: Callable[[Any], Any]) -> Seen:
    picture = [each.path for each in built.model.lists if each.sees_picture]
    with apply(built.transformer) as patch:
        with AttentionCalls(built.transformer, picture) as attention:
            output, peak = tensor_peak(built.run)
        is_cut = isinstance(patch, LosslessPatch)
        cut = text_tokens(built, patch.stats.calls["transformer"]) if is_cut else None
    return Seen(output, peak, (attention.all, attention.masked), cut)


def _timed(built: BuiltPadded, apply: Callable[[Any], Any]) -> Call:
    paths = list(built.depths)
    with apply(built.transformer), block_seconds(built.transformer, paths) as spent:
        wall, cpu = time.perf_counter(), time.thread_time()
        built.run()
        wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
    missing = sum(spent[each.path] * (each.released / built.depths[each.path] - 1) for each in built.model.lists)
    return Call(wall, cpu, cpu + missing)


def _spread(calls: Sequence[Call], clock: str) -> dict[str, float]:
    return quartiles(getattr(call, clock) for call in calls)


def _ratios(calls: Mapping[str, Sequence[Call]], clock: str) -> dict[str, float]:
    both = zip(calls[WITH], calls[WITHOUT], strict=True)
    return quartiles(getattr(one, clock) / getattr(other, clock) for one, other in both)


if __name__ == "__main__":
    main()
