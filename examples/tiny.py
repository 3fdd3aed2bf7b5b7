"""Tiny pipelines with random weights, of the classes that the real models have: they show steps, and no picture.

They have no text encoder, so that a prompt comes in as embeddings, which depend on its words.
"""

from __future__ import annotations

import argparse
import zlib
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from .common import Job

TEXT, POOLED, GLYPHS = 24, 20, 20
CHANNELS = 4


def hunyuan_video(given: argparse.Namespace) -> Job:
    """HunyuanVideo: a prompt of 7 tokens and one of padding, guidance as an input of the model."""
    transformer = seeded(
        diffusers.HunyuanVideoTransformer3DModel,
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_single_layers=4, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=TEXT, pooled_projection_dim=POOLED,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    pipe = diffusers.HunyuanVideoPipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), vae=None,
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    call = {
        "prompt_embeds": embeddings(given.prompt, 8, TEXT), "prompt_attention_mask": mask(8, 7),
        "pooled_prompt_embeds": embeddings(given.prompt, POOLED),
        "height": 64, "width": 64, "num_frames": 5, "num_inference_steps": given.steps or 30,
    }  # fmt: skip
    return _job(pipe, call)


def hunyuan_video_15(given: argparse.Namespace) -> Job:
    """HunyuanVideo 1.5: tokens of two text encoders, most of them padding; guidance by two calls in each step."""
    transformer = seeded(
        diffusers.HunyuanVideo15Transformer3DModel,
        in_channels=2 * CHANNELS + 1, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=16,
        num_layers=4, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=TEXT, text_embed_2_dim=GLYPHS,
        image_embed_dim=12, rope_axes_dim=(4, 6, 6), target_size=16, task_type="t2v",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=CHANNELS, block_out_channels=(16,) * 5, layers_per_block=1
    )
    pipe = diffusers.HunyuanVideo15Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), vae=vae.eval(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
    )  # fmt: skip
    pipe.vision_num_semantic_tokens = 3
    call: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": given.steps or 50}
    for prefix, text, used in (("", given.prompt, 7), ("negative_", "", 2)):
        call |= {
            f"{prefix}prompt_embeds": embeddings(text, 24, TEXT), f"{prefix}prompt_embeds_mask": mask(24, used),
            f"{prefix}prompt_embeds_2": embeddings(text, 8, GLYPHS), f"{prefix}prompt_embeds_mask_2": mask(8, 1),
        }  # fmt: skip
    return _job(pipe, call)


def z_image(given: argparse.Namespace, steps: int, guidance: float) -> Job:
    """Z-Image: prompts as lists, and guidance as one call for both."""
    transformer = seeded(
        diffusers.ZImageTransformer2DModel,
        in_channels=CHANNELS, dim=32, n_layers=6, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=TEXT,
        axes_dims=[4, 6, 6], axes_lens=[128, 32, 32],
    )  # fmt: skip
    for layer in (transformer.t_embedder.mlp[0], transformer.t_embedder.mlp[2]):
        layer.weight.mul_(0.25)  # so that neighbouring steps resemble each other, as they do in trained models
    pipe = diffusers.ZImagePipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None, text_encoder=None, tokenizer=None,
    )  # fmt: skip
    call = {"prompt_embeds": [embeddings(given.prompt, 7, TEXT)[0]], "height": 64, "width": 64}
    call |= {"num_inference_steps": steps, "guidance_scale": guidance}
    if guidance > 0:
        call["negative_prompt_embeds"] = [embeddings("", 5, TEXT)[0]]
    return _job(pipe, call)


def seeded(model: Any, **config: Any) -> Any:
    """A model with random weights, the same ones each time, those that begin at zero included."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        made: nn.Module = model(**config)
        for parameter in made.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return made.eval().requires_grad_(False)


def embeddings(text: str | None, *shape: int) -> Tensor:
    """In place of a text encoder: random numbers `[1, *shape]` that depend on the words."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(text).encode()))
    return torch.randn(1, *shape, generator=generator)


def mask(tokens: int, used: int) -> Tensor:
    """Ones for the tokens of the prompt, `[1, tokens]`, and zeros for its padding."""
    return (torch.arange(tokens) < used).long()[None]


def _job(pipe: Any, call: dict[str, Any]) -> Job:
    torch.set_num_threads(1)  # models as small as this lose time to a second thread
    pipe.set_progress_bar_config(disable=True)
    return Job(pipe, call | {"output_type": "latent"}, pixels)


def pixels(output: Any) -> Any:
    """The first three channels of latents as colours: `[B, F, H, W, 3]` in [0, 1]."""
    latents = output[0] if output[0].ndim == 5 else output[0][:, :, None]
    return (latents[:, :3].permute(0, 2, 3, 4, 1).float() / 6 + 0.5).clamp(0, 1).numpy()
