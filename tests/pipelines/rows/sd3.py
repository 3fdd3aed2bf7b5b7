"""Stable Diffusion 3: image to image, inpainting, ControlNet, perturbed attention; and Z-Image."""

from __future__ import annotations

from typing import Any

from pipelines.base import Case, left_half, made, model, picture, pipeline, values, words
from zoo.base import flow_euler, tiny_vae
from zoo.sd3 import CHANNELS, POOLED, TEXT

SD3 = "SD3Transformer2DModel"
PICTURE, MASK = picture(), left_half()


def sd3(
    name: str, call: dict[str, Any], label: str = "", control: int = 0, channels: int = CHANNELS, **parts: Any
) -> Case:
    """A class that runs Stable Diffusion 3; `control` is how many channels more its ControlNet takes."""

    def make() -> Any:
        transformer = model(SD3, in_channels=channels, out_channels=channels, dual_attention_layers=())
        more = {}
        if control:
            own = {k: v for k, v in transformer.config.items() if not k.startswith("_") and k != "out_channels"}
            given = {**own, "num_layers": 1, "extra_conditioning_channels": control - 1}
            more["controlnet"] = made("SD3ControlNetModel", **given)
        vae = tiny_vae(channels, 0)
        return pipeline(name, vae=vae, transformer=transformer, scheduler=flow_euler(), **more, **parts)

    pooled = {f"{each}pooled_prompt_embeds": values(1, POOLED, key=each) for each in ("", "negative_")}
    return Case(name, make, lambda: {**words(TEXT), **pooled, **call}, label)


WINDOW = {"control_guidance_start": 0.3, "control_guidance_end": 0.7}
PAG = {"pag_scale": 0.7}

CASES = (
    sd3("StableDiffusion3Img2ImgPipeline", {"image": PICTURE, "strength": 0.8}),
    sd3("StableDiffusion3InpaintPipeline", {"image": PICTURE, "mask_image": MASK, "strength": 0.8}, channels=16),
    sd3("StableDiffusion3ControlNetPipeline", {"control_image": PICTURE, **WINDOW}, control=1),
    sd3(
        "StableDiffusion3ControlNetInpaintingPipeline",
        {"control_image": PICTURE, "control_mask": MASK, **WINDOW},
        control=2,
    ),
    sd3("StableDiffusion3PAGPipeline", PAG, pag_applied_layers=["blocks.0"]),
    sd3(
        "StableDiffusion3PAGImg2ImgPipeline",
        {**PAG, "image": PICTURE, "strength": 0.8},
        pag_applied_layers=["blocks.0"],
    ),
)
