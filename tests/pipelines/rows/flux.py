"""FLUX.1 and FLUX.2, and Chroma: image to image, inpainting, editing, control."""

from __future__ import annotations

from typing import Any

from PIL import Image

from pipelines.base import Case, left_half, made, model, photo, picture, pipeline, values, words
from pipelines.vaes import flux2_vae
from zoo.base import flow_euler, tiny_vae
from zoo.flux import CHANNELS, CONFIG, POOLED, TEXT

FLUX, CHROMA, FLUX2 = "FluxTransformer2DModel", "ChromaTransformer2DModel", "Flux2Transformer2DModel"


def flux(name: str, call: dict[str, Any], label: str = "", controlled: bool = False, **changes: Any) -> Case:
    """A class that runs FLUX.1; `changes` are those of the transformer's configuration."""

    def make() -> Any:
        parts = {"controlnet": _controlnet()} if controlled else {}
        vae = tiny_vae(CHANNELS // 4, 0)
        return pipeline(name, vae=vae, transformer=model(FLUX, **changes), scheduler=flow_euler(True), **parts)

    return Case(name, make, lambda: {**_prompt(), **call}, label)


def _controlnet() -> Any:
    return made("FluxControlNetModel", **{**CONFIG, "num_layers": 1, "num_single_layers": 1})


def _prompt(negative: bool = False) -> dict[str, Any]:
    given = {**words(TEXT, negative=negative), "pooled_prompt_embeds": values(1, POOLED, key="pooled")}
    return {**given, "negative_pooled_prompt_embeds": values(1, POOLED, key="n")} if negative else given


def chroma(name: str, call: dict[str, Any]) -> Case:
    def make() -> Any:
        vae = tiny_vae(CHANNELS // 4, 0)
        pipe = pipeline(name, vae=vae, transformer=model(CHROMA), scheduler=flow_euler())
        pipe.transformer.register_to_config(guidance_embeds=False)  # that for inpainting asks for it, and it has none
        return pipe

    return Case(name, make, lambda: {**words(TEXT, mask="prompt_attention_mask"), **call})


def flux2(name: str, call: dict[str, Any], label: str = "", negative: bool = True, **parts: Any) -> Case:
    def make() -> Any:
        return pipeline(name, vae=flux2_vae(), transformer=model(FLUX2), scheduler=flow_euler(True), **parts)

    may_replay = name != "Flux2KleinKVPipeline"  # it takes a store of keys and values from its first call
    return Case(name, make, lambda: {**words(TEXT, negative=negative), **call}, label, may_replay=may_replay)


PICTURE, MASK = picture(), left_half()
PHOTO = photo()
MASKED = {"image": PICTURE, "mask_image": MASK}
CFG = {"true_cfg_scale": 3.0, **_prompt(negative=True)}
WINDOW = {"control_guidance_start": 0.3, "control_guidance_end": 0.7}

CASES = (
    flux("FluxInpaintPipeline", {**MASKED, **CFG, "strength": 0.8}),
    flux("FluxKontextPipeline", {"image": PICTURE, "_auto_resize": False, "max_area": 64 * 64, **CFG}),
    flux("FluxKontextInpaintPipeline", {**MASKED, "_auto_resize": False, "max_area": 64 * 64, "strength": 1.0, **CFG}),
    flux("FluxFillPipeline", MASKED, in_channels=2 * CHANNELS + 256, out_channels=CHANNELS),
    flux("FluxControlPipeline", {"control_image": PICTURE}, in_channels=2 * CHANNELS, out_channels=CHANNELS),
    flux(
        "FluxControlImg2ImgPipeline",
        {"image": PICTURE, "control_image": PICTURE, "strength": 0.8},
        in_channels=2 * CHANNELS,
        out_channels=CHANNELS,
    ),
    flux(
        "FluxControlInpaintPipeline",
        {**MASKED, "control_image": PICTURE, "strength": 0.8},
        in_channels=2 * CHANNELS,
        out_channels=CHANNELS,
    ),
    flux(
        "FluxControlNetImg2ImgPipeline",
        {"image": PICTURE, "control_image": PICTURE, "strength": 1.0, **WINDOW},
        controlled=True,
    ),
    flux(
        "FluxControlNetInpaintPipeline",
        {**MASKED, "control_image": PICTURE, "strength": 0.8, **WINDOW},
        controlled=True,
    ),
    chroma("ChromaImg2ImgPipeline", {"image": PICTURE, "strength": 0.8}),
    chroma("ChromaInpaintPipeline", {**MASKED, "strength": 0.8}),
    flux2("Flux2Pipeline", {"image": [PHOTO]}, "with a picture", negative=False),
    flux2("Flux2KleinPipeline", {"image": [PHOTO]}),
    flux2("Flux2KleinPipeline", {}, "distilled", is_distilled=True),
    flux2("Flux2KleinKVPipeline", {"image": [PHOTO]}, negative=False),
    flux2("Flux2KleinInpaintPipeline", {"image": PHOTO, "mask_image": Image.new("L", (64, 64), 255), "strength": 0.8}),
)
