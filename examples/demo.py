"""Two small trained models, without and with a cache: a table, and pictures side by side in `out/demo.png`.

    make demo      or      python -m examples.demo [--steps 50]

Each setting is followed by what costs the same without any library: an unpatched run with fewer steps.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from miniatures import call_kwargs, captions, load_miniature, to_frames
from sgl_diffusion_accel import apply_cache_dit

from .demo_picture import draw
from .demo_results import Result, Run
from .demo_table import table

MODELS = {"wan": "Wan: clips, classifier-free guidance", "qwen": "Qwen-Image: pictures, true guidance"}
_LATE = {"steps_policy": "static", "fn_compute_blocks": 0, "taylorseer_order": 2}
CAPTIONS = {"wan": 4, "qwen": 6}
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "second-order prediction": {"taylorseer_order": 2},
    "step mask late-fast": _LATE | {"steps_mask": "late-fast"},
    "step mask late-ultra": _LATE | {"steps_mask": "late-ultra"},
}
"""Arguments of `apply_cache_dit`, by the name that the table and the picture show."""

PICTURE = Path("out/demo.png")
_CAPTION_SEED = 5


def main() -> None:
    """Runs the demo from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
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
    PICTURE.parent.mkdir(exist_ok=True)
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
    result = Result(model, steps, captions(model, count, _CAPTION_SEED))
    task = progress.add_task(MODELS[model], total=count * (1 + 2 * len(SETTINGS)))
    run_once(pipe, model, result.captions[0], 0, 2)  # so that the first timing is like the others
    for seed, caption in enumerate(result.captions):
        result.unpatched.append(run_once(pipe, model, caption, seed, steps))
        progress.advance(task)
        for name, knobs in SETTINGS.items():
            with apply_cache_dit(pipe, **knobs) as patch:
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
