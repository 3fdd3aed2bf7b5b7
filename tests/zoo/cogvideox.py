"""CogVideoX: batched CFG, and a scheduler that keeps no step index."""

from __future__ import annotations

from typing import Any

import diffusers

from .base import Family, assemble, build, missing, normal

CHANNELS, TEXT = 4, 24


def make(seed: int = 0, scheduler: Any = None, **config: Any) -> Any:
    defaults = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "time_embed_dim": 16,
        "text_embed_dim": TEXT,
        "num_layers": 6,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 5,
        "max_text_seq_length": 7,
        "use_rotary_positional_embeddings": True,
    }
    return assemble(
        "CogVideoXPipeline",
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=build("CogVideoXTransformer3DModel", seed, **{**defaults, **config}),
        scheduler=scheduler
        or diffusers.CogVideoXDDIMScheduler(
            clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing"
        ),
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
    height, width, frames = size or (64, 64, 5)
    scale = 4.0 if guidance is None else guidance
    shape = (batch, (frames - 1) // 4 + 1, CHANNELS, height // 8, width // 8)
    kwargs = {
        "prompt_embeds": normal(batch, 7, TEXT, seed=seed, key="prompt"),
        "latents": normal(*shape, seed=seed, key="latents"),
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "max_sequence_length": 7,
        "output_type": "latent",
    }
    if scale > 1:
        kwargs["negative_prompt_embeds"] = normal(batch, 7, TEXT, seed=seed, key="negative")
    return {**kwargs, **more}


FAMILIES = (
    Family(
        "cogvideox",
        make,
        call,
        ("cond_uncond",),
        ("transformer_blocks",),
        (64, 96, 9),
        (1.0, ("cond",)),
        ("cond_uncond",),
        missing=missing("CogVideoXPipeline", "CogVideoXDDIMScheduler"),
    ),
)
