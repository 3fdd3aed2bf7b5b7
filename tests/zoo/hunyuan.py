"""HunyuanVideo: two block lists, a padded prompt with its mask, embedded guidance."""

from __future__ import annotations

from typing import Any

import torch

from .base import Family, assemble, build, flow_euler, missing, normal

CHANNELS, TEXT, POOLED = 4, 24, 20


def make(seed: int = 0, scheduler: Any = None, **config: Any) -> Any:
    defaults = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 4,
        "num_single_layers": 6,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT,
        "pooled_projection_dim": POOLED,
        "rope_axes_dim": (4, 6, 6),
    }
    return assemble(
        "HunyuanVideoPipeline",
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        vae=None,
        scheduler=scheduler or flow_euler(),
        transformer=build("HunyuanVideoTransformer3DModel", seed, **{**defaults, **config}),
    )


def _mask(batch: int, tokens: int, used: int) -> torch.Tensor:
    return (torch.arange(tokens) < used).long().expand(batch, tokens)


def call(
    pipe: Any,
    steps: int = 6,
    seed: int = 0,
    batch: int = 1,
    size: tuple[int, ...] | None = None,
    guidance: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """`guidance` above 1 turns true CFG on; the embedded guidance stays."""
    height, width, frames = size or (64, 64, 5)
    shape = (batch, CHANNELS, (frames - 1) // 4 + 1, height // 8, width // 8)
    kwargs = {
        "prompt_embeds": normal(batch, 8, TEXT, seed=seed, key="prompt"),
        "pooled_prompt_embeds": normal(batch, POOLED, seed=seed, key="pooled"),
        "prompt_attention_mask": _mask(batch, 8, 7),
        "latents": normal(*shape, seed=seed, key="latents"),
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": 6.0,
        "output_type": "latent",
    }
    if guidance is not None and guidance > 1:
        kwargs["true_cfg_scale"] = guidance
        kwargs["negative_prompt_embeds"] = normal(batch, 8, TEXT, seed=seed, key="negative")
        kwargs["negative_pooled_prompt_embeds"] = normal(batch, POOLED, seed=seed, key="negative pooled")
        kwargs["negative_prompt_attention_mask"] = _mask(batch, 8, 5)
    return {**kwargs, **more}


FAMILIES = (
    Family(
        "hunyuan",
        make,
        call,
        ("cond",),
        ("transformer_blocks", "single_transformer_blocks"),
        (64, 96, 9),
        (3.0, ("cond", "uncond")),
        ("cond", "uncond"),
        missing=missing("HunyuanVideoPipeline"),
    ),
)
