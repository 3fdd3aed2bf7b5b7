"""Videos."""

from __future__ import annotations

from typing import Any

import torch

from zoo.wan import CONFIG as WAN
from zoo.wan import TEXT as WIDE

from .base import TEXT, at, row, shape

VIDEO, WORDS, WAN_WORDS = shape(1, 4, 2, 8, 8), shape(1, 7, TEXT), shape(1, 7, WIDE)
FRAMES_FIRST = shape(1, 2, 4, 8, 8)
SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
STREAMS = "transformer_blocks"
OF_WAN = {"hidden_states": VIDEO, "encoder_hidden_states": WAN_WORDS, "timestep": at(900.0)}
ANYFLOW = {
    "hidden_states": FRAMES_FIRST,
    "timestep": torch.full((1, 2), 900.0),
    "r_timestep": torch.full((1, 2), 250.0),
    "encoder_hidden_states": WAN_WORDS,
}


def with_reference(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Wan-Animate 2: the pass over the driving video comes first and fills the store that all steps read."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    store, grid = WanAnimate2KVCache(len(model.blocks)), torch.tensor([[2, 2, 2]])
    reference = {name: [value[0][:, :2]] for name, value in given.items() if name in ("hidden_states", "condition_latents")}
    shared = {name: given[name] for name in ("encoder_hidden_states", "encoder_hidden_states_image")}
    with torch.no_grad():
        model(
            **reference, **shared, timestep=at(1.0), kv_cache=store, kv_cache_mode="extract", seq_len=8,
            offset_grid_sizes=grid,
        )  # fmt: skip
    return {**given, "kv_cache": store, "reference_grid_sizes": grid}


ROWS = (
    row(
        "Cosmos3OmniTransformer",
        "layers",
        {
            "head_dim": 6,
            "hidden_act": "relu2",
            "hidden_size": 12,
            "intermediate_size": 24,
            "latent_channel": 2,
            "latent_patch_size": 1,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "patch_latent_dim": 2,
            "qk_norm_for_text": False,
            "rope_axes_dim": [1, 1, 1],
            "vocab_size": 32,
        },
        {
            "input_ids": torch.tensor([1, 2, 3]),
            "text_indexes": torch.arange(3),
            "position_ids": torch.arange(19).expand(3, -1),
            "und_len": 3,
            "sequence_length": 19,
            "vision_tokens": [torch.linspace(-1, 1, 32).reshape(1, 2, 1, 4, 4)],
            "vision_token_shapes": [(1, 4, 4)],
            "vision_sequence_indexes": torch.arange(3, 19),
            "vision_mse_loss_indexes": torch.arange(3, 19),
            "vision_timesteps": torch.full((16,), 900.0),
            "vision_noisy_frame_indexes": [torch.tensor([0])],
        },
        time="vision_timesteps",
        stream="vision_tokens",
    ),
    row(
        "MiniMaxH3Transformer3DModel",
        STREAMS,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 24,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "ffn_dim": 32,
            "in_channels": 4,
            "audio_in_channels": 6,
            "text_dim": TEXT,
            "freq_dim": 8,
            "time_embed_hidden_dim": 24,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        {
            "hidden_states": shape(1, 8, 16),
            "audio_hidden_states": shape(1, 6, 6),
            "encoder_hidden_states": shape(1, 4, TEXT),
            "timestep": torch.tensor([0.9, 0.5]),
            "timestep_indices": torch.tensor([0] * 4 + [1] * 6 + [0] * 8),
            "token_tags": torch.tensor([1] * 4 + [2] * 6 + [0] * 8),
            "position_ids": torch.stack([torch.arange(18.0), torch.arange(18.0) % 4, torch.arange(18.0) % 2], 1),
            "video_indices": torch.arange(10, 18),
            "audio_indices": torch.arange(4, 10),
            "text_indices": torch.arange(4),
        },
    ),
    row(
        "WanAnimateTransformer3DModel",
        "blocks",
        {
            **WAN,
            "num_layers": 4,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 16,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        {
            "hidden_states": shape(1, 12, 3, 8, 8),
            "encoder_hidden_states": WAN_WORDS,
            "encoder_hidden_states_image": shape(1, 5, 16),
            "pose_hidden_states": shape(1, 4, 2, 8, 8),
            "face_pixel_values": shape(1, 3, 5, 16, 16),
            "timestep": at(900.0),
        },
    ),
    row(
        "WanAnimate2Transformer3DModel",
        "blocks",
        {
            "text_len": 7,
            "in_dim": 8,
            "dim": 32,
            "ffn_dim": 48,
            "freq_dim": 16,
            "text_dim": TEXT,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 3,
        },
        {
            "hidden_states": [torch.linspace(-1, 1, 192).reshape(4, 3, 4, 4)],
            "timestep": at(900.0),
            "encoder_hidden_states": [torch.linspace(-1, 1, 5 * TEXT).reshape(5, TEXT)],
            "condition_latents": [torch.ones(4, 3, 4, 4)],
            "encoder_hidden_states_image": shape(1, 5, 1280),
            "kv_cache_mode": "cached",
            "seq_len": 12,
            "origin_len": 5,
            "origin_area": [32, 32],
        },
        prepare=with_reference,
    ),
    row(
        "WanVACETransformer3DModel",
        "blocks",
        {**WAN, "num_layers": 4, "vace_layers": [0, 2], "vace_in_channels": 6},
        {**OF_WAN, "control_hidden_states": shape(1, 6, 2, 8, 8)},
    ),
    row("ChronoEditTransformer3DModel", "blocks", {**WAN, "num_layers": 3}, OF_WAN),
    row("SkyReelsV2Transformer3DModel", "blocks", {**WAN, "num_layers": 3}, OF_WAN),
    row(
        "HeliosTransformer3DModel",
        "blocks",
        {
            **{name: value for name, value in WAN.items() if name != "rope_max_seq_len"},
            "attention_head_dim": 12,
            "num_layers": 3,
            "rope_dim": (4, 4, 4),
        },
        {
            **OF_WAN,
            "indices_hidden_states": torch.tensor([[6.0, 7.0]]),
            "indices_latents_history_short": torch.tensor([[5.0]]),
            "indices_latents_history_mid": torch.tensor([[4.0]]),
            "indices_latents_history_long": torch.arange(4.0)[None],
            "latents_history_short": shape(1, 4, 1, 8, 8),
            "latents_history_mid": shape(1, 4, 1, 8, 8),
            "latents_history_long": shape(1, 4, 4, 8, 8),
        },
    ),
    row("AnyFlowTransformer3DModel", "blocks", {**WAN, "num_layers": 3}, ANYFLOW),
    row(
        "AnyFlowFARTransformer3DModel",
        "blocks",
        {**WAN, "num_layers": 3},
        {**ANYFLOW, "hidden_states": shape(1, 2, 4, 8, 8), "chunk_partition": [1, 1]},
    ),
    row(
        "CosmosTransformer3DModel",
        STREAMS,
        {
            **SMALL,
            "num_layers": 3,
            "mlp_ratio": 2,
            "text_embed_dim": TEXT,
            "adaln_lora_dim": 4,
            "max_size": (4, 16, 16),
            "concat_padding_mask": False,  # resizing the mask needs torchvision
        },
        {
            "hidden_states": VIDEO,
            "encoder_hidden_states": WORDS,
            "timestep": at(0.9),
            "fps": 16,
        },
    ),
    row(
        "EasyAnimateTransformer3DModel",
        STREAMS,
        {
            **SMALL,
            "patch_size": 2,
            "sample_width": 8,
            "sample_height": 8,
            "num_layers": 3,
            "mmdit_layers": 2,
            "time_embed_dim": 8,
            "text_embed_dim": TEXT,
        },
        {"hidden_states": VIDEO, "encoder_hidden_states": WORDS, "timestep": at(900.0)},
    ),
    row(
        "ConsisIDTransformer3DModel",
        STREAMS,
        {
            **SMALL,
            "attention_head_dim": 8,
            "time_embed_dim": 4,
            "text_embed_dim": TEXT,
            "num_layers": 4,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": 7,
            "cross_attn_interval": 2,
            "is_train_face": True,
            "cross_attn_dim_head": 4,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 6,
            "LFE_vit_dim": 6,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 2,
            "LFE_output_dim": 10,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        {
            "hidden_states": FRAMES_FIRST,
            "encoder_hidden_states": WORDS,
            "timestep": at(900.0),
            "id_vit_hidden": [torch.ones(1, 2, 6)],
            "id_cond": torch.ones(1, 6),
        },
    ),
    row(
        "LatteTransformer3DModel",
        "transformer_blocks temporal_transformer_blocks",
        {
            **SMALL,
            "attention_head_dim": 8,
            "num_layers": 2,
            "cross_attention_dim": 16,
            "sample_size": 8,
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "caption_channels": TEXT,
            "video_length": 2,
        },
        {"hidden_states": VIDEO, "encoder_hidden_states": WORDS, "timestep": at(900.0)},
    ),
    row(
        "Kandinsky6SRTransformer3DModel",
        "visual_transformer_blocks",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 8,
            "time_dim": 16,
            "patch_size": (1, 2, 2),
            "model_dim": 24,
            "ff_dim": 32,
            "num_visual_blocks": 3,
            "axes_dims": (4, 4, 4),
        },
        {"hidden_states": shape(1, 2, 16, 16, 9), "timestep": at(900.0)},
    ),
    row(
        "TransformerTemporalModel",
        STREAMS,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "num_layers": 3,
            "norm_num_groups": 2,
        },
        {"hidden_states": shape(2, 4, 8, 8), "timestep": at(900.0), "num_frames": 2},
    ),
)
