"""Measures caches on the miniatures: what they save, and how near the result stays to the unpatched run's.

    python -m benchmarks.cache [--models wan emoji] [--captions 6] [--steps 20 50] [--scheduler euler] [--size 16 16]
                               [--guidance 7] [--batch 4]

Everything that is compared runs in turn in one process, on the same captions and noise, against an unpatched run of its
own. Writes `benchmarks/results/<model>.json` and `benchmarks/results/pareto_<model>.png`; for other runs than of 50
Euler steps `<model>_<scheduler>_<steps>` instead of `<model>`, for another guidance scale or size than the miniature's
own, or batches, with that behind it. With `--full` every setting of this library's sweeps. What is calibrated or fitted
is so at the guidance that is measured, on single pictures of the miniature's own size. With `--only` the rows that are
measured, on the captions of the file, replace those of the same name in it, and the others stay.

A command that was stopped goes on where it was, with the same code and versions on the same machine; `--fresh` begins
anew. With `--minutes` no caption is begun that would end later: what is to be measured shares the time, and what one
leaves goes to the next; each has one caption at least.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from miniatures import NAMES, captions
from miniatures.pipelines import SCHEDULERS
from miniatures.specs import DRAWN
from sgl_diffusion_accel import environment

from . import pareto
from .calibrated import Calibrated
from .contenders import UNPATCHED, Contender, contenders
from .runs import CAPTION_SEED, NOISE_SEED, Run, Sample, Setting, about, compare, key_of, row, run
from .summary import name_of
from .turns import RESULTS, be_quiet
from .unfinished import Unfinished

_PAIRED = 8
"""Runs that are timed against one unpatched run; then comes the next one, so that a change of load does little harm."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line.

    Args:
        arguments: Of the command line; None for the process's.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.only and given.minutes < math.inf:
        parser.error("--only measures on all captions of the file that it changes: leave --minutes out")
    if given.batch < 1 or given.captions % given.batch:
        such_as = f": type --captions {2 * given.batch}" if given.batch > 1 else "; allowed: batches from 1"
        parser.error(f"--captions {given.captions} are no batches of {given.batch}{such_as}")
    be_quiet()
    RESULTS.mkdir(exist_ok=True)
    size = None if given.size is None else (given.size[0], given.size[1])
    kept = {
        setting: _unfinished(setting, given.only, given.fresh)
        for steps in given.steps
        for setting in [
            Setting(model, steps, given.scheduler, size, given.guidance, given.batch) for model in given.models
        ]
    }
    end = time.monotonic() + 60 * given.minutes
    for left, (setting, unfinished) in zip(range(len(kept), 0, -1), kept.items(), strict=True):
        name = name_of(about(setting))
        if unfinished.count:
            print(f"{name}: goes on from {unfinished.count} samples of a run that was stopped", flush=True)
        share = (end - time.monotonic()) / left
        path = RESULTS / f"{name}.json"
        old = json.loads(path.read_text()) if given.only and path.exists() else None
        texts = captions(setting.model, given.captions, CAPTION_SEED) if old is None else old["captions"]
        result = measure(setting, texts, given.only, given.full, unfinished, share)
        if old is not None:
            result = merged(old, result)
        path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        pareto.draw(result, RESULTS / f"pareto_{name}.png")
    for unfinished in kept.values():
        unfinished.drop()


def _unfinished(setting: Setting, only: Sequence[str], fresh: bool) -> Unfinished:
    """What is kept of a run until all are finished; one of some contenders leaves that of all alone."""
    name = name_of(about(setting)) + "".join(f", {part}".replace("/", " ") for part in only)
    return Unfinished(RESULTS / ".unfinished" / name, key_of(setting), fresh)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(DRAWN), choices=NAMES)
    parser.add_argument(
        "--captions", type=int, default=6, help="with --batch a multiple of it, with --only those of the file"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[50])
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="PART", help="measure only contenders whose family and name hold one"
    )
    parser.add_argument("--scheduler", default="euler", choices=SCHEDULERS, help="dpm is for wan alone")
    parser.add_argument("--full", action="store_true", help="every setting of this library's sweeps")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="in pixels")
    parser.add_argument("--guidance", type=float, help="guidance scale, of wan, qwen and emoji (their own, 4)")
    parser.add_argument("--batch", type=int, default=1, help="captions in one call")
    parser.add_argument("--fresh", action="store_true", help="do not go on from a run that was stopped")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no caption that would end later")
    return parser


def measure(
    setting: Setting,
    texts: Sequence[str],
    only: Sequence[str] = (),
    full: bool = False,
    unfinished: Unfinished | None = None,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Measures all contenders on one miniature.

    Args:
        setting: What is run.
        texts: Captions, each with its own noise; whole batches of them.
        only: Parts of the family and name of the contenders to measure; all of them if empty.
        full: Whether with every setting of this library's sweeps; so it is where `only` picks some.
        unfinished: Where samples are kept as they come, and taken from; None for nowhere.
        seconds: No caption but the first is begun that would end later.

    Returns:
        What is written to the JSON file.
    """
    begin = time.monotonic()
    made = Calibrated(setting.of, None if unfinished is None else unfinished.product)
    every = contenders(made, full or bool(only))
    chosen = [
        one
        for one in every
        if one.family == UNPATCHED or not only or any(part in f"{one.family} {one.name}" for part in only)
    ]
    names = " ".join(one.name for one in chosen)
    samples: dict[Contender, list[Sample]] = {one: [] for one in chosen}
    measured: list[str] = []
    for index in range(0, len(texts), setting.batch):
        batch = list(texts[index : index + setting.batch])
        at = time.monotonic() - made.seconds
        measure_batch(setting, {"caption": batch, "seed": NOISE_SEED + index}, samples, unfinished)
        measured += batch
        took, spent = time.monotonic() - made.seconds - at, time.monotonic() - begin
        print(f"{name_of(about(setting))}: caption {len(measured)} of {len(texts)}, {spent / 60:.0f} min", flush=True)
        if spent + took > seconds:
            break
    return {
        **about(setting),
        "captions": measured,
        "environment": environment.describe(),
        "teacache_fits": made.teacache_fits() if "TeaCache" in names else [],
        "calibration": made.calibration("tuned plan" in names) if "plan" in names else {},
        "rows": [row(one, taken) for one, taken in samples.items()],
    }


def measure_batch(
    setting: Setting, call: dict[str, Any], samples: dict[Contender, list[Sample]], unfinished: Unfinished | None
) -> None:
    """Adds a sample of each contender on each caption of a call, those that are kept as they are."""
    pictures = [(caption, str(seed)) for seed, caption in enumerate(call["caption"], call["seed"])]
    reference: Run | None = None
    for turn, (one, taken) in enumerate(samples.items()):
        if turn % _PAIRED == 0:
            reference = None
        names = [(*picture, one.family, one.name) for picture in pictures]
        kept = [each for name in names if unfinished and (each := unfinished.sample(name))]
        if len(kept) == len(names):
            taken += [Sample(**values) for values in kept]
            continue
        if reference is None:
            reference = run(setting, Contender(UNPATCHED, "reference"), call)
        found = compare(run(setting, one, call), reference, setting.steps)
        taken += found
        if unfinished is not None:
            for name, sample in zip(names, found, strict=True):
                unfinished.add(name, asdict(sample))


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


if __name__ == "__main__":
    main()
