"""HunyuanVideo 1.5: guidance by a guider, no step callback, empty picture tokens."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .base import Family, assemble, build, flow_euler, missing, normal

CHANNELS, TEXT, GLYPHS = 4, 24, 20


def make(seed: int = 0, scheduler: Any = None, guidance: float = 4.0, **config: Any) -> Any:
    """The guidance belongs to the pipeline's guider, not to the call."""
    defaults = {
        "in_channels": 2 * CHANNELS + 1,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 6,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT,
        "text_embed_2_dim": GLYPHS,
        "image_embed_dim": 12,
        "rope_axes_dim": (4, 6, 6),
        "target_size": 16,
        "task_type": "t2v",
    }
    vae = build(
        "AutoencoderKLHunyuanVideo15",
        seed,
        latent_channels=CHANNELS,
        block_out_channels=(16, 16, 16, 16, 16),
        layers_per_block=1,
    )
    pipe = assemble(
        "HunyuanVideo15Pipeline",
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        vae=vae,
        scheduler=scheduler or flow_euler(),
        transformer=build("HunyuanVideo15Transformer3DModel", seed, **{**defaults, **config}),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=guidance),
    )
    pipe.vision_num_semantic_tokens = 3
    return pipe


def _prompt(seed: int, batch: int, used: int, prefix: str) -> dict[str, Any]:
    return {
        f"{prefix}prompt_embeds": normal(batch, 8, TEXT, seed=seed, key=f"{prefix}prompt"),
        f"{prefix}prompt_embeds_mask": (torch.arange(8) < used).long().expand(batch, 8),
        f"{prefix}prompt_embeds_2": normal(batch, 4, GLYPHS, seed=seed, key=f"{prefix}glyphs"),
        f"{prefix}prompt_embeds_mask_2": (torch.arange(4) < 2).long().expand(batch, 4),
    }


def call(
    pipe: Any,
    steps: int = 6,
    seed: int = 0,
    batch: int = 1,
    size: tuple[int, ...] | None = None,
    guidance: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    if guidance is not None:
        raise ValueError("the guidance belongs to the guider: make(guidance=...)")
    height, width, frames = size or (64, 64, 5)
    shape = (batch, CHANNELS, (frames - 1) // 4 + 1, height // 16, width // 16)
    return {
        **_prompt(seed, batch, 7, ""),
        **_prompt(seed, batch, 5, "negative_"),
        "latents": normal(*shape, seed=seed, key="latents"),
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "output_type": "latent",
        **more,
    }


FAMILIES = (
    Family(
        "hunyuan15",
        make,
        call,
        ("cond", "uncond"),
        ("transformer_blocks",),
        (64, 96, 9),
        contexts=("pred_cond", "pred_uncond"),
        missing=missing("HunyuanVideo15Pipeline", "ClassifierFreeGuidance"),
    ),
)
