"""What the benchmark of caches runs, one run of it, and how a run is compared with the unpatched one."""

from __future__ import annotations

import hashlib
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from miniatures import call_kwargs, captions, load_miniature, to_frames
from miniatures.specs import spec_of
from sgl_diffusion_accel import environment
from sgl_diffusion_accel.comparing.measures.block_work import BlockWork
from sgl_diffusion_accel.comparing.measures.metrics import mean_psnr

from .calibrated import Of
from .contenders import Contender
from .metrics import Frames, computed_steps, psnr, ssim

CAPTION_SEED = 77
NOISE_SEED = 1000


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        model: Name of the miniature.
        steps: Denoising steps of the unpatched run.
        scheduler: "euler", "unipc", or for Wan "dpm".
        size: Height and width in pixels; None for those that the miniature was trained on.
        guidance: Guidance scale; None for the miniature's own.
        batch: Pictures in one call, each with a caption and noise of its own.

    Raises:
        ValueError: The miniature takes no guidance.
    """

    model: str
    steps: int
    scheduler: str = "euler"
    size: tuple[int, int] | None = None
    guidance: float | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        usual = spec_of(self.model).guidance
        if usual == 1 and self.guidance not in (None, usual):
            raise ValueError(f"{self.model} knows no guidance but {usual:g}, not {self.guidance:g}: leave it out.")

    @property
    def of(self) -> Of:
        """What is calibrated for it."""
        return Of(self.model, self.steps, self.scheduler, self.guidance)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width."""
        return self.size or (spec_of(self.model).world.side,) * 2


def about(setting: Setting) -> dict[str, Any]:
    """What is run, for the result's file and its name."""
    model = setting.model
    example: dict[str, Any] = call_kwargs(
        model, captions(model, setting.batch, CAPTION_SEED), size=setting.size, guidance=setting.guidance
    )
    batch = {"batch": setting.batch} if setting.batch > 1 else {}
    return {
        "model": model,
        "pipeline": type(load_miniature(model)).__name__,
        "steps": setting.steps,
        "scheduler": setting.scheduler,
        "size": list(setting.pixels),
        "guidance": example.get("guidance_scale", example.get("true_cfg_scale", 1.0)),
        "latents": list(example["latents"].shape),
        "dtype": str(example["latents"].dtype).removeprefix("torch."),
        **batch,
    }


def key_of(setting: Setting) -> dict[str, Any]:
    """What must be the same for a run to go on where another one was stopped."""
    machine = environment.describe()
    same = {name: machine[name] for name in ("python", "packages", "cpu", "threads")}
    return {**about(setting), "seeds": [CAPTION_SEED, NOISE_SEED], "code": _code(), **same}


def _code() -> str:
    """A digest of the code that is measured: this library, the peers, their settings."""
    here, library = Path(__file__).parent, Path(environment.__file__).parent
    own = [here / name for name in ("calibrated.py", "contenders.py", "settings.py")]
    files = [*own, *sorted(here.glob("peers/*.py")), *sorted(library.rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@dataclass(frozen=True)
class Run:
    """One run of a pipeline: its frames, the work of each transformer call, its wall and CPU time in seconds."""

    frames: Frames
    work: list[int]
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Sample:
    """One contender on one caption, against the unpatched run of that caption; in a batch, what they cost together.

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


def run(setting: Setting, contender: Contender, call: dict[str, Any]) -> Run:
    """One run on a new pipeline, which nothing else has touched."""
    pipe = load_miniature(setting.model, scheduler=setting.scheduler)
    steps = contender.steps or setting.steps
    arguments = call_kwargs(setting.model, **call, steps=steps, size=setting.size, guidance=setting.guidance)
    with BlockWork(pipe.transformer) as work, contender.apply(pipe), torch.no_grad():
        begin, cpu_begin = time.perf_counter(), time.thread_time()
        output = pipe(**arguments)
        seconds, cpu_seconds = time.perf_counter() - begin, time.thread_time() - cpu_begin
    return Run(to_frames(setting.model, output, setting.size), work.calls, seconds, cpu_seconds)


def compare(run: Run, reference: Run, steps: int) -> list[Sample]:
    """One run against the unpatched one, picture by picture."""
    pictures = zip(run.frames[:, None], reference.frames[:, None], strict=True)
    return [
        Sample(
            share=sum(run.work) / sum(reference.work),
            computed=computed_steps(run.work, reference.work, steps),
            psnr=psnr(made, wanted),
            ssim=ssim(made, wanted),
            speedup=reference.seconds / run.seconds,
            cpu_speedup=reference.cpu_seconds / run.cpu_seconds,
            seconds=run.seconds,
        )
        for made, wanted in pictures
    ]


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
