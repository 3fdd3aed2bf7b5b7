"""All metrics of one output against the unpatched one, with the reasons for those that are missing."""

from __future__ import annotations

from dataclasses import dataclass

from sgl_diffusion_accel.comparing.measures import metrics
from sgl_diffusion_accel.comparing.measures.perceptual import Lpips
from sgl_diffusion_accel.comparing.measures.read_output import Media
from sgl_diffusion_accel.errors import ConfigError


@dataclass(frozen=True)
class Quality:
    """One output against the unpatched one of the same call.

    Attributes:
        psnr: In dB; infinite for equal outputs, NaN where there is a NaN.
        ssim: Structural similarity; None where it cannot be had.
        lpips: Learned perceptual distance; None where it cannot be had.
        sharpness: Relative to the reference's.
        motion: Temporal difference relative to the reference's; None for pictures.
        non_finite: Share of values that are NaN or infinite.
    """

    psnr: float
    ssim: float | None
    lpips: float | None
    sharpness: float | None
    motion: float | None
    non_finite: float


class Judge:
    """Measures outputs, and keeps the reasons why a metric is missing, each once.

    On the CPU, frame by frame: the device may be full of the model.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, None] = {}
        self._lpips = Lpips()

    def __call__(self, media: Media, reference: Media) -> Quality:
        """Measures one output.

        Raises:
            ConfigError: It has another shape than the reference.
        """
        if media.values.shape != reference.values.shape:
            raise ConfigError(
                f"the output has shape {tuple(media.values.shape)} and the unpatched one "
                f"{tuple(reference.values.shape)} [batch, frames, channels, height, width]: they cannot be compared."
            )
        values, other = media.values, reference.values
        peak, in_space = reference.peak, reference.kind != "rows"
        no_ssim = metrics.why_no_ssim(other) if in_space else "no SSIM and sharpness: packed latents of unknown layout"
        no_lpips = self._lpips.why_not(reference)
        self.reasons |= dict.fromkeys(filter(None, (no_ssim, no_lpips)))
        return Quality(
            psnr=metrics.psnr(values, other, peak),
            ssim=None if no_ssim else metrics.ssim(values, other, peak),
            lpips=None if no_lpips else self._lpips(values, other),
            sharpness=metrics.sharpness(values, other) if in_space else None,
            motion=metrics.motion(values, other),
            non_finite=metrics.non_finite(values),
        )
