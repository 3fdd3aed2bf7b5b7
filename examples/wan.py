"""Wan 2.1 and 2.2, text to video, with one line more.

    python -m examples.wan                            # Wan 2.1 1.3B at 480p; its largest part takes 11 GB
    python -m examples.wan --model 2.2                # Wan 2.2 A14B at 720p; each of its two experts takes 29 GB
    python -m examples.wan --miniature --compare      # a small trained model of the same class, on a CPU

Videos are written by imageio: pip install imageio imageio-ffmpeg.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import AutoencoderKLWan, WanPipeline

from sgl_diffusion_accel import apply_auto

from .common import Job, miniature, parser, save, show_comparison

MODELS = {"2.1": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "2.2": "Wan-AI/Wan2.2-T2V-A14B-Diffusers"}
PROMPT = "A lighthouse in a storm, waves breaking over the rocks, cinematic"
NEGATIVE = "overexposed, static, blurred details, subtitles, worst quality, low quality, deformed, still picture"


def main(arguments: list[str] | None = None) -> None:
    """Runs the example from the command line."""
    options = parser(__doc__, small="miniature", output="wan.mp4")
    options.add_argument("--model", choices=MODELS, default="2.1")
    given = options.parse_args(arguments)
    pipe, call, decode = load(given)

    patch = apply_auto(pipe, quality=given.quality)  # the one line; with two experts it patches both
    output = pipe(**call, generator=torch.Generator().manual_seed(given.seed))  # the pipeline is used as before
    print(patch)  # which steps were computed in each branch, what does not act, and why
    patch.remove()  # exactly as it was
    save(output, given.output, decode, fps=16)

    if given.compare:
        show_comparison(given, pipe, call, decode)  # beside the same call unpatched, and with as few steps


def load(given: argparse.Namespace) -> Job:
    """The pipeline, and what it is called with."""
    if given.small:
        return miniature("wan", given, caption="large red circle right", steps=50)
    name = MODELS[given.model]
    # The VAE in float32: in bfloat16 it loses detail.
    vae = AutoencoderKLWan.from_pretrained(name, subfolder="vae", torch_dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(name, vae=vae, torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()  # before or after the patch; with memory to spare: pipe.to("cuda")
    call = {"prompt": given.prompt or PROMPT, "negative_prompt": NEGATIVE, "num_frames": 81}
    if given.model == "2.1":
        call |= {"height": 480, "width": 832, "num_inference_steps": given.steps or 50, "guidance_scale": 5.0}
    else:  # each expert has a guidance of its own
        call |= {"height": 720, "width": 1280, "num_inference_steps": given.steps or 40}
        call |= {"guidance_scale": 4.0, "guidance_scale_2": 3.0}
    return Job(pipe, call)


if __name__ == "__main__":
    main()
