"""Calls a miniature's transformer as its pipeline does, for training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .specs import Spec
from .world import SIDE


def velocity(
    spec: Spec, transformer: nn.Module, noisy: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """What the transformer predicts, noise - data.

    Args:
        spec: which miniature.
        transformer: an instance of the class that `spec` names.
        noisy: latents as the pipeline holds them, `[B, 64, 12]` or `[B, 3, F, 16, 16]`.
        sigma: noise level of each sample, `[B]` in [0, 1].
        text: one vector a word, `[B, 4, 64]`.
    """
    inputs: dict[str, Any] = {
        "hidden_states": noisy,
        "timestep": sigma * spec.timestep_scale,
        "encoder_hidden_states": text,
        "return_dict": False,
    }
    half = SIDE // 2
    if spec.transformer == "QwenImageTransformer2DModel":
        inputs["img_shapes"] = [[(1, half, half)]] * len(noisy)
    if spec.transformer == "FluxTransformer2DModel":
        inputs["pooled_projections"] = text.mean(dim=1)
        inputs["txt_ids"] = torch.zeros(text.shape[1], 3)
        grid = torch.cartesian_prod(torch.arange(half), torch.arange(half))
        inputs["img_ids"] = nn.functional.pad(grid, (1, 0)).float()
    prediction: torch.Tensor = transformer(**inputs)[0]
    return prediction


def soft_start(spec: Spec, transformer: nn.Module) -> None:
    """Zeroes what adds to the residual stream, so that every block starts as the identity (adaLN-zero)."""
    endings = {
        "WanTransformer3DModel": ("time_proj", "attn2.to_out.0"),
        "QwenImageTransformer2DModel": ("img_mod.1", "txt_mod.1", "norm_out.linear"),
        "FluxTransformer2DModel": ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear"),
    }[spec.transformer] + ("proj_out",)
    for path, module in transformer.named_modules():
        inside_single = "single_transformer_blocks" in path and path.endswith("proj_out")
        if isinstance(module, nn.Linear) and path.endswith(endings) and not inside_single:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        table = getattr(module, "scale_shift_table", None)
        if isinstance(table, nn.Parameter) and table.shape[1] == 6:
            nn.init.zeros_(table)
