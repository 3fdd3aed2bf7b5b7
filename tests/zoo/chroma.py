"""Chroma: text and image are concatenated between the lists, and the modulation comes from one approximator."""

from __future__ import annotations

from typing import Any

import torch

from .base import Family, assemble, build, flow_euler, missing, normal

CHANNELS, TEXT = 16, 24


def make(seed: int = 0, scheduler: Any = None, **config: Any) -> Any:
    defaults = {
        "patch_size": 1,
        "in_channels": CHANNELS,
        "num_layers": 4,
        "num_single_layers": 6,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT,
        "axes_dims_rope": (4, 6, 6),
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 32,
        "approximator_layers": 2,
    }
    return assemble(
        "ChromaPipeline",
        scheduler=scheduler or flow_euler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=build("ChromaTransformer2DModel", seed, **{**defaults, **config}),
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
        "prompt_attention_mask": torch.ones(batch, 7, dtype=torch.bool),
        "latents": normal(batch, height * width // 256, CHANNELS, seed=seed, key="latents"),
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "output_type": "latent",
    }
    if scale > 1:
        kwargs["negative_prompt_embeds"] = normal(batch, 7, TEXT, seed=seed, key="negative")
        kwargs["negative_prompt_attention_mask"] = (torch.arange(7) < 5).expand(batch, 7)
    return {**kwargs, **more}


FAMILIES = (
    Family(
        "chroma",
        make,
        call,
        ("cond", "uncond"),
        ("transformer_blocks", "single_transformer_blocks"),
        other_guidance=(1.0, ("cond",)),
        missing=missing("ChromaPipeline"),
    ),
)
