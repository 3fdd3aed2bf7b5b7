"""Sana: ControlNet, perturbed attention, Sprint, video; and Z-Image."""

from __future__ import annotations

from typing import Any

import diffusers

from pipelines.base import Case, left_half, made, model, photo, picture, values, words
from pipelines.rows.pictures import case
from pipelines.vaes import dc_vae, wan_vae
from zoo.base import flow_euler, tiny_vae

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


def _sana_controlnet() -> Any:
    config = {key: value for key, value in model(SANA).config.items() if key in _OF_SANA}
    return made("SanaControlNetModel", **{**config, "num_layers": 1})


_OF_SANA = (
    "in_channels",
    "out_channels",
    "num_attention_heads",
    "attention_head_dim",
    "num_cross_attention_heads",
    "cross_attention_head_dim",
    "cross_attention_dim",
    "caption_channels",
    "mlp_ratio",
    "sample_size",
    "patch_size",
)


def _z_controlnet(channels: int) -> Any:
    return made(
        "ZImageControlNetModel",
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=channels,
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )


def zimage(name: str, call: dict[str, Any], controlled: int = 0, **more: Any) -> Case:
    def parts() -> dict[str, Any]:
        return {"vae": tiny_vae(4, 0), **({"controlnet": _z_controlnet(controlled)} if controlled else {})}

    prompt = {f"{each}prompt_embeds": [values(7, 24, key=each)] for each in ("", "negative_")}
    return case(name, Z, {**prompt, **call}, parts=parts, **more)


CASES = (
    case("SanaPAGPipeline", SANA, NARROW, scheduler=flow_multistep, parts=lambda: {"pag_applied_layers": ["blocks.1"]}),
    case("SanaSprintPipeline", SANA, SPRINT, scheduler=scm, guidance_embeds=True),
    case(
        "SanaSprintImg2ImgPipeline",
        SANA,
        {**SPRINT, "image": PICTURE, "strength": 0.8},
        scheduler=scm,
        parts=lambda: {"vae": dc_vae(4)},
        guidance_embeds=True,
    ),
    case(
        "SanaVideoPipeline",
        SANA_VIDEO,
        {**NARROW, "frames": 5},
        scheduler=flow_multistep,
        parts=lambda: {"vae": wan_vae(4)},
    ),
    case(
        "SanaImageToVideoPipeline",
        SANA_VIDEO,
        {**NARROW, "frames": 5, "image": PHOTO, "guidance_scale": 1.5},
        scheduler=flow_euler,
        parts=lambda: {"vae": wan_vae(4)},
    ),
    zimage("ZImageImg2ImgPipeline", {"image": PICTURE, "strength": 0.8}),
    zimage("ZImageInpaintPipeline", {"image": PICTURE, "mask_image": MASK, "strength": 0.8}),
    case(
        "SanaControlNetPipeline",
        SANA,
        {**NARROW, "control_image": PICTURE},
        scheduler=flow_multistep,
        parts=lambda: {"vae": dc_vae(4), "controlnet": _sana_controlnet()},
        needs=("SanaControlNetModel",),
    ),
    zimage("ZImageControlNetPipeline", {"control_image": PICTURE}, controlled=4, needs=("ZImageControlNetModel",)),
    zimage(
        "ZImageControlNetInpaintPipeline",
        {"control_image": PICTURE, "image": PICTURE, "mask_image": MASK},
        controlled=9,
        needs=("ZImageControlNetModel",),
    ),
)
