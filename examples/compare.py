"""What did the cache do to my picture? Compares three settings on a small trained model; works in a notebook too.

    python -m examples.compare [--model qwen] [--captions 3]

Writes a page with everything, and the same in parts: `out/compare.html`, `.md`, `.json`, and three pictures. In a
notebook, `compare_settings()` in the last line of a cell shows the page. With a model of your own it is one call:

    report = compare(pipe, VARIANTS, calls=[dict(prompt="a lighthouse in a storm", num_inference_steps=50, seed=0)])
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from functools import partial
from pathlib import Path

import torch

from miniatures import NAMES, call_kwargs, captions, load_miniature, to_frames
from sgl_diffusion_accel import ComparisonReport, apply_cache_dit, compare

VARIANTS = {
    "SGLang's defaults": apply_cache_dit,
    "the same, second order": lambda pipe: apply_cache_dit(pipe, taylorseer_order=2),
    "step mask late-fast": lambda pipe: apply_cache_dit(
        pipe, steps_mask="late-fast", steps_policy="static", fn_compute_blocks=0, taylorseer_order=2
    ),
}
"""A variant is a name and a function that patches a pipeline."""

OUT = Path("out")


def main() -> None:
    """Runs the example from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=NAMES, default="qwen")
    parser.add_argument("--captions", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)  # the miniatures are fastest so
    logging.disable(logging.WARNING)
    report = compare_settings(given.model, given.captions)
    print(report)
    OUT.mkdir(exist_ok=True)
    report.save(OUT / "compare.json")
    (OUT / "compare.md").write_text(report.to_markdown())
    (OUT / "compare.html").write_text(f"<!doctype html><meta charset=utf-8>{report._repr_html_()}")
    report.plot(OUT / "compare_pareto.png")
    report.plot_steps(OUT / "compare_steps.png")
    report.plot_pictures(OUT / "compare_pictures.png")
    print(f"\nEverything on one page: {OUT / 'compare.html'}")


def compare_settings(model: str = "qwen", count: int = 3, steps: int = 50, repeats: int = 1) -> ComparisonReport:
    """Compares the variants on a miniature.

    Args:
        model: Name of the miniature.
        count: Captions, each with its own noise.
        steps: Denoising steps.
        repeats: Runs of each on each caption; more make the times steadier.
    """
    words = captions(model, count, seed=5)
    calls = [call_kwargs(model, caption, seed=index, steps=steps) for index, caption in enumerate(words)]
    # A miniature has no VAE, so that somebody has to say how its latents become pictures.
    report = compare(load_miniature(model), VARIANTS, calls, decode=partial(to_frames, model), repeats=repeats)
    return dataclasses.replace(report, calls=tuple(words))


if __name__ == "__main__":
    main()
