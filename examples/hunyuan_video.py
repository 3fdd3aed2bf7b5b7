"""HunyuanVideo and HunyuanVideo 1.5, text to video, with one line more.

    python -m examples.hunyuan_video                        # HunyuanVideo 1.5 at 480p; its largest part takes 17 GB
    python -m examples.hunyuan_video --model 1              # HunyuanVideo 13B: 26 GB
    python -m examples.hunyuan_video --tiny --compare       # a tiny model of the same class, on a CPU; its weights
                                                            # are random, so that it shows steps and no picture

Videos are written by imageio: pip install imageio imageio-ffmpeg. HunyuanVideo 1.5 needs diffusers 0.36 or newer.
"""

from __future__ import annotations

import argparse

import diffusers
import torch

from sgl_diffusion_accel import apply_auto

from . import tiny
from .common import Job, parser, save, show_comparison

MODELS = {
    "1": "hunyuanvideo-community/HunyuanVideo",
    "1.5": "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
}
PROMPT = "A lighthouse in a storm, waves breaking over the rocks, realistic"


def main(arguments: list[str] | None = None) -> None:
    """Runs the example from the command line."""
    options = parser(__doc__, small="tiny", output="hunyuan_video.mp4")
    options.add_argument("--model", choices=MODELS, default="1.5")
    given = options.parse_args(arguments)
    pipe, call, decode = load(given)

    # The one line. Beside the cache it leaves out the padding of the prompt, which 1.5 has more of than of words.
    patch = apply_auto(pipe, quality=given.quality)
    output = pipe(**call, generator=torch.Generator().manual_seed(given.seed))  # the pipeline is used as before
    print(patch)  # which steps were computed, how many tokens were padding, what does not act, and why
    patch.remove()  # exactly as it was
    save(output, given.output, decode, fps=24)

    if given.compare:
        show_comparison(given, pipe, call, decode)  # beside the same call unpatched, and with as few steps


def load(given: argparse.Namespace) -> Job:
    """The pipeline, and what it is called with."""
    if given.small:
        return tiny.hunyuan_video(given) if given.model == "1" else tiny.hunyuan_video_15(given)
    call = {"prompt": given.prompt or PROMPT}
    if given.model == "1":  # its guidance is an input of the model, not a second call
        dtypes = {"transformer": torch.bfloat16, "default": torch.float16}  # its VAE and text encoders are float16
        pipe = diffusers.HunyuanVideoPipeline.from_pretrained(MODELS["1"], torch_dtype=dtypes)
        call |= {"height": 544, "width": 960, "num_frames": 61, "num_inference_steps": given.steps or 30}
    else:  # its guidance belongs to pipe.guider
        pipe = diffusers.HunyuanVideo15Pipeline.from_pretrained(MODELS["1.5"], torch_dtype=torch.bfloat16)
        call |= {"num_frames": 121, "num_inference_steps": given.steps or 50}
    pipe.vae.enable_tiling()  # else the whole clip is decoded at once
    pipe.enable_model_cpu_offload()  # before or after the patch; with memory to spare: pipe.to("cuda")
    return Job(pipe, call)


if __name__ == "__main__":
    main()
