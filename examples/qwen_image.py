"""Qwen-Image and Qwen-Image-Edit, with one line more.

    python -m examples.qwen_image                              # Qwen-Image 20B; its largest part takes 41 GB
    python -m examples.qwen_image --edit cat.png --prompt "Give the cat a red hat"
    python -m examples.qwen_image --miniature --compare        # a small trained model of the same class, on a CPU

Editing needs diffusers 0.36 or newer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import diffusers
import torch
from diffusers.utils import load_image

from sgl_diffusion_accel import apply_auto

from .common import Job, miniature, parser, save, show_comparison

MODEL, EDIT_MODEL = "Qwen/Qwen-Image", "Qwen/Qwen-Image-Edit-2509"
PROMPT = "A lighthouse in a storm, oil on canvas, with the words 'Hold on' on its wall"


def main(arguments: list[str] | None = None) -> None:
    """Runs the example from the command line."""
    options = parser(__doc__, small="miniature", output="qwen_image.png")
    options.add_argument("--edit", type=Path, metavar="PICTURE", help="edit this picture, as the prompt says")
    given = options.parse_args(arguments)
    pipe, call, decode = load(given)

    patch = apply_auto(pipe, quality=given.quality)  # the one line
    output = pipe(**call, generator=torch.Generator().manual_seed(given.seed))  # the pipeline is used as before
    print(patch)  # which steps were computed in each branch, what does not act, and why
    patch.remove()  # exactly as it was
    save(output, given.output, decode)

    if given.compare:
        show_comparison(given, pipe, call, decode)  # beside the same call unpatched, and with as few steps


def load(given: argparse.Namespace) -> Job:
    """The pipeline, and what it is called with."""
    if given.small:
        return miniature("qwen", given, caption="large red circle left", steps=50)
    # Guidance takes a second call in each step, and that only with a negative prompt: a blank is one.
    call = {"prompt": given.prompt or PROMPT, "negative_prompt": " ", "true_cfg_scale": 4.0}
    if given.edit is None:
        pipe = diffusers.QwenImagePipeline.from_pretrained(MODEL, torch_dtype=torch.bfloat16)
        call |= {"width": 1024, "height": 1024, "num_inference_steps": given.steps or 50}
    else:
        pipe = diffusers.QwenImageEditPlusPipeline.from_pretrained(EDIT_MODEL, torch_dtype=torch.bfloat16)
        call |= {"image": [load_image(str(given.edit))], "num_inference_steps": given.steps or 40}
    pipe.enable_model_cpu_offload()  # before or after the patch; with memory to spare: pipe.to("cuda")
    return Job(pipe, call)


if __name__ == "__main__":
    main()
