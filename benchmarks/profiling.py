"""Measures what the profiler itself costs, and whether the parts that it reports add up to the wall time.

    python -m benchmarks.profiling [--blocks 5] [--pairs 15]

On a Wan transformer of real width with a few blocks: runs with `profile(pipe, trace=False)` and runs without take
turns, the order changing from pair to pair; medians of the paired ratios of a denoising step, with their quartiles, in
wall time and in the thread's CPU time. Since such a ratio is near 1 and no machine is quiet, also the milliseconds of
the profiler itself, on the same tensors with blocks that do next to nothing, and what a step costs that is traced. The
sums are medians over some profiled runs. Writes `benchmarks/results/profiling.json`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from sgl_diffusion_accel import profile

from .overhead import (
    IDLE_STEPS,
    Row,
    difference_ms,
    make_idle_pipeline,
    make_pipeline,
    paired,
    ratio,
    spread,
    wan_call,
    write_rows,
)
from .turns import be_quiet, parser

RUNS = 5
STEPS = 6


def main() -> None:
    """Runs the measurement from the command line."""
    command = parser(__doc__, pairs=15)
    command.add_argument("--blocks", type=int, default=5)
    given = command.parse_args()
    be_quiet()
    rows, parts = measure(given.blocks, given.pairs), sums(given.blocks)
    write_rows("profiling", given.blocks, given.pairs, rows, sums=parts)
    print(f"parts / wall time: {parts}")


def measure(blocks: int, pairs: int) -> dict[str, Row]:
    """All measurements of cost, by what they are."""
    whole, idle = make_pipeline(blocks), make_idle_pipeline(blocks)
    times = paired((whole, nullcontext), (whole, timings), pairs)
    rows = {"unprofiled step, ms": spread(times, lambda base, _: base * 1000)}
    rows["step, profiled with plain timings / unprofiled"] = spread(times, ratio)
    times = paired((idle, nullcontext), (idle, timings), 2 * pairs, steps=IDLE_STEPS)
    rows["the profiler's own part of a step, plain timings, ms"] = spread(times, difference_ms)
    times = paired((whole, nullcontext), (whole, traced), max(2, pairs // 3))
    rows["step, traced / unprofiled"] = spread(times, ratio)
    return rows


def timings(pipe: Any) -> Any:
    """Plain timings."""
    return profile(pipe, trace=False)


@contextmanager
def traced(pipe: Any) -> Iterator[None]:
    """A trace of all steps, thrown away."""
    with tempfile.TemporaryDirectory() as folder, profile(pipe, steps=-1, output_dir=folder):
        yield


def sums(blocks: int) -> dict[str, float]:
    """Median shares of the wall time that the caller sees, over some runs."""
    pipe = make_pipeline(blocks)
    shares: dict[str, list[float]] = {
        name: [] for name in ("stages", "stages and other", "steps", "transformer and scheduler")
    }
    given = wan_call(STEPS)
    pipe(**given)
    for _ in range(RUNS):
        with profile(pipe, trace=False) as prof:
            begin = time.perf_counter()
            pipe(**given)
            wall = (time.perf_counter() - begin) * 1000
        call = prof.report.last
        stages = sum(stage.duration_ms for stage in call.stages)
        parts = sum(step.transformer_ms + step.scheduler_ms for step in call.steps)
        found = (stages, stages + call.other_ms, sum(call.denoise_steps_ms), parts)
        for values, part in zip(shares.values(), found, strict=True):
            values.append(part / wall)
    return {f"{name} / wall time": statistics.median(values) for name, values in shares.items()}


if __name__ == "__main__":
    main()
