"""What `compare` found out, as plain data; `comparison.py` puts tables, pictures and files on top of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sgl_diffusion_accel.comparing.measures.quality import Quality
from sgl_diffusion_accel.comparing.picture_gallery import Gallery
from sgl_diffusion_accel.reporting.spread import Spread


@dataclass(frozen=True, kw_only=True)
class Sample(Quality):
    """One run against the unpatched run of its round.

    Attributes:
        call: Index of the call.
        seconds: Wall time.
        speedup: Wall time of the unpatched run over that of this one.
        share: Share of the blocks that were computed; for fewer steps, of the steps. None if not known.
        peak_memory_mib: Of the CUDA device; None without one.
        maps: Branch to whether each step was computed, where a cache of this library was on.
    """

    call: int
    seconds: float
    speedup: float
    share: float | None
    peak_memory_mib: float | None
    maps: Mapping[str, tuple[bool, ...]]


@dataclass(frozen=True)
class Row:
    """One contender, over all its runs. Metrics that cannot be had are None; the remarks tell why.

    Attributes:
        name: As the variant was named; `"25 steps"` for fewer steps.
        is_fewer_steps: Whether it is the unpatched pipeline with fewer steps.
        speedup: Median of the paired ratios, unpatched over this.
        speedup_spread: The same with its quartiles.
        seconds: Median wall time of a run.
        compute_ratio: Blocks that the unpatched runs compute over those that were computed, all branches together.
        peak_memory_mib: Most of all runs, on the CUDA device; None without one.
        psnr: Mean over the runs in dB, an equal output counted as 100; infinite if all are equal.
        psnr_worst: Of all runs.
        ssim: Mean structural similarity.
        lpips: Mean learned perceptual distance.
        sharpness: Mean, relative to the unpatched: 1 as sharp, less is softer.
        motion: Mean temporal difference, relative to the unpatched: 1 as much, 0 frozen; None for pictures.
        fewer_steps_psnr: PSNR of simply fewer steps at the same compute ratio, where it was measured.
        samples: What the row is made of.
    """

    name: str
    is_fewer_steps: bool
    speedup: float
    speedup_spread: Spread
    seconds: float
    compute_ratio: float | None
    peak_memory_mib: float | None
    psnr: float
    psnr_worst: float
    ssim: float | None
    lpips: float | None
    sharpness: float | None
    motion: float | None
    fewer_steps_psnr: float | None
    samples: tuple[Sample, ...]

    @property
    def beats_fewer_steps(self) -> bool:
        """Whether it is nearer to the unpatched output than fewer steps at the same cost are."""
        return self.fewer_steps_psnr is not None and self.psnr > self.fewer_steps_psnr


@dataclass(frozen=True)
class Baseline:
    """The unpatched runs.

    Attributes:
        seconds: Wall time of a run.
        peak_memory_mib: Most of all runs, on the CUDA device; None without one.
        repeats_itself_db: PSNR of two unpatched runs on the same seed: infinite if they are equal, None if no call was
            run twice.
    """

    seconds: Spread
    peak_memory_mib: float | None
    repeats_itself_db: float | None


@dataclass(frozen=True)
class ComparisonData:
    """The numbers of a comparison, with a few pictures.

    Attributes:
        pipeline: Class of the pipeline.
        calls: A name for each call: its prompt, or its number.
        steps: Denoising steps of each call, None where they are not set by `num_inference_steps`.
        repeats: Runs of each contender on each call.
        warmup: Rounds that were not measured.
        measured_on: What the metrics were taken on, and the range that PSNR refers to.
        environment: Versions, hardware, date.
        unpatched: The runs that all others are compared with.
        rows: The variants in their order, then fewer steps.
        order: Contenders of each measured round, in the order in which they ran.
        remarks: What the reader should know: metrics that are missing, NaN, a pipeline that does not repeat itself.
        gallery: The pictures; empty in a report that was loaded.
    """

    pipeline: str
    calls: tuple[str, ...]
    steps: tuple[int | None, ...]
    repeats: int
    warmup: int
    measured_on: str
    environment: Mapping[str, Any]
    unpatched: Baseline
    rows: tuple[Row, ...]
    order: tuple[tuple[str, ...], ...]
    remarks: tuple[str, ...]
    gallery: Gallery = field(default_factory=Gallery, compare=False, repr=False)

    @property
    def about(self) -> str:
        """Pipeline, steps and calls, in a few words."""
        steps = sorted({each for each in self.steps if each is not None})
        told = f", {' and '.join(map(str, steps))} steps" if steps else ""
        return f"{self.pipeline}{told}, {len(self.calls)} call{'' if len(self.calls) == 1 else 's'}"

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}; known: {', '.join(repr(row.name) for row in self.rows)}")
