"""Ready pipelines of the miniatures, the arguments to call them with, and pictures of what they return."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiffusionPipeline

from .checkpoint import read_card, read_weights
from .latents import pack, unpack
from .specs import Spec, spec_of

SCHEDULERS = ("euler", "unipc", "dpm")
"""Samplers that `load_miniature` offers; the second is what Wan's full-size pipeline comes with."""

_VAE_FACTOR = 8
"""Pixels to a latent that a diffusers pipeline without a VAE assumes."""


def load_miniature(name: str, *, scheduler: str = "euler", dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """A trained miniature as a diffusers pipeline, ready to be called with `call_kwargs`.

    The pipeline has no VAE and no text encoder: its latents are pixels in [-1, 1], and captions come in as word
    vectors.

    Args:
        name: "wan", "qwen", "emoji" or "flux".
        scheduler: "euler" (flow-matching Euler); "unipc" (UniPC of order 2), for others than "wan" from the diffusers
            on whose UniPC takes a pipeline's own noise levels; or for "wan" alone "dpm" (DPM-Solver++ of order 2).
        dtype: of the weights, which are stored as float16; modules that the class keeps in float32 stay so.

    Returns:
        A new pipeline on the CPU, in evaluation mode, without a progress bar; nothing is shared with another one.

    Raises:
        ValueError: unknown name or scheduler, or a scheduler that the pipeline does not take.

    Example:
        >>> pipe = load_miniature("qwen")
        >>> out = pipe(**call_kwargs("qwen", "large red circle left", steps=4))
        >>> to_frames("qwen", out).shape
        (1, 1, 16, 16, 3)
    """
    spec = spec_of(name)
    card = read_card(name)
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in card["config"].items()}
    transformer = getattr(diffusers, card["transformer"])(**config)
    prefix = "transformer."
    weights = {key.removeprefix(prefix): value for key, value in read_weights(name).items() if key.startswith(prefix)}
    transformer.load_state_dict(weights)
    _cast(transformer, dtype)
    transformer.eval().requires_grad_(False)
    parts: dict[str, Any] = {"vae": None, "text_encoder": None, "tokenizer": None}
    if spec.pipeline == "FluxPipeline":
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
    pipeline_class = getattr(diffusers, card["pipeline"])
    pipe: DiffusionPipeline = pipeline_class(transformer=transformer, scheduler=_scheduler(name, scheduler), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_kwargs(
    name: str,
    caption: str | Sequence[str],
    *,
    seed: int = 0,
    steps: int = 50,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Everything a miniature's pipeline is called with: `pipe(**call_kwargs(name, caption))`.

    Args:
        name: "wan", "qwen", "emoji" or "flux".
        caption: one caption, or a batch of them; see `captions`.
        seed: of the starting noise; the noise of caption i of a batch is that of `seed + i` alone.
        steps: denoising steps.
        guidance: guidance scale; the miniature's usual one if None. 1 leaves the unconditional branch out; "flux" was
            trained for 1 alone and ignores the argument.
        size: height and width in pixels, multiples of the patch; None for the one that it was trained on, 16 x 16 or
            64 x 64.
        dtype: of the word vectors and the noise: that of the pipeline's weights.
        device: of the word vectors and the noise.

    Raises:
        ValueError: unknown name, or a caption that its world does not have.
    """
    spec = spec_of(name)
    batch = [caption] if isinstance(caption, str) else list(caption)
    table = word_vectors(name).to(device, dtype)
    rows = spec.world.rows(torch.stack([spec.world.parse(one) for one in batch]))
    embeds = table[rows.to(device)]
    empty = table[-1].expand_as(embeds).contiguous()
    size = size or (spec.world.side, spec.world.side)
    factor = _VAE_FACTOR * 2 // spec.patch  # the pipeline packs 2 x 2 of its latents
    arguments: dict[str, Any] = {
        "prompt_embeds": embeds,
        "latents": _noise(spec, len(batch), seed, size).to(device, dtype),
        "num_inference_steps": steps,
        "height": size[0] * factor,
        "width": size[1] * factor,
        "output_type": "latent",
    }
    return arguments | _branches(spec, embeds, empty, spec.guidance if guidance is None else guidance)


def captions(name: str, count: int, seed: int) -> list[str]:
    """Random captions of a miniature's world, such as "large red circle left"; the same for the same seed."""
    world = spec_of(name).world
    choices = world.choose(count, torch.Generator().manual_seed(seed))
    return [world.caption(choice) for choice in choices]


def to_frames(name: str, output: Any, size: tuple[int, int] | None = None) -> npt.NDArray[np.float32]:
    """Pixels of a pipeline's output.

    Args:
        name: which miniature's pipeline it was.
        output: what the pipeline returned (its output object, or the tuple that `return_dict=False` gives), or the
            latents themselves.
        size: height and width in pixels; None for the one that it was trained on.

    Returns:
        `[B, F, H, W, 3]` in [0, 1], float32; F is 1 for pictures.
    """
    latents = output if isinstance(output, torch.Tensor) else output[0]
    latents = latents.detach().float().cpu()
    spec = spec_of(name)
    size = size or (spec.world.side, spec.world.side)
    pixels = unpack(latents, size, spec.patch) if spec.packed else latents
    frames: npt.NDArray[np.float32] = (pixels.permute(0, 2, 3, 4, 1) / 2 + 0.5).clamp(0, 1).numpy()
    return frames


@lru_cache
def word_vectors(name: str) -> torch.Tensor:
    """The learned table of word vectors, `[words + 1, C]` float32; the last row is the empty caption's word."""
    return read_weights(name)["words.weight"].float()


def _cast(transformer: torch.nn.Module, dtype: torch.dtype) -> None:
    """Casts as `from_pretrained(torch_dtype=...)` does: what the class wants in float32 stays so."""
    kept = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    for path, parameter in transformer.named_parameters():
        if kept.isdisjoint(path.split(".")):
            parameter.data = parameter.data.to(dtype)


def _noise(spec: Spec, count: int, seed: int, size: tuple[int, int]) -> torch.Tensor:
    shape = (1, 3, spec.world.frames, *size)
    generators = [torch.Generator().manual_seed(seed + index) for index in range(count)]
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    return pack(noise, spec.patch) if spec.packed else noise


def _branches(spec: Spec, embeds: torch.Tensor, empty: torch.Tensor, guidance: float) -> dict[str, Any]:
    """The arguments that differ from pipeline to pipeline: guidance, masks, pooled vectors, frames."""
    if spec.pipeline == "FluxPipeline":
        return {"pooled_prompt_embeds": embeds.mean(dim=1)}
    if spec.pipeline == "WanPipeline":
        frames = {"num_frames": (spec.world.frames - 1) * 4 + 1, "guidance_scale": guidance}
        return frames | ({"negative_prompt_embeds": empty} if guidance > 1 else {})
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    given = {"true_cfg_scale": guidance, "prompt_embeds_mask": mask}
    if guidance > 1:
        given |= {"negative_prompt_embeds": empty, "negative_prompt_embeds_mask": mask.clone()}
    return given


def _scheduler(name: str, scheduler: str) -> Any:
    spec = spec_of(name)
    if scheduler not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {scheduler!r}; expected one of {', '.join(SCHEDULERS)}")
    euler = diffusers.FlowMatchEulerDiscreteScheduler(**read_card(name)["scheduler"])
    if scheduler == "euler":
        return euler
    kind = {"unipc": diffusers.UniPCMultistepScheduler, "dpm": diffusers.DPMSolverMultistepScheduler}[scheduler]
    if spec.pipeline == "WanPipeline":
        return kind(**spec.unipc)
    if "sigmas" not in inspect.signature(kind.set_timesteps).parameters:
        raise ValueError(
            f"{spec.pipeline} passes its own sigmas, which {kind.__name__} of diffusers {diffusers.__version__} does "
            f"not take; type load_miniature({name!r}) for Euler's method"
        )
    return kind.from_config(euler.config, prediction_type="flow_prediction", use_flow_sigmas=True)
