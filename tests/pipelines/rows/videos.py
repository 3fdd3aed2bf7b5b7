"""Videos by other transformers: CogVideoX and its kin, Allegro, Latte, EasyAnimate, Kandinsky, Motif and more."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance

from classes.base import TEXT
from pipelines.base import Case, left_half, photo, picture, values, words
from pipelines.rows.pictures import case, ddim, encodes, having
from pipelines.vaes import cogvideox_vae, hunyuan_vae, magvit_vae, wan_vae
from zoo.base import tiny_vae
from zoo.wan import TEXT as WIDE

PHOTO = photo()
CLIP = [PHOTO] * 5
COGVIDEOX = "CogVideoXTransformer3DModel"
COG = {**words(24), "num_frames": 5, "max_sequence_length": 7}
COG_LATENTS = {"latents": values(1, 2, 4, 8, 8, key="latents")}


def cog_ddim() -> Any:
    return diffusers.CogVideoXDDIMScheduler(
        clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing"
    )


def cog_dpm() -> Any:
    return diffusers.CogVideoXDPMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")


def cog(name: str, call: dict[str, Any], label: str = "", scheduler: Any = cog_ddim, **changes: Any) -> Case:
    given = {key: value for key, value in {**COG, **call}.items() if value is not None}
    return case(name, COGVIDEOX, given, label, scheduler, parts=lambda: {"vae": cogvideox_vae(4)}, **changes)


NARROW = words(12, mask="prompt_attention_mask")
ONES = torch.ones(1, 7, dtype=torch.long)
K5 = "Kandinsky5Transformer3DModel"
KANDINSKY = {
    key: value
    for prefix in ("", "negative_")
    for key, value in {
        f"{prefix}prompt_embeds_qwen": values(1, 7, 24, key=f"{prefix}prompt"),
        f"{prefix}prompt_embeds_clip": values(1, 20, key=f"{prefix}pooled"),
        f"{prefix}prompt_cu_seqlens": torch.arange(2, dtype=torch.int32) * 7,
    }.items()
}


def _asked(pipe: Any) -> Any:
    pipe.vae.register_to_config(cache_mag_vae=False)  # it asks for it, and that autoencoder has none
    return pipe


def _kandinsky() -> Any:
    return having(resolutions=[(64, 64)])


CASES = (
    cog("CogVideoXPipeline", {}, "DPM", scheduler=cog_dpm),
    cog("CogVideoXPipeline", {"use_dynamic_cfg": True}, "dynamic CFG"),
    cog("CogVideoXImageToVideoPipeline", {"image": PHOTO}, in_channels=8),
    cog("CogVideoXVideoToVideoPipeline", {"video": CLIP, "num_frames": None, "strength": 0.8}),
    cog("CogVideoXFunControlPipeline", {"control_video": CLIP, "num_frames": None}, in_channels=8),
    case(
        "AllegroPipeline",
        "AllegroTransformer3DModel",
        {**NARROW, "negative_prompt": None, "num_frames": 5},
        scheduler=ddim,
    ),
    case(
        "LattePipeline",
        "LatteTransformer3DModel",
        {**words(TEXT), "video_length": 2, "negative_prompt": None, "mask_feature": False},
        scheduler=ddim,
        parts=lambda: {"vae": tiny_vae(4, 0)},
        out_channels=8,
    ),
    case(
        "EasyAnimatePipeline",
        "EasyAnimateTransformer3DModel",
        {**words(TEXT, mask="prompt_attention_mask"), "num_frames": 5},
        parts=lambda: {"vae": magvit_vae(4)},
    ),
    case(
        "EasyAnimateControlPipeline",
        "EasyAnimateTransformer3DModel",
        {**words(TEXT, mask="prompt_attention_mask"), "num_frames": 5, "control_video": picture(1, 3, 5, 64, 64)},
        prepare=encodes(values(1, 7, TEXT, key="p"), values(1, 7, TEXT, key="n"), ONES, ONES),
        parts=lambda: {"vae": magvit_vae(4)},
        in_channels=12,
    ),
    case(
        "EasyAnimateInpaintPipeline",
        "EasyAnimateTransformer3DModel",
        {
            **words(TEXT, mask="prompt_attention_mask"),
            "num_frames": 5,
            "video": picture(1, 3, 5, 64, 64),
            "mask_video": left_half(1, 1, 5, 64, 64),
            "strength": 0.8,
        },
        parts=lambda: {"vae": magvit_vae(4)},
        prepare=_asked,
        in_channels=9,
    ),
    case("Kandinsky5T2IPipeline", K5, KANDINSKY, prepare=_kandinsky(), in_visual_dim=4),
    case(
        "Kandinsky5I2IPipeline",
        K5,
        {**KANDINSKY, "image": PHOTO},
        prepare=_kandinsky(),
        parts=lambda: {"vae": tiny_vae(4, 0)},
        visual_cond=True,
    ),
    case(
        "Kandinsky5I2VPipeline",
        K5,
        {**KANDINSKY, "image": PHOTO, "num_frames": 21},
        parts=lambda: {"vae": hunyuan_vae(4)},
        visual_cond=True,
    ),
    case(
        "AnyFlowPipeline",
        "AnyFlowTransformer3DModel",
        {**words(WIDE), "num_frames": 5},
        scheduler=lambda: diffusers.FlowMapEulerDiscreteScheduler(),
        parts=lambda: {"vae": wan_vae(4)},
    ),
    case(
        "AnyFlowFARPipeline",
        "AnyFlowFARTransformer3DModel",
        {**words(WIDE), "num_frames": 5, "chunk_partition": [1, 1]},
        "with its store of keys and values",
        scheduler=lambda: diffusers.FlowMapEulerDiscreteScheduler(),
        parts=lambda: {"vae": wan_vae(4)},
    ),
    case(
        "HeliosPipeline",
        "HeliosTransformer3DModel",
        {
            **words(WIDE),
            "num_frames": 12,
            "height": 32,
            "width": 32,
            "history_sizes": [4, 2, 1],
            "num_latent_frames_per_chunk": 3,
        },
        "two chunks",
        parts=lambda: {"vae": wan_vae(4)},
    ),
    case(
        "MotifVideoPipeline",
        "MotifVideoTransformer3DModel",
        {**NARROW, "num_frames": 5},
        in_channels=9,
        parts=lambda: {"vae": wan_vae(4), "guider": ClassifierFreeGuidance(guidance_scale=4.0)},
    ),
    case(
        "ConsisIDPipeline",
        "ConsisIDTransformer3DModel",
        {
            **words(TEXT),
            "num_frames": 5,
            "max_sequence_length": 7,
            "image": PHOTO,
            "id_vit_hidden": [torch.ones(1, 2, 6)],
            "id_cond": torch.ones(1, 6),
            "use_dynamic_cfg": False,
        },
        scheduler=cog_ddim,
        parts=lambda: {"vae": cogvideox_vae(4)},
        num_layers=4,
        in_channels=8,
    ),
    case(
        "MotifVideoImage2VideoPipeline",
        "MotifVideoTransformer3DModel",
        {**NARROW, "num_frames": 5, "image": PHOTO},
        prepare=encodes(values(1, 4, 10, key="image"), name="_encode_image"),
        parts=lambda: {"vae": wan_vae(4), "guider": ClassifierFreeGuidance(guidance_scale=4.0)},
        in_channels=9,
    ),
)
