"""HunyuanVideo, its image to video and framepack; HunyuanVideo 1.5 and HunyuanImage with a guider."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.guiders import ClassifierFreeGuidance

from pipelines.base import Case, model, photo, pipeline, values
from pipelines.vaes import hunyuan15_vae, hunyuan_vae
from zoo.base import flow_euler

PHOTO = photo()
VIDEO, FRAMEPACK = "HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel"
IMAGE, VIDEO15 = "HunyuanImageTransformer2DModel", "HunyuanVideo15Transformer3DModel"
ONES = torch.ones(1, 7, dtype=torch.long)


def video(
    name: str, call: dict[str, Any], label: str = "", kind: str = VIDEO, cfg: bool = True, **changes: Any
) -> Case:
    """With true guidance, unless it is turned off."""

    def make() -> Any:
        transformer = model(kind, **changes)
        config = transformer.config
        pipe = pipeline(name, vae=hunyuan_vae(4), transformer=transformer, scheduler=flow_euler())
        shape = (1, 3, config.get("image_proj_dim") or 8)
        pipe.encode_image = lambda *_, **__: values(*shape, key="image")
        pipe.encode_prompt = lambda prompt=None, **_: (
            values(1, 7, config.text_embed_dim, key=str(prompt)),
            values(1, config.pooled_projection_dim, key=f"pooled {prompt}"),
            ONES,
        )
        return pipe

    given = {"prompt": "a cat", "num_frames": 5, "image": PHOTO, "guidance_scale": 6.0}
    negative = {"negative_prompt": "a dog", "true_cfg_scale": 3.0} if cfg else {}
    return Case(name, make, lambda: {**given, **negative, **call}, label, (kind,))


def guided(name: str, kind: str, call: dict[str, Any], vae: Any = None, **changes: Any) -> Case:
    """With a guider, which makes the branches."""

    def make() -> Any:
        transformer = model(kind, **changes)
        parts = {"transformer": transformer, "scheduler": flow_euler(), "guider": ClassifierFreeGuidance(4.0)}
        pipe = pipeline(name, vae=vae() if vae else None, **parts)
        pipe.encode_image = lambda *_, **__: values(1, 4, 10, key="image")
        return pipe

    def given() -> dict[str, Any]:
        prompt = {}
        for prefix in ("", "negative_"):
            prompt[f"{prefix}prompt_embeds"] = values(1, 7, 16, key=prefix)
            prompt[f"{prefix}prompt_embeds_mask"] = ONES
            if "Refiner" not in name:
                prompt[f"{prefix}prompt_embeds_2"] = values(1, 7, 12, key=f"{prefix}2")
                prompt[f"{prefix}prompt_embeds_mask_2"] = ONES
        return {**prompt, **call}

    return Case(name, make, given, "", (kind,))


FRAMES = {"num_frames": 9, "latent_window_size": 2, "last_image": None}
CASES = (
    video(
        "HunyuanVideoImageToVideoPipeline",
        {},
        "image beside the latents",
        in_channels=9,
        image_condition_type="latent_concat",
    ),
    video("HunyuanVideoImageToVideoPipeline", {}, "image in the first frame", image_condition_type="token_replace"),
    video("HunyuanSkyreelsImageToVideoPipeline", {}, in_channels=8),
    video("HunyuanVideoFramepackPipeline", FRAMES, "from the end", FRAMEPACK),
    video(
        "HunyuanVideoFramepackPipeline", {**FRAMES, "sampling_type": "vanilla"}, "from the start", FRAMEPACK, cfg=False
    ),
    guided("HunyuanImagePipeline", IMAGE, {"height": 256, "width": 256}),
    guided("HunyuanVideo15ImageToVideoPipeline", VIDEO15, {"image": PHOTO, "num_frames": 5}, hunyuan15_vae),
)
