"""Denoising loops written by hand, as people write them, that do what a pipeline of the zoo does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sgl_diffusion_accel import branch, denoising_steps

Loop = Callable[..., torch.Tensor]


def wan(pipe: Any, call: dict[str, Any], told: bool = True) -> torch.Tensor:
    """Wan 2.1 and 2.2: two calls a step, with two experts where there are two."""
    scale, latents = call["guidance_scale"], call["latents"].clone()
    scheduler, boundary = pipe.scheduler, None
    scheduler.set_timesteps(call["num_inference_steps"])
    if pipe.config.get("boundary_ratio") is not None:
        boundary = pipe.config.boundary_ratio * scheduler.config.num_train_timesteps
    steps = scheduler.timesteps
    for t in denoising_steps(steps, scheduler, scale, boundary=boundary) if told else steps:
        model = pipe.transformer if boundary is None or t >= boundary else pipe.transformer_2
        outputs = {}
        for name, prompt in (("cond", "prompt_embeds"), ("uncond", "negative_prompt_embeds")):
            with torch.no_grad(), branch(name) if told else contextlib.nullcontext():
                outputs[name] = model(
                    hidden_states=latents,
                    timestep=t.expand(latents.shape[0]),
                    encoder_hidden_states=call[prompt],
                    return_dict=False,
                )[0]
        noise = outputs["uncond"] + scale * (outputs["cond"] - outputs["uncond"])
        latents = scheduler.step(noise, t, latents, return_dict=False)[0]
    return latents


def flux(pipe: Any, call: dict[str, Any], told: bool = True) -> torch.Tensor:
    """FLUX.1: one call a step."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    prompt, latents, scheduler = call["prompt_embeds"], call["latents"].clone(), pipe.scheduler
    height, width = call["height"] // 16, call["width"] // 16
    places = torch.zeros(height, width, 3)
    places[..., 1], places[..., 2] = torch.arange(height)[:, None], torch.arange(width)[None]
    count = call["num_inference_steps"]
    mu = calculate_shift(
        latents.shape[1], *(scheduler.config[f"{end}_image_seq_len"] for end in ("base", "max")),
        scheduler.config.base_shift, scheduler.config.max_shift,
    )  # fmt: skip
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / count, count), mu=mu)
    steps = scheduler.timesteps
    for t in denoising_steps(steps, scheduler=scheduler, guidance=1.0) if told else steps:
        with torch.no_grad():
            noise = pipe.transformer(
                hidden_states=latents,
                timestep=t.expand(1) / 1000,
                guidance=torch.full([1], call["guidance_scale"]),
                pooled_projections=call["pooled_prompt_embeds"],
                encoder_hidden_states=prompt,
                txt_ids=torch.zeros(prompt.shape[1], 3),
                img_ids=places.reshape(-1, 3),
                return_dict=False,
            )[0]
        latents = scheduler.step(noise, t, latents, return_dict=False)[0]
    return latents


LOOPS: dict[str, Loop] = {"wan": wan, "wan22": wan, "flux": flux}
"""Family to its loop."""
