"""Measures caches on the miniatures: what they save, and how near the result stays to the unpatched run's.

    python -m benchmarks.cache [--models wan emoji] [--captions 6] [--steps 50] [--scheduler euler] [--size 16 16]

Everything that is compared runs in turn in one process, on the same captions and noise, against an unpatched run of its
own. Writes `benchmarks/results/<model>.json` and `benchmarks/results/pareto_<model>.png`; for other runs than of 50
Euler steps `<model>_<scheduler>_<steps>` instead of `<model>`, for other sizes than the miniature's own with the size
behind it. With `--full` every setting of this library's sweeps. What is calibrated or fitted is so on the miniature's
own size. With `--only` the rows that are measured replace those of the same name in the file, and the others stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.progress import Progress

from miniatures import NAMES, call_kwargs, captions, load_miniature, to_frames
from miniatures.pipelines import SCHEDULERS
from miniatures.specs import DRAWN, spec_of
from sgl_diffusion_accel import environment
from sgl_diffusion_accel.comparing.measures.block_work import BlockWork
from sgl_diffusion_accel.comparing.measures.metrics import mean_psnr

from . import pareto
from .contenders import UNPATCHED, Contender, calibration, contenders, teacache_fits
from .metrics import Frames, computed_steps, psnr, ssim
from .summary import name_of
from .turns import RESULTS, be_quiet

CAPTION_SEED = 77
NOISE_SEED = 1000
_PAIRED = 8
"""Runs that are timed against one unpatched run; then comes the next one, so that a change of load does little harm."""


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        model: Name of the miniature.
        steps: Denoising steps of the unpatched run.
        scheduler: "euler", or for Wan "unipc" or "dpm".
        size: Height and width in pixels; None for those that the miniature was trained on.
    """

    model: str
    steps: int
    scheduler: str = "euler"
    size: tuple[int, int] | None = None

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width."""
        return self.size or (spec_of(self.model).world.side,) * 2


@dataclass(frozen=True)
class Run:
    """One run of a pipeline: its frames, the work of each transformer call, its wall and CPU time in seconds."""

    frames: Frames
    work: list[int]
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Sample:
    """One contender on one caption, against the unpatched run of that caption.

    Attributes:
        share: Share of the blocks' work that was executed.
        computed: Denoising steps computed.
        psnr: In dB.
        ssim: Structural similarity.
        speedup: Wall time of the unpatched run over that of this one.
        cpu_speedup: The same in CPU time of the one thread, which other processes on the machine disturb less.
        seconds: Wall time.
    """

    share: float
    computed: float
    psnr: float
    ssim: float
    speedup: float
    cpu_speedup: float
    seconds: float


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(DRAWN), choices=NAMES)
    parser.add_argument("--captions", type=int, default=6)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", default="", help="measure only contenders whose family or name holds this")
    parser.add_argument("--scheduler", default="euler", choices=SCHEDULERS, help="others than euler are for wan alone")
    parser.add_argument("--full", action="store_true", help="every setting of this library's sweeps")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="in pixels")
    given = parser.parse_args()
    be_quiet()
    RESULTS.mkdir(exist_ok=True)
    for model in given.models:
        setting = Setting(
            model, given.steps, given.scheduler, None if given.size is None else (given.size[0], given.size[1])
        )
        result = measure(setting, given.captions, given.only, given.full)
        path = RESULTS / f"{name_of(result)}.json"
        if given.only and path.exists():
            result = merged(json.loads(path.read_text()), result)
        path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        pareto.draw(result, RESULTS / f"pareto_{name_of(result)}.png")


def measure(setting: Setting, count: int, only: str = "", full: bool = False) -> dict[str, Any]:
    """Measures all contenders on one miniature.

    Args:
        setting: What is run.
        count: Captions, each with its own noise.
        only: Part of the family or name of the contenders to measure; all of them if empty.
        full: Whether with every setting of this library's sweeps; so it is where `only` picks some.

    Returns:
        What is written to the JSON file.
    """
    model, steps, scheduler = setting.model, setting.steps, setting.scheduler
    every = contenders(model, steps, scheduler, full or bool(only))
    chosen = [one for one in every if one.family == UNPATCHED or only in f"{one.family} {one.name}"]
    samples: dict[Contender, list[Sample]] = {one: [] for one in chosen}
    with Progress() as progress:
        task = progress.add_task(model, total=count * len(chosen))
        for index, caption in enumerate(captions(model, count, CAPTION_SEED)):
            call = {"caption": caption, "seed": NOISE_SEED + index}
            for turn, one in enumerate(chosen):
                if turn % _PAIRED == 0:
                    reference = run(setting, Contender(UNPATCHED, "reference"), call)
                samples[one].append(compare(run(setting, one, call), reference, steps))
                progress.advance(task)
    names = " ".join(one.name for one in chosen)
    example: dict[str, Any] = call_kwargs(model, captions(model, 1, CAPTION_SEED)[0], size=setting.size)
    return {
        "model": model,
        "pipeline": type(load_miniature(model)).__name__,
        "steps": steps,
        "scheduler": scheduler,
        "size": list(setting.pixels),
        "captions": captions(model, count, CAPTION_SEED),
        "guidance": example.get("guidance_scale", example.get("true_cfg_scale", 1.0)),
        "latents": list(example["latents"].shape),
        "dtype": str(example["latents"].dtype).removeprefix("torch."),
        "environment": environment.describe(),
        "teacache_fits": teacache_fits(model, steps, scheduler) if "TeaCache" in names else [],
        "calibration": calibration(model, steps, scheduler) if "plan" in names else {},
        "rows": [row(one, taken) for one, taken in samples.items()],
    }


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The old result with the rows of the new one in it.

    Raises:
        ValueError: They were measured on different things.
    """
    for key in ("pipeline", "steps", "captions", "guidance", "latents", "dtype"):
        if old[key] != new[key]:
            raise ValueError(f"{key} differs: {old[key]} in the file, {new[key]} measured. Measure all rows again.")
    there, here = old["environment"], new["environment"]
    here = here | {"packages": {name: here["packages"].get(name) for name in there["packages"]}}
    for key in ("packages", "cpu", "threads"):
        if there[key] != here[key]:
            raise ValueError(
                f"{key} differs: the file has {there[key]}, this machine {here[key]}. Measure all rows again."
            )
    measured = {(row["family"], row["name"]): row for row in new["rows"] if row["family"] != UNPATCHED}
    kept = [measured.pop((row["family"], row["name"]), row) for row in old["rows"]]
    fits = new["teacache_fits"] or old.get("teacache_fits", [])
    calibrated = new["calibration"] or old.get("calibration", {})
    return {**old, "teacache_fits": fits, "calibration": calibrated, "rows": kept + list(measured.values())}


def run(setting: Setting, contender: Contender, call: dict[str, Any]) -> Run:
    """One run on a new pipeline, which nothing else has touched."""
    pipe = load_miniature(setting.model, scheduler=setting.scheduler)
    arguments = call_kwargs(setting.model, **call, steps=contender.steps or setting.steps, size=setting.size)
    with BlockWork(pipe.transformer) as work, contender.apply(pipe), torch.no_grad():
        begin, cpu_begin = time.perf_counter(), time.thread_time()
        output = pipe(**arguments)
        seconds, cpu_seconds = time.perf_counter() - begin, time.thread_time() - cpu_begin
    return Run(to_frames(setting.model, output, setting.size), work.calls, seconds, cpu_seconds)


def compare(run: Run, reference: Run, steps: int) -> Sample:
    """One run against the unpatched one."""
    return Sample(
        share=sum(run.work) / sum(reference.work),
        computed=computed_steps(run.work, reference.work, steps),
        psnr=psnr(run.frames, reference.frames),
        ssim=ssim(run.frames, reference.frames),
        speedup=reference.seconds / run.seconds,
        cpu_speedup=reference.cpu_seconds / run.cpu_seconds,
        seconds=run.seconds,
    )


def row(contender: Contender, samples: list[Sample]) -> dict[str, Any]:
    """Mean quality, cost and median speed-up of one contender, with the samples they come from."""
    share = statistics.fmean(sample.share for sample in samples)
    exact = all(sample.psnr == float("inf") for sample in samples)
    return {
        "family": contender.family,
        "name": contender.name,
        "exact": exact,
        "share": share,
        "compute_ratio": 1 / share,
        "computed_steps": statistics.fmean(sample.computed for sample in samples),
        "psnr": None if exact else mean_psnr([sample.psnr for sample in samples]),
        "ssim": statistics.fmean(sample.ssim for sample in samples),
        "speedup": statistics.median(sample.speedup for sample in samples),
        "cpu_speedup": statistics.median(sample.cpu_speedup for sample in samples),
        "samples": [
            {key: value if value != float("inf") else None for key, value in asdict(one).items()} for one in samples
        ],
    }


if __name__ == "__main__":
    main()
