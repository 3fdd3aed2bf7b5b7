"""Sana: ControlNet, perturbed attention, Sprint, video; and Z-Image."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from zoo.base import flow_euler, tiny_vae
from zoo.sana import TEXT

from ..base import Case, left_half, made, model, photo, picture, pipeline, values, words
from ..vaes import dc_vae, wan_vae
from .pictures import case, multistep

SANA, SANA_VIDEO, Z = "SanaTransformer2DModel", "SanaVideoTransformer3DModel", "ZImageTransformer2DModel"
PHOTO, PICTURE, MASK = photo(), picture(), left_half()


def scm() -> Any:
    return diffusers.SCMScheduler()


def flow_multistep() -> Any:
    return diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


NARROW = {**words(12, mask="prompt_attention_mask"), "negative_prompt": None, "use_resolution_binning": False}
SPRINT = {
    **words(12, negative=False, mask="prompt_attention_mask"),
    "use_resolution_binning": False,
    "intermediate_timesteps": None,
}


def zimage(name: str, call: dict[str, Any], **more: Any) -> Case:
    prompt = {f"{each}prompt_embeds": [values(7, 24, key=each)] for each in ("", "negative_")}
    return case(name, Z, {**prompt, **call}, parts=lambda: {"vae": tiny_vae(4, 0)}, **more)


CASES = (
    case("SanaPAGPipeline", SANA, NARROW, scheduler=flow_multistep, parts=lambda: {"pag_applied_layers": ["blocks.1"]}),
    case("SanaSprintPipeline", SANA, SPRINT, scheduler=scm, guidance_embeds=True),
    case("SanaSprintImg2ImgPipeline", SANA, {**SPRINT, "image": PICTURE, "strength": 0.8}, scheduler=scm, parts=lambda: {"vae": dc_vae(4)}, guidance_embeds=True),
    case("SanaVideoPipeline", SANA_VIDEO, {**NARROW, "frames": 5}, scheduler=flow_multistep, parts=lambda: {"vae": wan_vae(4)}),
    case("SanaImageToVideoPipeline", SANA_VIDEO, {**NARROW, "frames": 5, "image": PHOTO}, scheduler=flow_euler, parts=lambda: {"vae": wan_vae(4)}),
    zimage("ZImageImg2ImgPipeline", {"image": PICTURE, "strength": 0.8}),
    zimage("ZImageInpaintPipeline", {"image": PICTURE, "mask_image": MASK, "strength": 0.8}),
)
