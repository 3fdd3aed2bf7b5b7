"""The command `bench`: compares the main settings on a miniature, a small trained model of this repository.

    python -m sgl_diffusion_accel bench --model wan --captions 4 --plot out/

It says in a minute or two whether everything works on this machine, and what the settings are worth there.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sgl_diffusion_accel.caching.adaptive import apply_adaptive_cache
from sgl_diffusion_accel.caching.cache_dit.apply_cache_dit import apply_cache_dit
from sgl_diffusion_accel.comparing.compare import compare
from sgl_diffusion_accel.comparing.contenders import Variant
from sgl_diffusion_accel.comparing.report import ComparisonReport
from sgl_diffusion_accel.errors import ConfigError

MODELS = ("wan", "qwen", "flux")
_CAPTION_SEED, _NOISE_SEED, _CAPTIONS = 77, 1000, 6  # those of benchmarks/, whose figures can be found again so
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

_MISSING = (
    "bench runs on the miniatures, which are in a clone of the repository and not in the installed package. In the "
    "root of a clone, type: python -m sgl_diffusion_accel bench"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to a parser."""
    parser.add_argument("--model", choices=MODELS, default="wan", help="which miniature (wan)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (50)")
    parser.add_argument("--captions", type=int, default=2, help="captions, each with its own noise (2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write pictures: cost and quality, steps, outputs")


def run(args: argparse.Namespace) -> str:
    """Runs the command.

    Args:
        args: What was typed.

    Returns:
        The report.

    Raises:
        ConfigError: The miniatures are not there.
    """
    try:
        miniatures = importlib.import_module("miniatures")
    except ModuleNotFoundError as error:
        if error.name != "miniatures":
            raise
        raise ConfigError(_MISSING) from None
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the miniatures are fastest so
    try:
        report = compare_miniature(miniatures, args.model, args.steps, args.captions)
    finally:
        torch.set_num_threads(threads)
    if args.json:
        report.save(args.json)
    if args.plot:
        for kind, draw in {"pareto": report.plot, "steps": report.plot_steps, "pictures": report.plot_pictures}.items():
            draw(args.plot / f"{args.model}_{kind}.png")
    return str(report)


def compare_miniature(
    miniatures: Any, model: str, steps: int, captions: int, variants: Mapping[str, Variant] = VARIANTS, **more: Any
) -> ComparisonReport:
    """Compares variants on a miniature, on the captions and the noise of the committed benchmark.

    Args:
        miniatures: The package of that name.
        model: Name of the miniature.
        steps: Denoising steps.
        captions: How many captions.
        variants: What is compared.
        **more: Arguments of `compare`.
    """
    words = miniatures.captions(model, max(captions, _CAPTIONS), _CAPTION_SEED)[:captions]
    calls = [
        miniatures.call_kwargs(model, caption, seed=_NOISE_SEED + index, steps=steps)
        for index, caption in enumerate(words)
    ]
    pipe = miniatures.load_miniature(model)
    report = compare(pipe, variants, calls, decode=partial(miniatures.to_frames, model), **more)
    return dataclasses.replace(report, calls=tuple(words))
