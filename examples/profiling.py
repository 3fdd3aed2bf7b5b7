"""Profiles a miniature with a cache on it: the table, the timeline, a trace for Perfetto, SGLang's JSON.

python -m examples.profiling [--model wan] [--steps 30] [--out out]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from miniatures.pipelines import call_kwargs, captions, load_miniature
from miniatures.specs import SPECS
from sgl_diffusion_accel import apply_cache_dit, profile


def main() -> None:
    """Runs the example from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="wan", choices=sorted(SPECS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("out"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load_miniature(given.model)
    call = call_kwargs(given.model, captions(given.model, 1, seed=0)[0], steps=given.steps)
    with apply_cache_dit(pipe, taylorseer_order=2):
        pipe(**call)  # the first run of a process is slower
        with profile(pipe, trace=False) as prof:
            pipe(**call)
        with profile(pipe, steps=5, output_dir=given.out) as traced:
            pipe(**call)
    print(prof.report)
    print()
    print(f"timeline: {prof.report.plot(given.out / 'timeline.png')}")
    print(f"SGLang's JSON: {prof.save_perf(given.out / 'perf.json')}")
    print(f"trace, for https://ui.perfetto.dev: {traced.trace_path}")


if __name__ == "__main__":
    main()
