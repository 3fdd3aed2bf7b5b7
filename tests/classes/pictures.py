"""Pictures."""

from __future__ import annotations

import torch

from .base import TEXT, at, places, row, shape

PICTURE, TOKENS, WORDS = shape(1, 4, 8, 8), shape(1, 16, 4), shape(1, 7, TEXT)
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
SMALL = {"in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8}
BRIA = {
    **HEADS,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "joint_attention_dim": TEXT,
    "axes_dims_rope": [4, 6, 6],
}
LAID_OUT = {"img_ids": places(4, 4), "txt_ids": torch.zeros(7, 3)}
SIZES = {name: torch.tensor([[8.0, 8.0]]) for name in ("original_size", "target_size", "crop_coords")}
COGVIEW = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "text_embed_dim": TEXT,
    "time_embed_dim": 16,
    "condition_dim": 4,
}
STREAMS = "transformer_blocks"
BOTH = "transformer_blocks single_transformer_blocks"

ROWS = (
    row(
        "QwenImage21Transformer2DModel",
        STREAMS,
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "context_in_dim": TEXT,
            "mlp_ratio": 2,
            "axes_dims_rope": (4, 6, 6),
        },
        {
            "hidden_states": TOKENS,
            "encoder_hidden_states": WORDS,
            "encoder_hidden_states_mask": torch.ones(1, 7, dtype=torch.long),
            "timestep": at(1.0),
            "img_shapes": [[(1, 4, 4)]],
            "img_mask": torch.arange(11)[None] >= 7,
        },
    ),
    row(
        "Flux3Transformer2DModel",
        "single_transformer_blocks",
        {
            **HEADS,
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 3,
            "joint_attention_dim": TEXT,
            "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        {
            "hidden_states": TOKENS,
            "encoder_hidden_states": WORDS,
            "timestep": at(1.0),
            "img_ids": places(4, 4, axes=4),
            "txt_ids": places(7, axes=4),
            "image_cond_hidden_states": TOKENS,
            "image_cond_ids": places(4, 4, axes=4),
        },
    ),
    row(
        "GlmImageTransformer2DModel",
        STREAMS,
        {**SMALL, **COGVIEW, "prior_vq_quantizer_codebook_size": 64},
        {
            "hidden_states": PICTURE,
            "encoder_hidden_states": WORDS,
            "prior_token_id": torch.arange(16)[None],
            "prior_token_drop": torch.zeros(1, dtype=torch.bool),
            "timestep": at(900.0),
            "target_size": torch.tensor([[8.0, 8.0]]),
            "crop_coords": torch.tensor([[0.0, 0.0]]),
        },
    ),
    row(
        "JoyImageEditTransformer3DModel",
        "double_blocks",
        {
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": TEXT,
            "num_layers": 3,
            "rope_dim_list": [4, 6, 6],
        },
        {"hidden_states": shape(1, 2, 4, 1, 8, 8), "encoder_hidden_states": WORDS, "timestep": at(900.0)},
    ),
    row(
        "OmniGenTransformer2DModel",
        "layers",
        {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 24,
            "num_layers": 3,
            "pad_token_id": 0,
            "vocab_size": 32,
            "time_step_dim": 4,
            "rope_scaling": {"long_factor": [1, 2, 3, 4], "short_factor": [1, 2, 3, 4]},
        },
        {
            "hidden_states": PICTURE,
            "timestep": at(1.0),
            "input_ids": torch.arange(24)[None],
            "input_img_latents": [torch.ones(1, 4, 8, 8)],
            "input_image_sizes": {0: [[0, 16]]},
            "attention_mask": torch.ones(1, 41, 41),
            "position_ids": torch.arange(41)[None],
        },
    ),
    row(
        "HiDreamImageTransformer2DModel",
        "double_stream_blocks single_stream_blocks",
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_channels": [8, 4],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (8, 8),
            "llama_layers": (0, 1, 0, 1),
            "force_inference_output": True,
        },
        {
            "hidden_states": PICTURE,
            "encoder_hidden_states_t5": shape(1, 7, 8),
            "encoder_hidden_states_llama3": shape(2, 1, 7, 4),
            "pooled_embeds": shape(1, 8),
            "timesteps": at(900.0),
        },
        time="timesteps",
    ),
    row(
        "BriaTransformer2DModel",
        BOTH,
        BRIA,
        {"hidden_states": TOKENS, "encoder_hidden_states": WORDS, "timestep": at(900.0), **LAID_OUT},
    ),
    row(
        "BriaFiboTransformer2DModel",
        BOTH,
        {**BRIA, "text_encoder_dim": 12},
        {
            "hidden_states": TOKENS,
            "encoder_hidden_states": WORDS,
            "text_encoder_layers": [torch.full((1, 7, 12), 0.1 * (i + 1)) for i in range(5)],
            "timestep": at(900.0),
            **LAID_OUT,
        },
    ),
    row(
        "AuraFlowTransformer2DModel",
        "joint_transformer_blocks single_transformer_blocks",
        {
            **SMALL,
            "sample_size": 8,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 3,
            "joint_attention_dim": TEXT,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 16,
        },
        {"hidden_states": PICTURE, "encoder_hidden_states": WORDS, "timestep": at(1.0)},
    ),
    row(
        "CogView3PlusTransformer2DModel",
        STREAMS,
        {**SMALL, **COGVIEW, "pos_embed_max_size": 8, "sample_size": 8},
        {"hidden_states": PICTURE, "encoder_hidden_states": WORDS, "timestep": at(900.0), **SIZES},
    ),
    row(
        "CogView4Transformer2DModel",
        STREAMS,
        {**HEADS, **COGVIEW, "sample_size": 8, "rope_axes_dim": (16, 16)},
        {"hidden_states": PICTURE, "encoder_hidden_states": WORDS, "timestep": at(900.0), **SIZES},
    ),
    row(
        "DiTTransformer2DModel",
        STREAMS,
        {**SMALL, "out_channels": 8, "num_layers": 3, "sample_size": 8},
        {"hidden_states": PICTURE, "timestep": torch.tensor([900]), "class_labels": torch.tensor([7])},
    ),
    row(
        "HunyuanDiT2DModel",
        "blocks",
        {
            **SMALL,
            "sample_size": 8,
            "patch_size": 2,
            "num_layers": 6,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": 4,
            "text_len_t5": 4,
        },
        {
            "hidden_states": PICTURE,
            "encoder_hidden_states": shape(1, 4, 8),
            "text_embedding_mask": torch.ones(1, 4),
            "encoder_hidden_states_t5": shape(1, 4, 8),
            "text_embedding_mask_t5": torch.ones(1, 4),
            "timestep": at(900.0),
            "image_meta_size": torch.tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]]),
            "style": torch.zeros(1, dtype=torch.long),
            "image_rotary_emb": (torch.ones(16, 8), torch.zeros(16, 8)),
        },
    ),
    row(
        "PriorTransformer",
        STREAMS,
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "embedding_dim": 8, "num_embeddings": 7},
        {
            "hidden_states": shape(1, 8),
            "timestep": at(900.0),
            "proj_embedding": shape(1, 8),
            "encoder_hidden_states": shape(1, 7, 8),
        },
    ),
)
