"""Sound, music and proteins."""

from __future__ import annotations

import torch

from .base import TEXT, at, row, shape

WORDS = shape(1, 7, TEXT)
STREAMS = "transformer_blocks"

ROWS = (
    row(
        "AceStepTransformer1DModel",
        "layers",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "sliding_window": 16,
        },
        {
            "hidden_states": shape(1, 8, 8),
            "timestep": at(0.9),
            "timestep_r": at(0.5),
            "encoder_hidden_states": shape(1, 10, 32),
            "context_latents": shape(1, 8, 16),
        },
    ),
    row(
        "StableAudioDiTModel",
        STREAMS,
        {
            "in_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 2,
            "out_channels": 4,
            "cross_attention_dim": 16,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": TEXT,
        },
        {
            "hidden_states": shape(1, 4, 8),
            "timestep": at(0.9),
            "encoder_hidden_states": WORDS,
            "global_hidden_states": shape(1, 1, 8),
        },
    ),
    row(
        "StableAudio3DiTModel",
        STREAMS,
        {
            "io_channels": 8,
            "embed_dim": 32,
            "depth": 3,
            "num_heads": 4,
            "cond_token_dim": TEXT,
            "global_cond_dim": 12,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 16,
            "ff_mult": 2,
            "num_memory_tokens": 3,
        },
        {
            "hidden_states": shape(1, 8, 12),
            "timestep": at(0.9),
            "encoder_hidden_states": WORDS,
            "global_hidden_states": shape(1, 12),
        },
    ),
    row(
        "LongCatAudioDiTTransformer",
        "blocks",
        {
            "dit_dim": 32,
            "dit_depth": 3,
            "dit_heads": 2,
            "dit_text_dim": TEXT,
            "latent_dim": 4,
            "use_latent_condition": False,
        },
        {
            "hidden_states": shape(1, 8, 4),
            "encoder_hidden_states": WORDS,
            "encoder_attention_mask": torch.ones(1, 7, dtype=torch.bool),
            "timestep": at(0.9),
        },
    ),
    row(
        "MiniMaxMusic3Transformer1DModel",
        STREAMS,
        {
            "in_channels": 4,
            "condition_dim": TEXT,
            "num_layers": 3,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "ff_inner_dim": 48,
            "rotary_dim": 8,
            "fourier_embedding_dim": 16,
        },
        {"hidden_states": shape(1, 4, 8), "timestep": at(0.9), "encoder_hidden_states": shape(1, 8, TEXT)},
    ),
    row(
        "T5FilmDecoder",
        "decoders",
        {
            "input_dims": 4,
            "targets_length": 8,
            "d_model": 16,
            "num_layers": 3,
            "num_heads": 2,
            "d_kv": 8,
            "d_ff": 24,
        },
        {
            "encodings_and_masks": [(torch.linspace(-1, 1, 80).reshape(1, 5, 16), torch.ones(1, 5))],
            "decoder_input_tokens": shape(1, 8, 4),
            "decoder_noise_time": at(0.9),
        },
        time="decoder_noise_time",
        stream="decoder_input_tokens",
    ),
    row(
        "RFD4ProteinaTransformer",
        "transformer_layers",
        {
            "nlayers": 4,
            "token_dim": 32,
            "nheads": 2,
            "dim_cond": 16,
            "pair_repr_dim": 16,
            "latent_dim": 4,
            "token_type_emb_dim": 8,
            "cath_emb_dim": 8,
            "t_emb_dim": 16,
            "seq_sep_dim": 8,
            "tri_mult_c": 16,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
        },
        {
            "bb_ca": shape(1, 8, 3),
            "local_latents": shape(1, 8, 4),
            "bb_ca_time": at(0.9),
            "local_latents_time": at(0.9),
            "padding_mask": torch.ones(1, 8, dtype=torch.bool),
            "token_type": torch.zeros(1, 8, dtype=torch.long),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(1, 8, dtype=torch.bool),
                "supports_local_latent": torch.ones(1, 8, dtype=torch.bool),
            },
        },
        time="bb_ca_time",
        stream="bb_ca",
    ),
)
