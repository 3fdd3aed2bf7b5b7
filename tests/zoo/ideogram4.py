"""Ideogram 4: a second denoiser for the branch without the prompt; the first one sees text and picture together."""

from __future__ import annotations

from typing import Any

import torch

from .base import Family, assemble, build, flow_euler, missing, normal

CHANNELS, TEXT, TOKENS, LONGEST = 16, 24, 7, 8


def transformer(seed: int, **config: Any) -> Any:
    defaults = {
        "in_channels": CHANNELS,
        "num_layers": 6,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "adaln_dim": 16,
        "llm_features_dim": TEXT,
        "rope_theta": 10000,
        "mrope_section": (4, 2, 2),
    }
    return build("Ideogram4Transformer2DModel", seed, gain=0.6, **{**defaults, **config})


def make(seed: int = 0, scheduler: Any = None, **config: Any) -> Any:
    pipe = assemble(
        "Ideogram4Pipeline",
        scheduler=scheduler or flow_euler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer(seed, **config),
        unconditional_transformer=transformer(seed + 1000, **config),
    )
    layout = pipe._prepare_ids

    def encode_prompt(prompt: Any, grid_h: int, grid_w: int, max_sequence_length: int, device: Any) -> Any:
        """In the place of the text encoder, which the pipeline has no argument to go without."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        embeds = torch.zeros(len(prompts), max_sequence_length + grid_h * grid_w, TEXT)
        for index, each in enumerate(prompts):
            embeds[index, max_sequence_length - TOKENS : max_sequence_length] = normal(TOKENS, TEXT, seed=0, key=each)
        return embeds, *layout([TOKENS] * len(prompts), grid_h, grid_w, max_sequence_length, device)

    pipe.encode_prompt = encode_prompt
    return pipe


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
    return {
        "prompt": [f"prompt {seed} {index}" for index in range(batch)],
        "latents": normal(batch, height // 16 * (width // 16), CHANNELS, seed=seed, key="latents"),
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": 4.0 if guidance is None else guidance,
        "guidance_schedule": None,
        "max_sequence_length": LONGEST,
        "std": 1.0,
        "output_type": "latent",
        **more,
    }


FAMILIES = (
    Family(
        "ideogram4",
        make,
        call,
        ("cond", "uncond"),
        ("layers",),
        transformers=("transformer", "unconditional_transformer"),
        model_per_branch=True,
        missing=missing("Ideogram4Pipeline"),
    ),
)
