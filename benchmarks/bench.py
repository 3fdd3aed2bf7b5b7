"""Compares the main settings on a miniature, a small trained model of this repository.

    python -m benchmarks.bench --model wan --captions 4 --plot out/

It says in a minute or two whether everything works on this machine, and what the settings are worth there.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from miniatures import NAMES, call_kwargs, captions, load_miniature, to_frames
from sgl_diffusion_accel import ComparisonReport, apply_adaptive_cache, apply_cache_dit, compare

from .runs import CAPTION_SEED, NOISE_SEED

Variant = Callable[[Any], Any]

_CAPTIONS = 6  # of the committed benchmark, whose figures can be found again so
_LATE: Mapping[str, Any] = {"fn_compute_blocks": 0, "steps_policy": "static", "taylorseer_order": 2}
VARIANTS: Mapping[str, Variant] = {
    "adaptive": apply_adaptive_cache,
    "SGLang's defaults": apply_cache_dit,
    "the same, second order": partial(apply_cache_dit, taylorseer_order=2),
    "late-medium, static": partial(apply_cache_dit, steps_mask="late-medium", **_LATE),
    "late-fast, static": partial(apply_cache_dit, steps_mask="late-fast", **_LATE),
    "late-ultra, static": partial(apply_cache_dit, steps_mask="late-ultra", **_LATE),
}
"""What is compared."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison from the command line.

    Args:
        arguments: Of the command line; None for the process's.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=NAMES, default="wan", help="which miniature (wan)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (50)")
    parser.add_argument("--captions", type=int, default=2, help="captions, each with its own noise (2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write pictures: cost and quality, steps, outputs")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(1)  # the miniatures are fastest so
    report = compare_miniature(given.model, given.steps, given.captions)
    if given.json:
        report.save(given.json)
    if given.plot:
        for kind, draw in {"pareto": report.plot, "steps": report.plot_steps, "pictures": report.plot_pictures}.items():
            draw(given.plot / f"{given.model}_{kind}.png")
    print(report)


def compare_miniature(
    model: str, steps: int, count: int, variants: Mapping[str, Variant] = VARIANTS, **more: Any
) -> ComparisonReport:
    """Compares variants on a miniature, on the captions and the noise of the committed benchmark.

    Args:
        model: Name of the miniature.
        steps: Denoising steps.
        count: How many captions.
        variants: What is compared.
        **more: Arguments of `compare`.
    """
    words = captions(model, max(count, _CAPTIONS), CAPTION_SEED)[:count]
    calls = [call_kwargs(model, word, seed=NOISE_SEED + index, steps=steps) for index, word in enumerate(words)]
    report = compare(load_miniature(model), variants, calls, decode=partial(to_frames, model), **more)
    return dataclasses.replace(report, calls=tuple(words))


if __name__ == "__main__":
    main()
