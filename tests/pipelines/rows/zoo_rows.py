"""Pipelines that the zoo has already, with fewer blocks."""

from __future__ import annotations

from typing import Any

import torch

from invariants.families import few_blocks
from pipelines.base import STEPS, Case
from zoo import FAMILIES, Family

_NAMES = {
    "wan": "WanPipeline",
    "wan22": "WanPipeline",
    "wan_v2v": "WanVideoToVideoPipeline",
    "qwen": "QwenImagePipeline",
    "flux": "FluxPipeline",
    "flux_controlnet": "FluxControlNetPipeline",
    "flux_img2img": "FluxImg2ImgPipeline",
    "hunyuan": "HunyuanVideoPipeline",
    "hunyuan15": "HunyuanVideo15Pipeline",
    "zimage": "ZImagePipeline",
    "sd3": "StableDiffusion3Pipeline",
    "chroma": "ChromaPipeline",
    "flux2": "Flux2Pipeline",
    "ltx": "LTXPipeline",
    "cogvideox": "CogVideoXPipeline",
    "mochi": "MochiPipeline",
    "sana": "SanaPipeline",
    "lumina2": "Lumina2Pipeline",
    "kandinsky5": "Kandinsky5T2VPipeline",
    "longcat": "LongCatImagePipeline",
    "ovis": "OvisImagePipeline",
    "ideogram4": "Ideogram4Pipeline",
}


def _case(family: Family, label: str = "", **given: Any) -> Case:
    def call() -> dict[str, Any]:
        return {"generator": torch.Generator().manual_seed(0), **family.call(None, steps=STEPS, **given)}

    return Case(_NAMES[family.name], lambda: few_blocks(family), call, label)


CASES = (
    *(_case(family, {"wan22": "two experts"}.get(name, "")) for name, family in FAMILIES.items() if name in _NAMES),
    _case(FAMILIES["flux"], "true CFG", guidance=3.0),
    _case(FAMILIES["flux_img2img"], "strength 0.6", strength=0.6),
    _case(FAMILIES["wan_v2v"], "strength 0.6", strength=0.6),
    _case(
        FAMILIES["flux_controlnet"], "in a window", control_guidance_start=0.3, control_guidance_end=0.7, guidance=3.0
    ),
    _case(
        FAMILIES["sd3"],
        "skip-layer guidance",
        skip_guidance_layers=[1],
        skip_layer_guidance_start=0.2,
        skip_layer_guidance_stop=0.7,
    ),
    _case(FAMILIES["lumina2"], "guidance cut short", cfg_trunc_ratio=0.5),
    _case(FAMILIES["zimage"], "guidance cut short", cfg_truncation=0.5),
)
