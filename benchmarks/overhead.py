"""Measures what the library itself costs, on a Wan transformer of real width with a few blocks.

    python -m benchmarks.overhead [--blocks 5] [--pairs 12]

Two questions: what does a denoising step cost that is patched and computed, beside an unpatched one; and what does a
skipped step cost, beside a model that consists of nothing but the parts that cannot be skipped (embeddings, the first
block, final norm and projection)? Both sides run in turn, and the median of the paired ratios is reported with its
quartiles, in wall time and in the thread's CPU time. Writes `benchmarks/results/overhead.json`.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from sgl_diffusion_accel import apply_cache_dit

from . import environment

RESULT = Path(__file__).parent / "results" / "overhead.json"
HIDDEN = 1536
HEADS = 12
TOKENS = 256
WARM_UP = 3
STEPS = 8

Apply = Callable[[Any], AbstractContextManager[object]]


@dataclass
class Clock:
    """Wall and CPU time between consecutive denoising steps, in seconds; given to a pipeline as `callback_on_step_end`."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Takes the time at the end of a step."""
        del pipe, step, timestep
        self.wall.append(time.perf_counter())
        self.cpu.append(time.thread_time())
        return tensors

    def step_seconds(self) -> tuple[float, float]:
        """Median wall and CPU time of the steps after the warm-up."""
        times = (self.wall[WARM_UP:], self.cpu[WARM_UP:])
        wall, cpu = (statistics.median(b - a for a, b in zip(each, each[1:], strict=False)) for each in times)
        return wall, cpu


def main() -> None:
    """Runs the measurement from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=12)
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    whole, short = make_pipeline(given.blocks), make_pipeline(1)
    never = partial(apply_cache_dit, max_warmup_steps=WARM_UP, residual_diff_threshold=0.0)
    rows = {"computed step, patched / unpatched": ratios((whole, nullcontext), (whole, never), given.pairs)}
    for order in (0, 1, 2):
        skip = partial(skipping, order=order)
        rows[f"skipped step / its unskippable parts, order {order}"] = ratios(
            (short, nullcontext), (whole, skip), given.pairs
        )
    result = {
        "model": f"WanTransformer3DModel, hidden {HIDDEN}, {HEADS} heads, {given.blocks} blocks, {TOKENS} tokens, float32",
        "environment": environment.describe(),
        "pairs": given.pairs,
        "rows": rows,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in rows.items():
        print(f"{name}: {row['cpu']['median']:.4f} in CPU time, {row['wall']['median']:.4f} in wall time")


def make_pipeline(blocks: int) -> WanPipeline:
    """A Wan text-to-video pipeline of real width and few blocks, with random weights and neither VAE nor text encoder."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HIDDEN // HEADS, ffn_dim=8960, text_dim=512, num_layers=blocks
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(
        transformer=transformer.eval(), scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def skipping(pipe: Any, order: int) -> AbstractContextManager[object]:
    """Skips every step after the warm-up; the signal is taken and the decision made each time."""
    return apply_cache_dit(
        pipe,
        max_warmup_steps=WARM_UP,
        residual_diff_threshold=1e9,
        max_continuous_cached_steps=None,
        taylorseer_order=order,
    )


def step_seconds(pipe: WanPipeline, apply: Apply) -> tuple[float, float]:
    """Wall and CPU time of one denoising step."""
    side = 2 * int(TOKENS**0.5)
    generator = torch.Generator().manual_seed(0)
    clock = Clock()
    with apply(pipe), torch.no_grad():
        pipe(
            prompt_embeds=torch.randn(1, 16, 512, generator=generator),
            latents=torch.randn(1, 16, 1, side, side, generator=generator),
            num_inference_steps=STEPS,
            height=side * 8,
            width=side * 8,
            num_frames=1,
            guidance_scale=1.0,
            output_type="latent",
            callback_on_step_end=clock,
        )
    return clock.step_seconds()


def ratios(
    reference: tuple[WanPipeline, Apply], measured: tuple[WanPipeline, Apply], pairs: int
) -> dict[str, dict[str, float]]:
    """Paired ratios of the step times of two sides that run in turn, the order changing from pair to pair."""
    step_seconds(*reference)
    step_seconds(*measured)
    wall, cpu, reference_ms = [], [], []
    for pair in range(pairs):
        sides = (reference, measured) if pair % 2 else (measured, reference)
        first, second = (step_seconds(*side) for side in sides)
        base, other = (first, second) if pair % 2 else (second, first)
        wall.append(other[0] / base[0])
        cpu.append(other[1] / base[1])
        reference_ms.append(base[1] * 1000)
    return {"wall": spread(wall), "cpu": spread(cpu), "reference_cpu_ms": spread(reference_ms)}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


if __name__ == "__main__":
    main()
