"""Stable Diffusion 3: batched CFG, and a last block that returns None for the text."""

from __future__ import annotations

from typing import Any

from .base import Family, assemble, build, flow_euler, missing, normal

CHANNELS, TEXT, POOLED = 4, 24, 20


def make(seed: int = 0, scheduler: Any = None, **config: Any) -> Any:
    defaults = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": CHANNELS,
        "num_layers": 6,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT,
        "caption_projection_dim": 32,
        "pooled_projection_dim": POOLED,
        "out_channels": CHANNELS,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0, 1),
        "qk_norm": "rms_norm",
    }
    return assemble(
        "StableDiffusion3Pipeline",
        transformer=build("SD3Transformer2DModel", seed, **{**defaults, **config}),
        scheduler=scheduler or flow_euler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
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
        "pooled_prompt_embeds": normal(batch, POOLED, seed=seed, key="pooled"),
        "latents": normal(batch, CHANNELS, height // 8, width // 8, seed=seed, key="latents"),
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "output_type": "latent",
    }
    if scale > 1:
        kwargs["negative_prompt_embeds"] = normal(batch, 7, TEXT, seed=seed, key="negative")
        kwargs["negative_pooled_prompt_embeds"] = normal(batch, POOLED, seed=seed, key="negative pooled")
    return {**kwargs, **more}


FAMILIES = (
    Family(
        "sd3",
        make,
        call,
        ("cond_uncond",),
        ("transformer_blocks",),
        other_guidance=(1.0, ("cond",)),
        missing=missing("StableDiffusion3Pipeline"),
    ),
)
