"""`apply_auto` beside simply fewer steps: quality and cost on every miniature, at few steps and many.

    python -m benchmarks.auto                                     # all miniatures, 4 to 50 steps, one caption
    python -m benchmarks.auto --models qwen --steps 4 8 20 --out out/auto.json

    python -m benchmarks.auto --host                              # what it costs the host in runs that it leaves alone

Each row is `apply_auto` on a run of so many steps, against the unpatched run: PSNR, share of the blocks' work, and the
PSNR of as many plain steps as it computes, which it must not be below. Where every step is computed, the picture is
the unpatched one.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from miniatures import NAMES, captions
from sgl_diffusion_accel import apply_auto, environment
from sgl_diffusion_accel.comparing.measures.metrics import mean_psnr
from sgl_diffusion_accel.reporting.tables import Strong, Table

from .contenders import Contender
from .overhead import difference_ms, make_idle_pipeline, paired, spread
from .runs import CAPTION_SEED, NOISE_SEED, Setting, compare, run

STEPS = (4, 8, 20, 30, 50)
QUALITIES = ("high", "balanced", "fast")
SCHEDULERS = ("euler", "unipc")
PAIRS = 40


@dataclass(frozen=True)
class Row:
    """One quality on one setting, the mean of all captions.

    Attributes:
        model: The miniature.
        scheduler: The scheduler.
        steps: Of the run.
        quality: Of `apply_auto`.
        share: Share of the blocks' work that was executed.
        psnr: In dB against the unpatched run; None for the same picture, bit by bit.
        fewer: Plain steps of about that cost.
        fewer_psnr: Theirs; None where that is all of them.
        cpu_speedup: CPU time of the unpatched run over that of this one.
    """

    model: str
    scheduler: str
    steps: int
    quality: str
    share: float
    psnr: float | None
    fewer: int
    fewer_psnr: float | None
    cpu_speedup: float

    @property
    def is_worse(self) -> bool:
        """Whether as many plain steps are better."""
        return self.psnr is not None and self.fewer_psnr is not None and self.psnr < self.fewer_psnr


def rows_of(setting: Setting, qualities: Sequence[str], texts: Sequence[str]) -> Iterator[Row]:
    """All qualities on one setting."""
    calls = [{"caption": text, "seed": NOISE_SEED + index} for index, text in enumerate(texts)]
    plain = [run(setting, Contender("unpatched", "unpatched"), call) for call in calls]
    for quality in qualities:
        auto = Contender("auto", quality, apply=functools.partial(apply_auto, quality=quality))
        samples = [
            compare(run(setting, auto, call), reference, setting.steps)[0]
            for call, reference in zip(calls, plain, strict=True)
        ]
        share = sum(each.share for each in samples) / len(samples)
        # Rounded up: what it is held against may cost more, and never less.
        fewer = min(setting.steps, math.ceil(share * setting.steps - 1e-6))
        others = [
            compare(run(setting, Contender("fewer", f"{fewer} steps", steps=fewer), call), reference, setting.steps)[0]
            for call, reference in zip(calls, plain, strict=True)
        ]
        yield Row(
            model=setting.model,
            scheduler=setting.scheduler,
            steps=setting.steps,
            quality=quality,
            share=share,
            psnr=_mean([each.psnr for each in samples]),
            fewer=fewer,
            fewer_psnr=_mean([each.psnr for each in others]),
            cpu_speedup=sum(each.cpu_speedup for each in samples) / len(samples),
        )


HOST_STEPS, HOST_BLOCKS = 8, 30
"""Of a run that is too short for a cache, through a model that is as deep as Wan 2.1's small one."""


def host_time(pairs: int) -> dict[str, dict[str, float]]:
    """Milliseconds that a step of a run takes longer in which every step is computed; blocks do next to nothing."""
    pipe = make_idle_pipeline(HOST_BLOCKS)
    return spread(paired((pipe, lambda _: nullcontext()), (pipe, apply_auto), pairs, steps=HOST_STEPS), difference_ms)


def _mean(found: Sequence[float]) -> float | None:
    """The mean in dB; None where all are equal to the unpatched ones."""
    return None if all(math.isinf(each) for each in found) else mean_psnr(list(found))


def table(rows: Sequence[Row]) -> str:
    """The rows as text; a star marks a PSNR below that of fewer steps."""
    cells = [
        (
            row.model, row.scheduler, str(row.steps), row.quality, f"{1 / row.share:.2f}x",
            Strong(_shown(row.psnr)) if row.is_worse else _shown(row.psnr),
            str(row.fewer), _shown(row.fewer_psnr), f"{row.cpu_speedup:.2f}x",
        )
        for row in rows
    ]  # fmt: skip
    head = ("model", "scheduler", "steps", "quality", "less", "PSNR", "plain steps", "their PSNR", "CPU time")
    return Table(head, cells, words=(0, 1, 3)).to_text(rule=True)


def _shown(psnr: float | None) -> str:
    return "the same" if psnr is None else f"{psnr:.1f}"


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Runs what the command line asks for, writes it and shows it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS))
    parser.add_argument("--schedulers", nargs="+", choices=SCHEDULERS, default=list(SCHEDULERS))
    parser.add_argument("--qualities", nargs="+", choices=QUALITIES, default=list(QUALITIES))
    parser.add_argument("--captions", type=int, default=1)
    parser.add_argument("--host", action="store_true", help="measure the host's time alone")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "auto.json")
    given = parser.parse_args(arguments)
    if given.host:
        _write(given.out, host={"steps": HOST_STEPS, "blocks": HOST_BLOCKS, "pairs": PAIRS, "ms": host_time(PAIRS)})
        return []
    rows: list[Row] = []
    for model in given.models:
        texts = captions(model, given.captions, CAPTION_SEED)
        for scheduler in given.schedulers:
            for steps in given.steps:
                rows += rows_of(Setting(model, steps, scheduler), given.qualities, texts)
                # After each setting: it may be stopped.
                _write(given.out, captions=given.captions, rows=[asdict(row) for row in rows])
    print(table(rows))
    return rows


def _write(path: Path, **found: Any) -> None:
    """Renews some entries of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {"environment": environment.describe()} | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
