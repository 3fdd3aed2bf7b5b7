"""Runs the contenders in turn: every variant beside an unpatched run of the same call, in an order that rotates."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sgl_diffusion_accel.calls import Call
from sgl_diffusion_accel.clocks import synchronise
from sgl_diffusion_accel.comparing.contenders import UNPATCHED, Contender, applied, fewer_steps_contenders
from sgl_diffusion_accel.comparing.measures.computed_share import Computed, Maps
from sgl_diffusion_accel.comparing.measures.read_output import Decode, Media, read_output

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One run of one contender.

    Attributes:
        media: What it returned.
        seconds: Wall time of the pipeline's call, the device's work included.
        share: Share of the blocks that were computed, None if it is not known.
        peak_memory: Bytes at most allocated on the CUDA device meanwhile; None without one.
        maps: Which steps were computed, where a cache of this library was on.
    """

    media: Media
    seconds: float
    share: float | None
    peak_memory: int | None
    maps: Maps


@dataclass(frozen=True)
class Round:
    """One run of each contender on one call.

    Attributes:
        call: Index of the call.
        runs: By the contender's name, in the order in which they ran.
    """

    call: int
    runs: Mapping[str, Run]


class Runner:
    """Runs contenders on calls.

    Args:
        pipe: The unpatched pipeline.
        calls: What to call it with.
        decode: The user's reader of outputs, or None.
    """

    def __init__(self, pipe: Any, calls: Sequence[Call], decode: Decode | None = None) -> None:
        self._pipe = pipe
        self._calls = calls
        self._decode = decode
        self._counted: dict[str, float | None] = {}  # shares of variants that do not count themselves
        self.device = device_of(pipe)

    def rounds(
        self, variants: Sequence[Contender], fewer_steps: bool | Sequence[int], repeats: int, warmup: int
    ) -> Iterator[Round]:
        """Runs everything; the first rounds are the warm-up, with nothing but the variants and the unpatched pipeline.

        Which numbers of steps cost as much as the variants is known after the first round, warm-up or not.

        Args:
            variants: The user's.
            fewer_steps: Rows with fewer steps; see `compare`.
            repeats: Rounds of each call.
            warmup: Rounds of warm-up, on the first call.
        """
        contenders = [Contender(UNPATCHED), *variants]
        fewer: list[Contender] | None = None
        order = [0] * warmup + [index for _ in range(repeats) for index in range(len(self._calls))]
        for number, index in enumerate(order):
            runs = {one.name: self.run(one, index) for one in rotated([*contenders, *(fewer or [])], number)}
            if fewer is None:
                shares = {one.name: runs[one.name].share for one in variants}
                fewer = fewer_steps_contenders(fewer_steps, self._calls, shares)
                runs |= {one.name: self.run(one, index) for one in fewer if not warmup}
            yield Round(index, runs)
            del runs  # before the next round's outputs come

    def run(self, contender: Contender, index: int) -> Run:
        """One run, timed; the pipeline is unpatched before and after.

        Raises:
            VariantError: The variant failed.
        """
        call = self._calls[index]
        steps = contender.steps[index] if contender.steps else None
        logger.info("%s, call %d of %d", contender.name, index + 1, len(self._calls))
        with applied(self._pipe, contender):
            is_patched = contender.apply is not None
            computed = Computed(self._pipe, count=is_patched and contender.name not in self._counted)
            if computed.compiles and is_patched:
                self._timed(call.fresh(steps), call.seed)  # the compiler's time is not the variant's
            with computed:
                output, seconds, peak = self._timed(call.fresh(steps), call.seed)
        if contender.apply is None:
            share: float | None = steps / call.steps if steps and call.steps else 1.0
        elif computed.counts_itself:
            share = computed.share
        else:
            share = self._counted.setdefault(contender.name, computed.share)
        media = read_output(output, self._pipe, call.arguments, self._decode)
        return Run(media, seconds, share, peak, computed.maps)

    def _timed(self, arguments: dict[str, Any], seed: int) -> tuple[Any, float, int | None]:
        """What the pipeline returned, seconds, and bytes of peak memory."""
        on_cuda = self.device.type == "cuda"
        devices = [self.device] if on_cuda else []
        with torch.random.fork_rng(devices), torch.no_grad():  # some pipelines and schedulers draw from these
            torch.default_generator.manual_seed(seed)
            if on_cuda:
                with torch.cuda.device(self.device):
                    torch.cuda.manual_seed(seed)
                torch.cuda.reset_peak_memory_stats(self.device)
            synchronise(self.device)
            begin = time.perf_counter()
            output = self._pipe(**arguments)
            synchronise(self.device)
            seconds = time.perf_counter() - begin
        return output, seconds, torch.cuda.max_memory_allocated(self.device) if on_cuda else None


def rotated(contenders: Sequence[Contender], by: int) -> list[Contender]:
    """The same ones, begun further on, so that none is always the first or always runs after the same one's heat."""
    start = by % len(contenders)
    return [*contenders[start:], *contenders[:start]]


def device_of(pipe: Any) -> torch.device:
    """The device on which a pipeline runs, offloaded or not."""
    device = getattr(pipe, "_execution_device", None) or getattr(pipe, "device", None)
    return torch.device(device or "cpu")
