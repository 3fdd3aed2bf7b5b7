"""Measures what the profiler itself costs, and whether the parts that it reports add up to the wall time.

    python -m benchmarks.profiling [--blocks 5] [--pairs 15]

On a Wan transformer of real width with a few blocks: runs with `profile(pipe, trace=False)` and runs without take
turns, the order changing from pair to pair; medians of the paired ratios of a denoising step, with their quartiles, in
wall time and in the thread's CPU time. Since such a ratio is near 1 and no machine is quiet, also the milliseconds of
the profiler itself, on the same tensors with blocks that do next to nothing, and what a step costs that is traced. The
sums are medians over some profiled runs. Writes `benchmarks/results/profiling.json`.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from sgl_diffusion_accel import environment, profile

from .overhead import (
    HIDDEN,
    IDLE_STEPS,
    TOKENS,
    Row,
    difference_ms,
    make_idle_pipeline,
    make_pipeline,
    ratio,
    spread,
    take_turns,
)

RESULT = Path(__file__).parent / "results" / "profiling.json"
RUNS = 5
STEPS = 6


def main() -> None:
    """Runs the measurement from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    result = {
        "model": f"WanTransformer3DModel, hidden {HIDDEN}, {given.blocks} blocks, {TOKENS} tokens, float32",
        "environment": environment.describe(),
        "pairs": given.pairs,
        "rows": measure(given.blocks, given.pairs),
        "sums": sums(given.blocks),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in result["rows"].items():
        print(f"{name}: {row['cpu']['median']:.4f} in CPU time, {row['wall']['median']:.4f} in wall time")
    print(f"parts / wall time: {result['sums']}")


def measure(blocks: int, pairs: int) -> dict[str, Row]:
    """All measurements of cost, by what they are."""
    whole, idle = make_pipeline(blocks), make_idle_pipeline(blocks)
    times = take_turns((whole, nullcontext), (whole, timings), pairs)
    rows = {"unprofiled step, ms": spread(times, lambda base, _: base * 1000)}
    rows["step, profiled with plain timings / unprofiled"] = spread(times, ratio)
    times = take_turns((idle, nullcontext), (idle, timings), 2 * pairs, steps=IDLE_STEPS)
    rows["the profiler's own part of a step, plain timings, ms"] = spread(times, difference_ms)
    times = take_turns((whole, nullcontext), (whole, traced), max(2, pairs // 3))
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
        "stages": [],
        "stages and other": [],
        "steps": [],
        "transformer and scheduler": [],
    }
    side = 2 * int(TOKENS**0.5)
    generator = torch.Generator().manual_seed(0)
    given = {
        "prompt_embeds": torch.randn(1, 16, 512, generator=generator),
        "latents": torch.randn(1, 16, 1, side, side, generator=generator),
        "num_inference_steps": STEPS,
        "height": side * 8,
        "width": side * 8,
        "num_frames": 1,
        "guidance_scale": 1.0,
        "output_type": "latent",
    }
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
