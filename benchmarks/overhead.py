"""Measures what the library itself costs, on a Wan transformer of real width with a few blocks.

    python -m benchmarks.overhead [--blocks 5] [--pairs 12]

Three questions. What does a denoising step cost that is patched and computed, beside an unpatched one? What does a
skipped step cost, beside a model that consists of nothing but the parts that cannot be skipped (embeddings, the first
block, final norm and projection)? And, since these ratios are near 1 and no machine is quiet: how many milliseconds
does the library itself take, found on the same tensors with blocks that do next to nothing? Both sides run in turn, and
the medians of the paired ratios or differences are reported with their quartiles, in wall time and in the thread's CPU
time. Writes `benchmarks/results/overhead.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from sgl_diffusion_accel import TeaCacheCoefficients, apply_block_cache, apply_cache_dit, environment
from sgl_diffusion_accel.caching.parts.signals import ModulatedInput
from sgl_diffusion_accel.caching.teacache.accumulating_policy import AccumulatingPolicy
from sgl_diffusion_accel.caching.teacache.skip_window import Window
from sgl_diffusion_accel.caching.teacache.teacache_models import family_of

from .turns import WARM_UP, StepClock, Times, be_quiet, parser, quartiles, take_turns, write

HIDDEN = 1536
HEADS = 12
TOKENS = 256
STEPS = 8
IDLE_STEPS = 60
ORDERS = (0, 1, 2)

Apply = Callable[[Any], AbstractContextManager[object]]
Side = tuple[Any, Apply]
Pair = tuple[Times, Times]
Row = dict[str, dict[str, float]]


def main() -> None:
    """Runs the measurement from the command line."""
    command = parser(__doc__, pairs=12)
    command.add_argument("--blocks", type=int, default=5)
    given = command.parse_args()
    be_quiet()
    write_rows("overhead", given.blocks, given.pairs, measure(given.blocks, given.pairs))


def write_rows(name: str, blocks: int, pairs: int, rows: dict[str, Row], **more: Any) -> None:
    """Writes and shows what was measured on a Wan transformer of some blocks."""
    about = f"WanTransformer3DModel, hidden {HIDDEN}, {blocks} blocks, {TOKENS} tokens, float32"
    write(name, {"model": about, "environment": environment.describe(), "pairs": pairs, "rows": rows, **more})
    for title, row in rows.items():
        print(f"{title}: {row['cpu']['median']:.4f} in CPU time, {row['wall']['median']:.4f} in wall time")


def measure(blocks: int, pairs: int) -> dict[str, Row]:
    """All measurements, by what they are."""
    whole, short = make_pipeline(blocks), make_pipeline(1)
    # All warm-up: signal and residuals are kept at every step, as before a skip. (What comparing signals
    # costs is in the skipped steps.)
    never = partial(apply_cache_dit, max_warmup_steps=1_000_000)
    times = paired((whole, nullcontext), (whole, never), pairs)
    rows = {"unpatched step, ms": spread(times, lambda base, _: base * 1000)}
    rows["computed step, patched / unpatched"] = spread(times, ratio)
    for order in ORDERS:
        times = paired((short, nullcontext), (whole, partial(skipping, order=order)), pairs)
        rows[f"skipped step / its unskippable parts, order {order}"] = spread(times, ratio)
    rows["unskippable parts of a step, ms"] = spread(times, lambda base, _: base * 1000)
    return rows | measure_own_part(blocks, 2 * pairs, never)


def measure_own_part(blocks: int, pairs: int, never: Apply) -> dict[str, Row]:
    """Milliseconds of the library itself in a computed and in a skipped step."""
    whole, short = make_idle_pipeline(blocks), make_idle_pipeline(1)
    times = paired((whole, nullcontext), (whole, never), pairs, steps=IDLE_STEPS)
    rows = {"the library's own part of a computed step, ms": spread(times, difference_ms)}
    for order in ORDERS:
        sides = (short, nullcontext), (whole, partial(skipping, order=order))
        times = paired(*sides, pairs, steps=IDLE_STEPS)
        rows[f"the library's own part of a skipped step, order {order}, ms"] = spread(times, difference_ms)
    bare = make_idle_pipeline(0)
    for signal in ("time embedding", "modulated input"):
        always, seldom = (partial(teacache, signal=signal, threshold=threshold) for threshold in (0.5, 1e9))
        times = paired((whole, nullcontext), (whole, always), pairs, steps=IDLE_STEPS)
        rows[f"TeaCache's own part of a computed step, {signal}, ms"] = spread(times, difference_ms)
        times = paired((bare, nullcontext), (whole, seldom), pairs, steps=IDLE_STEPS)
        rows[f"TeaCache's own part of a skipped step, {signal}, ms"] = spread(times, difference_ms)
    return rows


def teacache(pipe: Any, signal: str, threshold: float) -> AbstractContextManager[object]:
    """TeaCache that takes its signal at each step and charges 1 for it."""
    policy = AccumulatingPolicy(threshold, TeaCacheCoefficients((0, 0, 0, 0, 1)), Window())
    chosen = ModulatedInput() if signal == "modulated input" else family_of(pipe.transformer).signal
    return apply_block_cache(pipe.transformer, policy, signal=chosen)


def make_pipeline(blocks: int) -> WanPipeline:
    """A Wan pipeline of real width and few blocks, with random weights and neither VAE nor text encoder."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HIDDEN // HEADS, ffn_dim=8960, text_dim=512, num_layers=blocks
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(transformer=transformer.eval(), scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_idle_pipeline(blocks: int) -> WanPipeline:
    """The same, but its blocks do next to nothing, so that what surrounds them can be measured."""
    pipe = make_pipeline(blocks)
    for block in pipe.transformer.blocks:
        block.forward = _next_to_nothing
    return pipe


def _next_to_nothing(hidden_states: torch.Tensor, *args: Any) -> torch.Tensor:
    del args
    return hidden_states * 1.01


def skipping(pipe: Any, order: int) -> AbstractContextManager[object]:
    """Skips every step after the warm-up; the signal is taken and the decision made each time."""
    return apply_cache_dit(
        pipe,
        max_warmup_steps=WARM_UP,
        residual_diff_threshold=1e9,
        max_continuous_cached_steps=None,
        taylorseer_order=order,
    )


def wan_call(steps: int) -> dict[str, Any]:
    """What these pipelines are called with."""
    side = 2 * int(TOKENS**0.5)
    generator = torch.Generator().manual_seed(0)
    return {
        "prompt_embeds": torch.randn(1, 16, 512, generator=generator),
        "latents": torch.randn(1, 16, 1, side, side, generator=generator),
        "num_inference_steps": steps,
        "height": side * 8,
        "width": side * 8,
        "num_frames": 1,
        "guidance_scale": 1.0,
        "output_type": "latent",
    }


def step_seconds(pipe: WanPipeline, apply: Apply, steps: int) -> Times:
    """Wall and CPU time of one denoising step."""
    clock = StepClock()
    with apply(pipe), torch.no_grad():
        pipe(**wan_call(steps), callback_on_step_end=clock)
    return clock.step_seconds()


def paired(reference: Side, measured: Side, pairs: int, steps: int = STEPS) -> list[Pair]:
    """Step times of two sides that run in turn: (reference, measured) each."""
    sides = {name: partial(step_seconds, *side, steps) for name, side in (("base", reference), ("other", measured))}
    taken = take_turns(sides, pairs)
    return list(zip(taken["base"], taken["other"], strict=True))


def ratio(base: float, other: float) -> float:
    """How much longer the measured side takes."""
    return other / base


def difference_ms(base: float, other: float) -> float:
    """How many milliseconds longer the measured side takes."""
    return (other - base) * 1000


def spread(times: list[Pair], compare: Callable[[float, float], float]) -> Row:
    """Median and quartiles of what `compare` makes of each pair, in wall and in CPU time."""
    return {
        clock: quartiles(compare(base[index], other[index]) for base, other in times)
        for index, clock in enumerate(("wall", "cpu"))
    }


if __name__ == "__main__":
    main()
