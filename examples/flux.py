"""FLUX.1 and FLUX.2, with one line more.

    python -m examples.flux                           # FLUX.1-dev 12B; its largest part takes 24 GB
    python -m examples.flux --model 2                 # FLUX.2-dev 32B: 64 GB
    python -m examples.flux --miniature --compare     # a small trained model of the same class, on a CPU

Both are on the Hub for those who have accepted their licence there (hf auth login). FLUX.2 needs diffusers 0.36.
"""

from __future__ import annotations

import argparse

import diffusers
import torch

from sgl_diffusion_accel import apply_auto

from .common import Job, miniature, parser, save, show_comparison

MODELS = {"1": "black-forest-labs/FLUX.1-dev", "2": "black-forest-labs/FLUX.2-dev"}
PROMPT = "A lighthouse in a storm, waves breaking over the rocks, 35 mm photograph"


def main(arguments: list[str] | None = None) -> None:
    """Runs the example from the command line."""
    options = parser(__doc__, small="miniature", output="flux.png")
    options.add_argument("--model", choices=MODELS, default="1")
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
    if given.small:
        return miniature("flux", given, caption="large blue circle right", steps=28)
    # The guidance of both is an input of the model, not a second call.
    call = {"prompt": given.prompt or PROMPT, "width": 1024, "height": 1024}
    if given.model == "1":
        pipe = diffusers.FluxPipeline.from_pretrained(MODELS["1"], torch_dtype=torch.bfloat16)
        call |= {"guidance_scale": 3.5, "num_inference_steps": given.steps or 28}
    else:
        pipe = diffusers.Flux2Pipeline.from_pretrained(MODELS["2"], torch_dtype=torch.bfloat16)
        call |= {"guidance_scale": 4.0, "num_inference_steps": given.steps or 50}
    pipe.enable_model_cpu_offload()  # before or after the patch; with memory to spare: pipe.to("cuda")
    return Job(pipe, call)


if __name__ == "__main__":
    main()
