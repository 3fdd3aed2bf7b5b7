"""Two small trained models, without and with a cache: a table, and pictures side by side in `out/demo.png`.

    make demo      or      python -m examples.demo [--steps 40]

Each setting is followed by what costs the same without any library: an unpatched run with fewer steps.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from miniatures import call_kwargs, captions, load_miniature, to_frames
from sgl_diffusion_accel import (
    CachePatch,
    CachePlan,
    apply_adaptive_cache,
    apply_cache_dit,
    apply_cache_plan,
    calibrate,
)

from .demo_picture import draw
from .demo_results import Result, Run
from .demo_table import table

MODELS = {"wan": "Wan: clips, classifier-free guidance", "emoji": "Qwen-Image: emoji, true guidance"}
CAPTIONS = {"wan": 2, "emoji": 2}
SETTINGS: dict[str, Callable[[Any, CachePlan], CachePatch]] = {
    "adaptive": lambda pipe, _: apply_adaptive_cache(pipe),
    "calibrated plan, 3x": lambda pipe, plan: apply_cache_plan(pipe, plan, speedup=3.0),
    "calibrated plan, 5x": lambda pipe, plan: apply_cache_plan(pipe, plan, speedup=5.0),
    "DBCache, SGLang's defaults": lambda pipe, _: apply_cache_dit(pipe),
}
"""What is shown, by the name that the table and the picture have."""

PICTURE = Path("out/demo.png")
_CAPTION_SEED = 5
_CALIBRATION_CALLS, _CALIBRATION_SEED = 1, 11


def main() -> None:
    """Runs the demo from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(1)  # the miniatures are fastest so
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    begin = time.perf_counter()
    console = Console()
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        results = [show(model, CAPTIONS[model], given.steps, progress) for model in MODELS]
    for result in results:
        console.print(table(result, MODELS[result.model]))
    draw(results, MODELS, PICTURE)
    console.print(f"Pictures side by side: [bold]{PICTURE}[/bold]   ({time.perf_counter() - begin:.0f} s)")


def show(model: str, count: int, steps: int, progress: Progress) -> Result:
    """Runs one miniature on every caption: unpatched, with each setting, and with as many steps as that setting costs.

    Args:
        model: Name of the miniature.
        count: Captions, each with its own noise.
        steps: Denoising steps.
        progress: Bar to move.
    """
    pipe = load_miniature(model)
    plan = calibrate(pipe, calibration_calls(model, steps), teacache=False)
    result = Result(model, steps, captions(model, count, _CAPTION_SEED))
    task = progress.add_task(MODELS[model], total=count * (1 + 2 * len(SETTINGS)))
    run_once(pipe, model, result.captions[0], 0, 2)  # so that the first timing is like the others
    for seed, caption in enumerate(result.captions):
        result.unpatched.append(run_once(pipe, model, caption, seed, steps))
        progress.advance(task)
        for name, apply in SETTINGS.items():
            with apply(pipe, plan) as patch:
                cached = run_once(pipe, model, caption, seed, steps)
                stats = patch.stats.runs[-1]
            maps = {branch: record.computed for branch, record in stats.branches.items()}
            cached = Run(cached.frames, cached.seconds, stats.compute_share, maps)
            progress.advance(task)
            fewer = run_once(pipe, model, caption, seed, max(1, round(steps * stats.compute_share)), steps)
            progress.advance(task)
            result.cached.setdefault(name, []).append(cached)
            result.fewer.setdefault(name, []).append(fewer)
    return result


def calibration_calls(model: str, steps: int) -> list[dict[str, Any]]:
    """Calls to calibrate with: other captions and noise than those shown."""
    words = captions(model, _CALIBRATION_CALLS, _CALIBRATION_SEED)
    return [call_kwargs(model, word, seed=_CALIBRATION_SEED + index, steps=steps) for index, word in enumerate(words)]


def run_once(pipe: Any, model: str, caption: str, seed: int, steps: int, of: int | None = None) -> Run:
    """One run, timed.

    Args:
        pipe: The miniature's pipeline, patched or not.
        model: Name of the miniature.
        caption: What to show.
        seed: Of the noise.
        steps: Denoising steps.
        of: Steps of the run that it is compared with.
    """
    call = call_kwargs(model, caption, seed=seed, steps=steps)
    begin = time.perf_counter()
    with torch.no_grad():
        output = pipe(**call)
    seconds = time.perf_counter() - begin
    return Run(to_frames(model, output), seconds, steps / (of or steps), {"": (True,) * steps})


if __name__ == "__main__":
    main()
