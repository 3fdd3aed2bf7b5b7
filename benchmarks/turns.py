"""What the measurements of time share: a clock of steps, sides that run in turn, quartiles, the command line."""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch

from sgl_diffusion_accel.reporting.spread import Spread

RESULTS = Path(__file__).parent / "results"
WARM_UP = 3

Times = tuple[float, float]
"""Wall time, and CPU time of the thread."""

T = TypeVar("T")


@dataclass
class StepClock:
    """Wall and CPU time at the end of each denoising step, in seconds; a pipeline's `callback_on_step_end`."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Takes the time at the end of a step."""
        del pipe, step, timestep
        self.wall.append(time.perf_counter())
        self.cpu.append(time.thread_time())
        return tensors

    def step_seconds(self, counts: Callable[[int], bool] = lambda step: step > WARM_UP) -> Times:
        """Median wall and CPU time of the steps that count: those after the warm-up."""
        wall, cpu = (
            statistics.median(end - begin for step, (begin, end) in enumerate(pairwise(times), 1) if counts(step))
            for times in (self.wall, self.cpu)
        )
        return wall, cpu


def take_turns(sides: Mapping[str, Callable[[], T]], rounds: int, warm_up: int = 1) -> dict[str, list[T]]:
    """Runs sides in turn, each round beginning with another one; of rounds of warm-up nothing is kept."""
    taken: dict[str, list[T]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(rounds + warm_up):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            found = sides[name]()
            if turn >= warm_up:
                taken[name].append(found)
    return taken


def quartiles(values: Iterable[float]) -> dict[str, float]:
    """Median and quartiles, as they are in the files of results."""
    spread = Spread.of(values)
    return {"median": spread.median, "lower_quartile": spread.low, "upper_quartile": spread.high}


def parser(about: str | None, pairs: int) -> argparse.ArgumentParser:
    """A command line that takes the number of pairs.

    Args:
        about: What is measured: a module's documentation, of which the first line is shown.
        pairs: How many there are unless it is told.
    """
    made = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    made.add_argument("--pairs", type=int, default=pairs)
    return made


def be_quiet() -> None:
    """One thread, on which small tensors are fastest, and nothing said of settings that are there to be measured."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def write(name: str, result: Mapping[str, Any]) -> None:
    """Writes a file of results."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
