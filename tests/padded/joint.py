"""Text and picture in one attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .base import LENGTH, Case, mask, times, values

BOTH = ("transformer_blocks", "single_transformer_blocks")


def hunyuan_video(lengths: Sequence[int]) -> dict[str, Any]:
    batch = len(lengths)
    return {
        "hidden_states": values(batch, 4, 3, 6, 6, key="latents"),
        "timestep": times(lengths, 500.0),
        "encoder_hidden_states": values(batch, LENGTH, 16, key="text"),
        "encoder_attention_mask": mask(lengths, torch.float32),
        "pooled_projections": values(batch, 8, key="pooled"),
        "guidance": times(lengths, 6000.0),
    }


HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}


def framepack(lengths: Sequence[int]) -> dict[str, Any]:
    batch = len(lengths)
    return {
        **hunyuan_video(lengths),
        "hidden_states": values(batch, 4, 3, 8, 8, key="latents"),
        "image_embeds": values(batch, 5, 12, key="image"),
        "indices_latents": torch.arange(9, 12),
        "latents_clean": values(batch, 4, 2, 8, 8, key="clean"),
        "indices_latents_clean": torch.tensor([0, 8]),
        "latents_history_2x": values(batch, 4, 2, 8, 8, key="history"),
        "indices_latents_history_2x": torch.tensor([6, 7]),
        "latents_history_4x": values(batch, 4, 4, 8, 8, key="old history"),
        "indices_latents_history_4x": torch.arange(2, 6),
    }


def hunyuan_video15(lengths: Sequence[int], glyphs: Sequence[int] | None = None, image: bool = False) -> dict[str, Any]:
    batch = len(lengths)
    glyphs = [max(length - 6, 0) for length in lengths] if glyphs is None else glyphs
    pictures = values(batch, 7, 10, key="image")
    return {
        "hidden_states": values(batch, 9, 3, 6, 6, key="latents"),
        "timestep": times(lengths, 500.0),
        "encoder_hidden_states": values(batch, LENGTH, 16, key="text"),
        "encoder_attention_mask": mask(lengths, torch.float32),
        "encoder_hidden_states_2": values(batch, 10, 12, key="glyphs"),
        "encoder_attention_mask_2": mask(glyphs, torch.float32, 10),
        "image_embeds": pictures if image else torch.zeros_like(pictures),
    }


def hunyuan_image(lengths: Sequence[int]) -> dict[str, Any]:
    batch = len(lengths)
    return {
        "hidden_states": values(batch, 4, 8, 8, key="latents"),
        "timestep": times(lengths, 500.0),
        "encoder_hidden_states": values(batch, LENGTH, 16, key="text"),
        "encoder_attention_mask": mask(lengths, torch.long),
        "encoder_hidden_states_2": values(batch, 10, 12, key="glyphs"),
        "encoder_attention_mask_2": mask([length - 6 for length in lengths], torch.long, 10),
    }


def ideogram(lengths: Sequence[int]) -> dict[str, Any]:
    """Padded on the left, and the picture behind the text, as its pipeline lays it out."""
    batch, pixels = len(lengths), 16
    total = LENGTH + pixels
    indicator = torch.zeros(batch, total).long()
    segments = torch.full((batch, total), -1).long()
    positions = torch.zeros(batch, total, 3).long()
    side = torch.arange(4)
    for index, length in enumerate(lengths):
        start = LENGTH - length
        indicator[index, start:LENGTH], indicator[index, LENGTH:] = 3, 2
        segments[index, start:] = 1
        positions[index, start:LENGTH] = torch.arange(length)[:, None]
        positions[index, LENGTH:, 0] = length
        positions[index, LENGTH:, 1] = side.repeat_interleave(4) + length
        positions[index, LENGTH:, 2] = side.repeat(4) + length
    return {
        "hidden_states": values(batch, total, 4, key="latents"),
        "timestep": times(lengths, 0.5),
        "encoder_hidden_states": values(batch, total, 20, key="text"),
        "position_ids": positions,
        "segment_ids": segments,
        "indicator": indicator,
    }


def krea(lengths: Sequence[int]) -> dict[str, Any]:
    """What counts is at both ends: the prompt, padding, and the end of the template."""
    batch, side = len(lengths), torch.arange(4)
    counts = mask([length - 3 for length in lengths])
    counts[:, -3:] = True
    picture = torch.stack([torch.zeros(16), side.repeat_interleave(4), side.repeat(4)], 1)
    return {
        "hidden_states": values(batch, 16, 4, key="latents"),
        "encoder_hidden_states": values(batch, LENGTH, 3, 16, key="text"),
        "timestep": times(lengths, 0.5),
        "position_ids": torch.cat([torch.zeros(LENGTH, 3), picture]),
        "encoder_attention_mask": counts,
    }


def motif(lengths: Sequence[int]) -> dict[str, Any]:
    batch = len(lengths)
    return {
        "hidden_states": values(batch, 4, 2, 8, 8, key="latents"),
        "timestep": times(lengths, 500.0),
        "encoder_hidden_states": values(batch, LENGTH, 12, key="text"),
        "encoder_attention_mask": mask(lengths),
        "image_embeds": values(batch, 5, 10, key="image"),
    }


def prx(lengths: Sequence[int]) -> dict[str, Any]:
    batch = len(lengths)
    return {
        "hidden_states": values(batch, 4, 16, 16, key="latents"),
        "timestep": times(lengths, 0.5),
        "encoder_hidden_states": values(batch, LENGTH, 12, key="text"),
        "attention_mask": mask(lengths),
    }


def ernie(lengths: Sequence[int]) -> dict[str, Any]:
    """Its pipeline pads to the longest of a batch."""
    batch = len(lengths)
    return {
        "hidden_states": values(batch, 4, 8, 8, key="latents"),
        "timestep": times(lengths, 500.0),
        "text_bth": values(batch, LENGTH, 12, key="text"),
        "text_lens": torch.tensor(lengths),
    }


def qwen(lengths: Sequence[int]) -> dict[str, Any]:
    batch = len(lengths)
    return {
        "hidden_states": values(batch, 64, 16, key="latents"),
        "encoder_hidden_states": values(batch, LENGTH, 16, key="text"),
        "encoder_hidden_states_mask": mask(lengths),
        "timestep": times(lengths, 0.5),
        "img_shapes": [[(1, 8, 8)]] * batch,
    }


def nucleus(lengths: Sequence[int]) -> dict[str, Any]:
    return {**qwen(lengths), "img_shapes": [(1, 8, 8)] * len(lengths)}


def joyimage(lengths: Sequence[int]) -> dict[str, Any]:
    """In a batch, pictures of several sizes."""
    batch = len(lengths)
    shapes = [[(1, 2, 4), (1, 4, 4)], [(1, 4, 4)]][:batch]
    return {
        "hidden_states": values(batch, 24, 4, 1, 2, 2, key="latents"),
        "timestep": times(lengths, 500.0),
        "encoder_hidden_states": values(batch, LENGTH, 16, key="text"),
        "encoder_hidden_states_mask": mask(lengths, torch.float32),
        "shape_list": shapes,
    }


def lumina2(lengths: Sequence[int]) -> dict[str, Any]:
    batch = len(lengths)
    return {
        "hidden_states": values(batch, 4, 16, 16, key="latents"),
        "timestep": times(lengths, 0.5),
        "encoder_hidden_states": values(batch, LENGTH, 12, key="text"),
        "encoder_attention_mask": mask(lengths, torch.long),
    }


def fibo(lengths: Sequence[int]) -> dict[str, Any]:
    """A bundle of text for the gist, and one for the layer that reads one."""
    batch = len(lengths)
    return {
        "hidden_states": values(batch, 4, 8, 8, key="latents"),
        "timestep": times(lengths, 0.5),
        "encoder_hidden_states": values(batch, 2, LENGTH, 12, key="text"),
        "encoder_attention_mask": mask(lengths),
    }


def mochi(lengths: Sequence[int]) -> dict[str, Any]:
    batch = len(lengths)
    return {
        "hidden_states": values(batch, 4, 2, 8, 8, key="latents"),
        "encoder_hidden_states": values(batch, LENGTH, 16, key="text"),
        "timestep": times(lengths, 500.0),
        "encoder_attention_mask": mask(lengths),
    }


CASES = (
    Case("HunyuanVideoTransformer3DModel", "transformer_hunyuan_video", HUNYUAN, hunyuan_video, BOTH),
    Case(
        "HunyuanVideoFramepackTransformer3DModel",
        "transformer_hunyuan_video_framepack",
        {**HUNYUAN, "patch_size": 2, "has_image_proj": True, "image_proj_dim": 12, "has_clean_x_embedder": True},
        framepack,
        BOTH,
    ),
    Case(
        "HunyuanVideo15Transformer3DModel",
        "transformer_hunyuan_video15",
        {
            "in_channels": 9,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 12,
            "image_embed_dim": 10,
            "rope_axes_dim": (4, 6, 6),
            "target_size": 16,
        },
        hunyuan_video15,
        ("transformer_blocks",),
    ),
    Case(
        "HunyuanImageTransformer2DModel",
        "transformer_hunyuanimage",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 12,
            "rope_axes_dim": (8, 8),
        },
        hunyuan_image,
        BOTH,
    ),
    Case(
        "Ideogram4Transformer2DModel",
        "transformer_ideogram4",
        {
            "in_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "adaln_dim": 8,
            "llm_features_dim": 20,
            "mrope_section": (4, 2, 2),
            "rope_theta": 10000,
        },
        ideogram,
        ("layers",),
        gain=0.6,
        unread=LENGTH,
    ),
    Case(
        "Krea2Transformer2DModel",
        "transformer_krea2",
        {
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 48,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 16,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 24,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 6, 6),
        },
        krea,
        ("transformer_blocks",),
    ),
    Case(
        "MotifVideoTransformer3DModel",
        "transformer_motif_video",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 3,
            "num_decoder_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": 12,
            "image_embed_dim": 10,
            "rope_axes_dim": (4, 6, 6),
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        motif,
        BOTH,
    ),
    Case(
        "PRXTransformer2DModel",
        "transformer_prx",
        {
            "in_channels": 4,
            "context_in_dim": 12,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        prx,
        ("blocks",),
    ),
    Case(
        "ErnieImageTransformer2DModel",
        "transformer_ernie_image",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 48,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 1,
            "text_in_dim": 12,
            "rope_axes_dim": (4, 6, 6),
        },
        ernie,
        ("layers",),
    ),
    Case(
        "QwenImageTransformer2DModel",
        "transformer_qwenimage",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 6, 6),
        },
        qwen,
        ("transformer_blocks",),
    ),
    Case(
        "NucleusMoEImageTransformer2DModel",
        "transformer_nucleusmoe_image",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 6, 6),
            "mlp_ratio": 2.0,
            "dense_moe_strategy": "all_moe",
            "num_experts": 4,
            "moe_intermediate_dim": 16,
            "capacity_factors": 2.0,
        },
        nucleus,
        ("transformer_blocks",),
    ),
    Case(
        "JoyImageEditPlusTransformer3DModel",
        "transformer_joyimage_edit_plus",
        {
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 16,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
        },
        joyimage,
        ("double_blocks",),
    ),
    Case(
        "Lumina2Transformer2DModel",
        "transformer_lumina2",
        {
            "sample_size": 16,
            "in_channels": 4,
            "hidden_size": 48,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (8, 8, 8),
            "axes_lens": (64, 16, 16),
            "cap_feat_dim": 12,
        },
        lumina2,
        ("layers",),
    ),
    Case(
        "MochiTransformer3DModel",
        "transformer_mochi",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": LENGTH,
        },
        mochi,
        ("transformer_blocks",),
    ),
    Case(
        "BriaFibo2Transformer2DModel",
        "transformer_bria_fibo2",
        {
            "in_channels": 4,
            "dim": 96,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 12,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": LENGTH,
            "axes_dims": (16, 16, 16),
            "axes_lens": (64, 32, 32),
        },
        fibo,
        ("layers",),
    ),
)
