"""Turns rounds of runs into a report: samples as they come in, rows at the end."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from sgl_diffusion_accel import environment
from sgl_diffusion_accel.calls import Call
from sgl_diffusion_accel.comparing.comparison import ComparisonReport
from sgl_diffusion_accel.comparing.comparison_data import Baseline, Row, Sample
from sgl_diffusion_accel.comparing.contenders import UNPATCHED
from sgl_diffusion_accel.comparing.measures import metrics
from sgl_diffusion_accel.comparing.measures.quality import Judge, Quality
from sgl_diffusion_accel.comparing.measures.read_output import Media
from sgl_diffusion_accel.comparing.picture_gallery import Gallery
from sgl_diffusion_accel.comparing.runner import Round, Run
from sgl_diffusion_accel.errors import VariantError
from sgl_diffusion_accel.reporting.spread import Spread

_MIB = 2**20
_MEANS = ("ssim", "lpips", "sharpness", "motion")
_ROUNDED = 0.015  # of the cost: the numbers of steps that match a variant are rounded


class Evaluation:
    """What is known of a comparison so far.

    Args:
        pipe: The pipeline.
        calls: All calls.
        variants: Names of the user's variants, in their order.
        device: Where the pipeline runs.
    """

    def __init__(self, pipe: Any, calls: Sequence[Call], variants: Sequence[str], device: torch.device) -> None:
        self._pipe = pipe
        self._calls = calls
        self._variants = variants
        self._device = device
        self._judge = Judge()
        self._references: list[Run] = []
        self._samples: dict[str, list[Sample]] = {}
        self._first: Media | None = None
        self._again: float | None = None
        self._order: list[tuple[str, ...]] = []
        self._gallery = Gallery()
        self._broken = 0.0

    def add(self, taken: Round, is_warmup: bool) -> None:
        """Measures the runs of one round against its unpatched one.

        Raises:
            VariantError: The output of a variant cannot be compared with the unpatched one.
        """
        reference = taken.runs[UNPATCHED]
        self._check_again(taken.call, reference.media)
        if is_warmup:
            return
        self._order.append(tuple(taken.runs))
        self._broken = max(self._broken, metrics.non_finite(reference.media.values))
        self._references.append(replace(reference, media=Media(torch.empty(0), "pixels")))
        self._gallery.add(taken.call, UNPATCHED, reference.media, reference.media)
        for name, run in taken.runs.items():
            if name != UNPATCHED:
                try:
                    quality = self._judge(run.media, reference.media)
                except ValueError as error:
                    raise VariantError(f"variant {name!r}: {error}") from error
                self._samples.setdefault(name, []).append(_sample(taken.call, run, reference, quality))
                self._gallery.add(taken.call, name, run.media, reference.media)

    def _check_again(self, call: int, media: Media) -> None:
        """Compares the first two unpatched runs of the first call."""
        if call == 0 and self._first is None:
            self._first = media
        elif call == 0 and self._again is None and self._first is not None:
            self._again = metrics.psnr(media.values, self._first.values, self._first.peak)

    def report(self, repeats: int, warmup: int) -> ComparisonReport:
        """The report of all rounds so far."""
        fewer = [name for name in self._samples if name not in self._variants]
        plain = {name: _row(name, self._samples[name], True) for name in fewer}
        finite = [row for row in plain.values() if math.isfinite(row.psnr)]
        curve = sorted((1 / row.compute_ratio, row.psnr) for row in finite if row.compute_ratio)
        rows = [_row(name, self._samples[name], False, curve) for name in self._variants]
        rows += sorted(plain.values(), key=lambda row: row.compute_ratio or 1.0)
        peaks = [run.peak_memory for run in self._references if run.peak_memory is not None]
        baseline = Baseline(
            seconds=Spread.of([run.seconds for run in self._references]),
            peak_memory_mib=max(peaks) / _MIB if peaks else None,
            repeats_itself_db=self._again,
        )
        media = self._first
        return ComparisonReport(
            pipeline=type(self._pipe).__name__,
            calls=tuple(call.label for call in self._calls),
            steps=tuple(call.steps for call in self._calls),
            repeats=repeats,
            warmup=warmup,
            measured_on=_told(media) if media else "",
            environment=environment.describe(self._device),
            unpatched=baseline,
            rows=tuple(rows),
            order=tuple(self._order),
            remarks=tuple(self._remarks(rows)),
            gallery=self._gallery,
        )

    def _remarks(self, rows: Sequence[Row]) -> list[str]:
        found = list(self._judge.reasons)
        if self._broken:
            found.append(
                f"NaN or infinite: up to {self._broken:.2%} of the values of an unpatched output. Nothing can be "
                "compared with those."
            )
        if self._again is not None and math.isfinite(self._again):
            found.append(
                "The unpatched pipeline does not repeat itself: two runs on the same seed have a PSNR of "
                f"{self._again:.1f} dB. No row can be expected to be nearer than that."
            )
        for row in rows:
            worst = max(sample.non_finite for sample in row.samples)
            if worst:
                found.append(f"NaN or infinite: up to {worst:.2%} of the values of an output of {row.name}.")
        unknown = [row.name for row in rows if row.compute_ratio is None]
        if unknown:
            found.append(
                f"no compute ratio for {', '.join(unknown)}: in compiled models only this library's caches count."
            )
        return found


def _told(media: Media) -> str:
    batch, frames, channels, height, width = media.values.shape
    shape = f"{batch} × " + (f"{frames} frames of " if frames > 1 else "") + f"{channels} × {height} × {width}"
    if media.kind == "pixels":
        return f"pixels in [0, 1], {shape}; PSNR on a range of 1"
    if media.kind == "latents":
        return f"latents, {shape}; PSNR on the range of each reference (the first one's is {media.peak:.3g})"
    return f"packed latents of unknown layout, {batch} × {height} × {width}; PSNR on the range of each reference"


def _sample(call: int, run: Run, reference: Run, quality: Quality) -> Sample:
    return Sample(
        call=call,
        seconds=run.seconds,
        speedup=reference.seconds / run.seconds,
        share=run.share,
        peak_memory_mib=None if run.peak_memory is None else run.peak_memory / _MIB,
        **vars(quality),
        maps={name: tuple(steps) for name, steps in run.maps.items()},
    )


def _row(name: str, samples: Sequence[Sample], is_fewer_steps: bool, curve: Sequence[tuple[float, float]] = ()) -> Row:
    share = _mean([sample.share for sample in samples])
    peaks = [sample.peak_memory_mib for sample in samples if sample.peak_memory_mib is not None]
    speedup = Spread.of(sample.speedup for sample in samples)
    return Row(
        name=name,
        is_fewer_steps=is_fewer_steps,
        speedup=speedup.median,
        speedup_spread=speedup,
        seconds=statistics.median(sample.seconds for sample in samples),
        compute_ratio=1 / share if share else None,
        peak_memory_mib=max(peaks) if peaks else None,
        psnr=metrics.mean_psnr([sample.psnr for sample in samples]),
        psnr_worst=min((sample.psnr for sample in samples), key=lambda db: -math.inf if math.isnan(db) else db),
        **{name: _mean([getattr(sample, name) for sample in samples]) for name in _MEANS},
        fewer_steps_psnr=None if share is None else metrics.psnr_at(curve, share, _ROUNDED),
        samples=tuple(samples),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """None where a value is missing: a mean over other calls than those of the other rows would mislead."""
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found and len(found) == len(values) else None
