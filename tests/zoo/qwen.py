"""Qwen-Image with true CFG; the two prompts differ in length."""

from __future__ import annotations

from typing import Any

import torch

from .base import Family, assemble, build, flow_euler, missing, normal

CHANNELS, TEXT = 16, 24


def make(seed: int = 0, scheduler: Any = None, **config: Any) -> Any:
    defaults = {
        "patch_size": 2,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS // 4,
        "num_layers": 6,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT,
        "axes_dims_rope": (4, 6, 6),
    }
    return assemble(
        "QwenImagePipeline",
        scheduler=scheduler or flow_euler(dynamic=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=build("QwenImageTransformer2DModel", seed, **{**defaults, **config}),
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
    height, width = size or (64, 64)
    scale = 4.0 if guidance is None else guidance
    kwargs = {
        "prompt_embeds": normal(batch, 7, TEXT, seed=seed, key="prompt"),
        "prompt_embeds_mask": torch.ones(batch, 7, dtype=torch.long),
        "latents": normal(batch, height * width // 256, CHANNELS, seed=seed, key="latents"),
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "true_cfg_scale": scale,
        "output_type": "latent",
    }
    if scale > 1:
        kwargs["negative_prompt_embeds"] = normal(batch, 5, TEXT, seed=seed, key="negative")
        kwargs["negative_prompt_embeds_mask"] = torch.ones(batch, 5, dtype=torch.long)
    return {**kwargs, **more}


FAMILIES = (
    Family(
        "qwen",
        make,
        call,
        ("cond", "uncond"),
        ("transformer_blocks",),
        other_guidance=(1.0, ("cond",)),
        contexts=("cond", "uncond"),
        missing=missing("QwenImagePipeline"),
    ),
)
