"""Measures the host's time for a skipped DBCache step with one block computed, beside cache-dit's.

    python -m benchmarks.host_cost [--pairs 12] [--layouts flux qwen]

Real diffusers pipelines with as many blocks as FLUX.1 and Qwen-Image have, on tiny tensors and with blocks that do next
to nothing: what is left is what the host does. Three pipelines a layout, built alike and run in turn, the order
changing from round to round: one under this library's DBCache, one under cache-dit's at the same settings, and one that
has the first block alone, which is what neither can skip. From the differences to the last one follow the microseconds
for each block that is passed over. Writes `benchmarks/results/host_cost.json`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion_accel import apply_cache_dit, environment

from .gpu.models import MODELS, Built, Place, block_lists, build
from .peers import cache_dit
from .settings import Setting
from .turns import StepClock, be_quiet, parser, quartiles, take_turns, write

STEPS = 40
ORDERS = (0, 1)
_OUT_OF_REACH = 1e9

LAYOUTS: dict[str, tuple[str, dict[str, int], dict[str, int]]] = {
    "flux": (
        "FluxPipeline, 19 + 38 blocks",
        {"num_layers": 19, "num_single_layers": 38},
        {"num_layers": 1, "num_single_layers": 0},
    ),
    "qwen": ("QwenImagePipeline, 60 blocks, true CFG", {"num_layers": 60}, {"num_layers": 1}),
}
"""By the name of the model: a title, the depth, and the depth of what cannot be skipped."""


@dataclass
class SkippedClock(StepClock):
    """Also counts the blocks that ran in each step."""

    count: Callable[[], int] = lambda: 0
    counts: list[int] = field(default_factory=list)

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Takes the time and the count at the end of a step."""
        self.counts.append(self.count())
        return super().__call__(pipe, step, timestep, tensors)

    def skipped(self) -> tuple[float, float, int]:
        """Median wall and CPU seconds of the skipped steps, those with the fewest blocks, and their blocks."""
        ran = [0, *(after - before for before, after in pairwise(self.counts))]
        fewest = min(ran[1:])
        return (*self.step_seconds(lambda step: ran[step] == fewest), fewest)


@dataclass
class Side:
    """A pipeline whose blocks do next to nothing, and the count of their calls."""

    built: Built
    calls: int = 0

    def __post_init__(self) -> None:
        for blocks in block_lists(self.built.pipe.transformer):
            for block in blocks:
                self._make_idle(block)

    def _make_idle(self, block: nn.Module) -> None:
        def forward(hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            del args, kwargs
            self.calls += 1
            return encoder_hidden_states * 1.01, hidden_states * 1.01

        # Caches read the names of the parameters from the signature.
        forward.__signature__ = inspect.signature(block.forward)  # type: ignore[attr-defined]
        block.forward = forward

    def run(self) -> tuple[float, float, int]:
        """Wall and CPU seconds of a skipped step, and the blocks that run in it."""
        clock = SkippedClock(count=lambda: self.calls)
        generator = torch.Generator().manual_seed(0)
        self.built.pipe(**self.built.call, num_inference_steps=STEPS, generator=generator, callback_on_step_end=clock)
        return clock.skipped()


def main() -> None:
    """Runs the measurement from the command line."""
    command = parser(__doc__, pairs=12)
    command.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    given = command.parse_args()
    be_quiet()
    rows = [measure(name, order, given.pairs) for name in given.layouts for order in ORDERS]
    result = {
        "settings": "F1 B0, warm-up 3, at most 3 skipped in a row, threshold out of reach",
        "environment": environment.describe(torch.device("cpu")),
        "pairs": given.pairs,
        "rows": rows,
    }
    write("host_cost", result)
    for row in rows:
        print(row["layout"], row["predictor"])
        for name, side in row["sides"].items():
            print(f"  {name}: {side['cpu_ms']['median']:.3f} ms a step, {side['us_a_block']['median']:.1f} µs a block")


def measure(name: str, order: int, pairs: int) -> dict[str, Any]:
    """One layout with one predictor.

    Args:
        name: Of the layout.
        order: Of the Taylor prediction; 0 reuses.
        pairs: Rounds.
    """
    title, depth, shallow = LAYOUTS[name]
    place = Place(torch.device("cpu"), torch.float32, tiny=True)
    setting = Setting(fn=1, warmup=3, threshold=_OUT_OF_REACH, continuous=3, order=order)
    bare = Side(build(MODELS[name], place, **shallow))
    with ExitStack() as applied:
        sides = {"sgl-diffusion-accel": Side(build(MODELS[name], place, **depth))}
        applied.enter_context(apply_cache_dit(sides["sgl-diffusion-accel"].built.pipe, **setting.knobs))
        if cache_dit.installed():
            sides["cache-dit"] = Side(build(MODELS[name], place, **depth))
            applied.enter_context(cache_dit.apply(sides["cache-dit"].built.pipe, setting, STEPS))
        taken = take_turns({name: side.run for name, side in {"bare": bare, **sides}.items()}, pairs)
    calls = taken["bare"][0][2]  # each call of the transformer runs the one block that is left
    passed = (sum(depth.values()) - 1) * calls
    return {
        "layout": title,
        "predictor": f"TaylorSeer {order}" if order else "reuse",
        "calls_a_step": calls,
        "blocks_passed": passed,
        "bare": _times(taken["bare"], taken["bare"], passed),
        "sides": {side: _times(taken[side], taken["bare"], passed) for side in sides},
    }


def _times(taken: list[tuple[float, float, int]], bare: list[tuple[float, float, int]], passed: int) -> dict[str, Any]:
    """Milliseconds of a step, and the microseconds that it takes more for each block passed over, paired by round."""
    more = [(one[1] - other[1]) * 1e6 / passed for one, other in zip(taken, bare, strict=True)]
    return {
        "wall_ms": quartiles([wall * 1e3 for wall, _, _ in taken]),
        "cpu_ms": quartiles([cpu * 1e3 for _, cpu, _ in taken]),
        "us_a_block": quartiles(more),
        "blocks_run": taken[0][2],
    }


if __name__ == "__main__":
    main()
