"""Measures models of real size on a GPU: steps under every cache, attention, compilation.

    python -m benchmarks.gpu [--parts flux,wan] [--seconds 480] [--again] [--output FILE]

At true configurations in bfloat16, with random weights that are made on the device: nothing is downloaded. Each part is
written to the file as soon as it is there, and a later call goes on with the parts that are missing. Without CUDA, or
with `--tiny`, the same parts run on tiny configurations, to see that all of it works.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from .models import Place
from .page import tables
from .parts import PARTS, Part
from .store import PartLog, Store

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SECONDS = 480.0


def main(arguments: Sequence[str] | None = None, parts: Mapping[str, Part] = PARTS) -> None:
    """Runs the measurement from the command line.

    Args:
        arguments: Of the command line; None for the process's.
        parts: What can be measured.
    """
    given = _parser(parts).parse_args(arguments)
    chosen = [name.strip() for name in given.parts.split(",")] if given.parts else list(parts)
    unknown = [name for name in chosen if name not in parts]
    if unknown:
        raise SystemExit(f"no such part: {', '.join(unknown)}; there are {', '.join(parts)}")
    device = torch.device(given.device)
    is_tiny = given.tiny or device.type == "cpu"
    place = Place(device, torch.float32 if device.type == "cpu" else torch.bfloat16, is_tiny)
    store = Store(given.output or _file(device, is_tiny))
    with _quiet():
        measure(store, {name: parts[name] for name in chosen}, place, given.seconds, given.again)
    print(tables(store.result))
    print(f"written to {store.path}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the library tells of settings that nobody would use but to measure them."""
    log = logging.getLogger("sgl_diffusion_accel")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def measure(store: Store, parts: Mapping[str, Part], place: Place, seconds: float, again: bool = False) -> None:
    """Measures what is not in the store yet, as long as there is time.

    Args:
        store: Where results are, and go.
        parts: By name.
        place: Where.
        seconds: Time in all; a part that would take longer than what is left is not begun, but for the first.
        again: Whether to measure anew what is there.
    """
    begin = time.perf_counter()
    is_first = True
    for name, part in parts.items():
        needed = 0.0 if place.tiny else part.seconds
        left = seconds - (time.perf_counter() - begin)
        if store.has(name) and not again:
            print(f"{name}: in the file already")
        elif left < needed and not is_first:
            print(f"{name}: not begun, {left:.0f} s are left and it takes about {needed:.0f}; call again for it")
        else:
            is_first = False
            print(f"{name}: {part.about}", flush=True)
            store.measure(name, partial(_measured_at, part, place), place.device)


def _measured_at(part: Part, place: Place, log: PartLog) -> None:
    part.measure(log, place)


def _parser(parts: Mapping[str, Part]) -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:15} {part.about}" for name, part in parts.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        epilog=f"parts:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", default="", help="names with commas between them; all by default")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="begin no part that would not fit (480)")
    parser.add_argument("--again", action="store_true", help="measure parts anew that are in the file")
    parser.add_argument("--output", type=Path, help="the file; by default results/gpu_<device>.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny configurations, as always on a CPU")
    return parser


def _file(device: torch.device, is_tiny: bool) -> Path:
    """Results of true configurations go to the committed ones, those of tiny ones do not."""
    if is_tiny:
        return ROOT / "out" / "gpu_tiny.json"
    return RESULTS / f"gpu_{re.sub(r'[^a-z0-9]+', '_', torch.cuda.get_device_name(device).lower())}.json"


if __name__ == "__main__":
    main()
