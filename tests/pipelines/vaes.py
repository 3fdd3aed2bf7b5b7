"""Tiny autoencoders, for the pipelines that encode a picture or a video."""

from __future__ import annotations

from typing import Any

from .base import made

_FOUR = {
    "block_out_channels": (4, 4, 4, 4),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 2,
}


def flux2_vae() -> Any:
    """Four latent channels, which are patched to sixteen."""
    return made("AutoencoderKLFlux2", latent_channels=4, sample_size=64, **_FOUR)


def wan_vae(channels: int = 4, kind: str = "AutoencoderKLWan") -> Any:
    """Wan's, or Qwen-Image's, which is made the same way: 8 times smaller, and 4 times shorter."""
    return made(
        kind,
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )


def ltx_vae(channels: int) -> Any:
    """LTX's: 32 times smaller, and 8 times shorter."""
    return made(
        "AutoencoderKLLTXVideo",
        latent_channels=channels,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
    )


def hunyuan_vae(channels: int) -> Any:
    """HunyuanVideo's: 8 times smaller, and 4 times shorter."""
    return made(
        "AutoencoderKLHunyuanVideo",
        latent_channels=channels,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
    )


def cogvideox_vae(channels: int) -> Any:
    """CogVideoX's: 8 times smaller, and 4 times shorter."""
    return made(
        "AutoencoderKLCogVideoX",
        latent_channels=channels,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
    )


def cosmos_vae(channels: int) -> Any:
    """Cosmos': 8 times smaller, and 8 times shorter."""
    return made(
        "AutoencoderKLCosmos",
        latent_channels=channels,
        encoder_block_out_channels=(4, 4, 4, 4),
        decode_block_out_channels=(4, 4, 4, 4),
        attention_resolutions=(1,),
        resolution=16,
        num_layers=1,
        patch_size=2,
        spatial_compression_ratio=8,
        temporal_compression_ratio=8,
        latents_mean=[0.0] * channels * 16,
        latents_std=[1.0] * channels * 16,
    )


def magvit_vae(channels: int) -> Any:
    """EasyAnimate's: 8 times smaller, and 4 times shorter."""
    return made(
        "AutoencoderKLMagvit",
        latent_channels=channels,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
        layers_per_block=1,
        norm_num_groups=2,
    )


def hunyuan15_vae() -> Any:
    """HunyuanVideo 1.5's: 16 times smaller, and 4 times shorter."""
    return made(
        "AutoencoderKLHunyuanVideo15",
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )


def dc_vae(channels: int) -> Any:
    """Sana's: 8 times smaller here."""
    return made(
        "AutoencoderDC",
        latent_channels=channels,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 4,
        decoder_block_types=("ResBlock",) * 4,
        encoder_block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=1.0,
    )


def ltx2_vae(channels: int) -> Any:
    """LTX-2's for pictures: 32 times smaller, and 8 times shorter."""
    return made(
        "AutoencoderKLLTX2Video",
        latent_channels=channels,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(16, 16, 16),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4,
    )


def ltx2_audio_vae() -> Any:
    """LTX-2's for sound: four latent channels of one bin."""
    return made("AutoencoderKLLTX2Audio", base_channels=4, num_res_blocks=1, latent_channels=4, mel_bins=4)


def oobleck(channels: int) -> Any:
    """Stable Audio's: 16 samples a second, four of them a latent."""
    return made(
        "AutoencoderOobleck",
        encoder_hidden_size=4,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 1],
        decoder_channels=4,
        decoder_input_channels=channels,
        audio_channels=2,
        sampling_rate=16,
    )
