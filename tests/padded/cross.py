"""The picture looks at the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .base import LENGTH, Case, mask, times, values


def ltx(lengths: Sequence[int]) -> dict[str, Any]:
    batch = len(lengths)
    return {
        "hidden_states": values(batch, 32, 4, key="latents"),
        "encoder_hidden_states": values(batch, LENGTH, 16, key="text"),
        "timestep": times(lengths, 500.0),
        "encoder_attention_mask": mask(lengths, torch.long),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }


LTX2 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 2,
    "caption_channels": 16,
    "rope_double_precision": False,
}


def ltx2(lengths: Sequence[int]) -> dict[str, Any]:
    batch = len(lengths)
    return {
        **ltx(lengths),
        "audio_hidden_states": values(batch, 8, 4, key="sound"),
        "audio_encoder_hidden_states": values(batch, LENGTH, 16, key="text of sound"),
        "audio_encoder_attention_mask": mask([length - 2 for length in lengths], torch.long),
        "fps": 25.0,
        "audio_num_frames": 8,
    }


def picture(lengths: Sequence[int]) -> dict[str, Any]:
    batch = len(lengths)
    return {
        "hidden_states": values(batch, 4, 8, 8, key="latents"),
        "encoder_hidden_states": values(batch, LENGTH, 12, key="text"),
        "timestep": times(lengths, 500.0),
        "encoder_attention_mask": mask(lengths, torch.long),
    }


def video(lengths: Sequence[int]) -> dict[str, Any]:
    return {**picture(lengths), "hidden_states": values(len(lengths), 4, 2, 8, 8, key="latents")}


def pixart(lengths: Sequence[int]) -> dict[str, Any]:
    return {**picture(lengths), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def lumina(lengths: Sequence[int]) -> dict[str, Any]:
    given = picture(lengths)
    given["encoder_mask"] = given.pop("encoder_attention_mask")
    angles = torch.polar(torch.ones(384, 384, 8 // 2), values(384, 384, 8 // 2, key="angles"))
    return {**given, "image_rotary_emb": angles, "cross_attention_kwargs": {}}


def sana_wm(lengths: Sequence[int]) -> dict[str, Any]:
    given = video(lengths)
    text = given["encoder_hidden_states"][:, None]
    return {**given, "encoder_hidden_states": text, "timestep": torch.full((len(lengths), 1, 2), 500.0)}


def refiner(lengths: Sequence[int]) -> dict[str, Any]:
    batch = len(lengths)
    angles = values(batch, 32, 24, key="angles")
    return {
        "hidden_states": values(batch, 32, 4, key="latents"),
        "encoder_hidden_states": values(batch, LENGTH, 16, key="text"),
        "timestep": torch.full((batch, 32), 500.0),
        "video_rotary_emb": (angles.cos(), angles.sin()),
        "encoder_attention_mask": mask(lengths, torch.long),
    }


def kandinsky(lengths: Sequence[int]) -> dict[str, Any]:
    batch = len(lengths)
    return {
        "hidden_states": values(batch, 2, 8, 8, 4, key="latents"),
        "encoder_hidden_states": values(batch, LENGTH, 12, key="text"),
        "pooled_projections": values(batch, 8, key="pooled"),
        "timestep": times(lengths, 500.0),
        "encoder_attention_mask": mask(lengths),
    }


SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "mlp_ratio": 2.0,
    "sample_size": 8,
}
PLAIN = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "num_layers": 2,
    "cross_attention_dim": 12,
    "norm_num_groups": 2,
}

CASES = (
    Case(
        "LTXVideoTransformer3DModel",
        "transformer_ltx",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "cross_attention_dim": 24,
            "num_layers": 2,
            "caption_channels": 16,
        },
        ltx,
        ("transformer_blocks",),
    ),
    Case(
        "SanaWMTransformer3DModel",
        "transformer_sana_wm",
        {
            "in_channels": 4,
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "linear_head_dim": 16,
            "softmax_every_n": 2,
            "caption_channels": 12,
            "mlp_ratio": 2.0,
            "chunk_plucker_post_attn_blocks": 2,
            "image_size": 64,
        },
        sana_wm,
        ("blocks",),
        dtype=torch.float64,
    ),
    Case("SanaWMLTX2RefinerTransformer3DModel", "transformer_sana_wm_refiner", LTX2, refiner, ("transformer_blocks",)),
    Case("LTX2VideoTransformer3DModel", "transformer_ltx2", LTX2, ltx2, ("transformer_blocks",)),
    Case("SanaTransformer2DModel", "sana_transformer", SANA, picture, ("transformer_blocks",)),
    Case(
        "SanaVideoTransformer3DModel",
        "transformer_sana_video",
        {**SANA, "attention_head_dim": 12, "cross_attention_head_dim": 12, "cross_attention_dim": 24},
        video,
        ("transformer_blocks",),
    ),
    Case(
        "PixArtTransformer2DModel",
        "pixart_transformer_2d",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 16,
            "caption_channels": 12,
            "sample_size": 8,
            "use_additional_conditions": False,
        },
        pixart,
        ("transformer_blocks",),
    ),
    Case(
        "AllegroTransformer3DModel",
        "transformer_allegro",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "num_layers": 2,
            "cross_attention_dim": 48,
            "caption_channels": 12,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": 2,
        },
        video,
        ("transformer_blocks",),
    ),
    Case("DreamLiteTransformer2DModel", "transformer_2d_dreamlite", PLAIN, picture, ("transformer_blocks",)),
    Case("Transformer2DModel", "transformer_2d", PLAIN, picture, ("transformer_blocks",)),
    Case(
        "LuminaNextDiT2DModel",
        "lumina_nextdit2d",
        {
            "sample_size": 8,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "cross_attention_dim": 12,
            "learn_sigma": False,
        },
        lumina,
        ("layers",),
    ),
    Case(
        "Kandinsky6Transformer3DModel",
        "transformer_kandinsky6",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 12,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 48,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
            "visual_cond": False,
            "in_audio_dim": 4,
            "out_audio_dim": 4,
        },
        kandinsky,
        ("visual_transformer_blocks",),
    ),
)
