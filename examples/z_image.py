"""Z-Image and Z-Image-Turbo, with one line more.

    python -m examples.z_image                        # Z-Image 6B, 50 steps; its largest part takes 12 GB
    python -m examples.z_image --model turbo          # distilled for 8 steps: no cache, see below
    python -m examples.z_image --tiny --compare       # a tiny model of the same class, on a CPU; its weights are
                                                      # random, so that it shows steps and no picture

Turbo's 8 steps leave none to spare: `apply_auto` leaves the cache out of such a run and says so, and its pictures are
those of the unpatched pipeline. On a CUDA GPU it still looks for a faster attention kernel. Both need diffusers 0.36.
"""

from __future__ import annotations

import argparse

import diffusers
import torch

from sgl_diffusion_accel import apply_auto

from . import tiny
from .common import Job, parser, save, show_comparison

MODELS = {"base": "Tongyi-MAI/Z-Image", "turbo": "Tongyi-MAI/Z-Image-Turbo"}
STEPS, GUIDANCE = {"base": 50, "turbo": 8}, {"base": 4.0, "turbo": 0.0}
PROMPT = "A lighthouse in a storm, waves breaking over the rocks, 35 mm photograph"


def main(arguments: list[str] | None = None) -> None:
    """Runs the example from the command line."""
    options = parser(__doc__, small="tiny", output="z_image.png")
    options.add_argument("--model", choices=MODELS, default="base")
    given = options.parse_args(arguments)
    pipe, call, decode = load(given)

    patch = apply_auto(pipe, quality=given.quality)  # the one line
    output = pipe(**call, generator=torch.Generator().manual_seed(given.seed))  # the pipeline is used as before
    print(patch)  # which steps were computed, what does not act, and why
    patch.remove()  # exactly as it was
    save(output, given.output, decode)

    if given.compare:
        show_comparison(given, pipe, call, decode)  # beside the same call unpatched, and with as few steps


def load(given: argparse.Namespace) -> Job:
    """The pipeline, and what it is called with."""
    steps, guidance = given.steps or STEPS[given.model], GUIDANCE[given.model]
    if given.small:
        return tiny.z_image(given, steps, guidance)
    pipe = diffusers.ZImagePipeline.from_pretrained(MODELS[given.model], torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()  # before or after the patch; with memory to spare: pipe.to("cuda")
    call = {"prompt": given.prompt or PROMPT, "height": 1024, "width": 1024}
    return Job(pipe, call | {"num_inference_steps": steps, "guidance_scale": guidance})


if __name__ == "__main__":
    main()
