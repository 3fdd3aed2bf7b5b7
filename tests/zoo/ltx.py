"""LTX-Video: batched CFG inside one cache context."""

from __future__ import annotations

from typing import Any

import torch

from .base import Family, assemble, build, flow_euler, missing, normal

CHANNELS, TEXT = 8, 24


def make(seed: int = 0, scheduler: Any = None, **config: Any) -> Any:
    defaults = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "num_layers": 6,
        "caption_channels": TEXT,
    }
    return assemble(
        "LTXPipeline",
        scheduler=scheduler or flow_euler(dynamic=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=build("LTXVideoTransformer3DModel", seed, **{**defaults, **config}),
    )


def call(
    pipe: Any,
    steps: int = 6,
    seed: int = 0,
    batch: int = 1,
    size: tuple[int, ...] | None = None,
    guidance: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    height, width, frames = size or (128, 128, 9)
    scale = 3.0 if guidance is None else guidance
    tokens = ((frames - 1) // 8 + 1) * (height // 32) * (width // 32)
    mask = torch.ones(batch, 7, dtype=torch.bool)
    kwargs = {
        "prompt_embeds": normal(batch, 7, TEXT, seed=seed, key="prompt"),
        "prompt_attention_mask": mask,
        "latents": normal(batch, tokens, CHANNELS, seed=seed, key="latents"),
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "output_type": "latent",
    }
    if scale > 1:
        kwargs["negative_prompt_embeds"] = normal(batch, 7, TEXT, seed=seed, key="negative")
        kwargs["negative_prompt_attention_mask"] = mask
    return {**kwargs, **more}


FAMILIES = (
    Family(
        "ltx",
        make,
        call,
        ("cond_uncond",),
        ("transformer_blocks",),
        (128, 160, 17),
        (1.0, ("cond",)),
        ("cond_uncond",),
        missing=missing("LTXPipeline"),
    ),
)
