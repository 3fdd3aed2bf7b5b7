"""What the demo measured."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from benchmarks.metrics import Frames, psnr, ssim


@dataclass(frozen=True)
class Run:
    """One run of a pipeline.

    Attributes:
        frames: Pixels `[1, F, H, W, 3]` in [0, 1].
        seconds: Wall time.
        share: Share of the block calls of an unpatched run that were executed.
        computed: For each branch, which steps were computed.
    """

    frames: Frames
    seconds: float
    share: float
    computed: dict[str, tuple[bool, ...]]


@dataclass(frozen=True)
class Row:
    """Means over the captions, and the median of the paired speed-ups."""

    speedup: float
    share: float
    steps: float
    psnr: float
    ssim: float


@dataclass
class Result:
    """All runs of one miniature, one a caption in each list.

    Attributes:
        model: Name of the miniature.
        steps: Denoising steps.
        captions: What was asked for.
        unpatched: Runs that the others are compared with.
        cached: Runs with a cache, by setting.
        fewer: Unpatched runs with as many steps as the setting of that name costs.
    """

    model: str
    steps: int
    captions: list[str]
    unpatched: list[Run] = field(default_factory=list)
    cached: dict[str, list[Run]] = field(default_factory=dict)
    fewer: dict[str, list[Run]] = field(default_factory=dict)

    def row(self, runs: list[Run]) -> Row:
        """Sums up some runs against the unpatched ones of the same captions."""
        pairs = list(zip(runs, self.unpatched, strict=True))
        return Row(
            speedup=statistics.median(whole.seconds / run.seconds for run, whole in pairs),
            share=statistics.fmean(run.share for run in runs),
            steps=statistics.fmean(_steps(run) for run in runs),
            psnr=statistics.fmean(psnr(run.frames, whole.frames) for run, whole in pairs),
            ssim=statistics.fmean(ssim(run.frames, whole.frames) for run, whole in pairs),
        )


def _steps(run: Run) -> float:
    return statistics.fmean(sum(steps) for steps in run.computed.values())
