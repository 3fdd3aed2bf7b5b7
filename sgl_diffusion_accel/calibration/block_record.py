"""Records uncached runs for fits: how much TeaCache's signal, the output and the blocks' residual change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from sgl_diffusion_accel.caching.blocks.cached_model import Parts, Recorder
from sgl_diffusion_accel.caching.blocks.layout import divide
from sgl_diffusion_accel.caching.blocks.parallel import signal_reduction
from sgl_diffusion_accel.caching.cache_patch import put_on_blocks
from sgl_diffusion_accel.caching.magcache.magnitudes import MagnitudeRatios
from sgl_diffusion_accel.caching.parts.policies import Change, Decision, Policy, Position, Tally
from sgl_diffusion_accel.caching.parts.predictors import Reuse
from sgl_diffusion_accel.caching.parts.signals import Signal, relative_l1
from sgl_diffusion_accel.caching.parts.stats import RunStats
from sgl_diffusion_accel.caching.teacache.teacache_models import family_of
from sgl_diffusion_accel.caching.teacache.teacache_signals import check_signal, uses_ret_steps
from sgl_diffusion_accel.calibration.magnitude_record import MagnitudeRecorder, ratios_of
from sgl_diffusion_accel.errors import ConfigError, UnsupportedModelError
from sgl_diffusion_accel.targets import Target, find_targets


@final
@dataclass(frozen=True)
class _Recording(Policy):
    """Computes every step and measures every change of a signal, if there is one."""

    measures: bool

    @property
    def needs_signal(self) -> bool:
        return self.measures

    def decide(self, position: Position, tally: Tally, change: Change) -> Decision:  # noqa: ARG002
        return Decision(True, "recording", change() if self.measures else None)


Trace = list[tuple[int, float, float]]
"""One branch of one run: step, change of the signal, change of the output."""


@dataclass
class _Recorder(Recorder):
    """Collects what is wanted of one transformer, by run and branch.

    Attributes:
        signals: Whether the changes of its outputs are wanted.
        magnitudes: Of what its blocks add; None where they are not wanted.
    """

    signals: bool
    magnitudes: MagnitudeRecorder | None
    outputs: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    changes: dict[tuple[int, str], dict[int, float]] = field(default_factory=dict)

    def saw_output(self, run: int, branch: str, step: int, output: Any) -> None:
        if not self.signals:
            return
        now = _first_tensor(output).detach()
        key = (run, branch)
        before = self.outputs.get(key)
        if before is not None and before.shape == now.shape:
            self.changes.setdefault(key, {})[step] = relative_l1(now, before)
        self.outputs = {each: kept for each, kept in self.outputs.items() if each[0] >= run - 1}
        # Pipelines may write into what they get.
        self.outputs[key] = now.clone()

    def saw_residuals(self, run: int, branch: str, step: int, residuals: Sequence[Tensor]) -> None:
        if self.magnitudes is not None:
            self.magnitudes.add(run, branch, step, residuals)

    def clear(self) -> None:
        """Forgets all runs."""
        self.outputs.clear()
        self.changes.clear()
        if self.magnitudes is not None:
            self.magnitudes.clear()


def _first_tensor(output: Any) -> Tensor:
    """The tensor that a transformer has predicted; several of one shape, one a sample, as one."""
    parts = tuple(output.values()) if isinstance(output, Mapping) else output
    if isinstance(parts, Tensor):
        return parts
    if isinstance(parts, (list, tuple)) and parts:
        if isinstance(parts[0], Tensor) and isinstance(output, list):
            return torch.cat([part.flatten() for part in parts])
        return _first_tensor(parts[0])
    raise UnsupportedModelError(f"the transformer returns a {type(output).__name__}, and no tensor in it.")


class BlockRecording:
    """Records the changes of signal, output and residual of a pipeline's runs, for fits; a context manager.

    Args:
        pipe: The pipeline, with no cache on it.
        use_ret_steps: See `fit_teacache`.
        signals: Whether to record signal and output, for TeaCache.
        magnitudes: Whether to record the magnitudes of the residual, for MagCache.

    Attributes:
        targets: The transformers.
        traces: Component name to (steps of the run, trace) of each branch of each run so far.
        magnitudes: Ratios of each run so far.
        retained: Component name to whether the signal is the one with retention steps.
    """

    def __init__(
        self, pipe: Any, use_ret_steps: bool | None = None, *, signals: bool = True, magnitudes: bool = False
    ) -> None:
        self._pipe = pipe
        self.targets = find_targets(pipe)
        self.traces: dict[str, list[tuple[int, Trace]]] = {target.name: [] for target in self.targets}
        self.magnitudes: list[MagnitudeRatios] = []
        self.retained: dict[str, bool] = {}
        self._recorders: dict[str, _Recorder] = {}
        parts = {}
        for target in self.targets:
            ratios = MagnitudeRecorder(partial(signal_reduction, target.module)) if magnitudes else None
            recorder = self._recorders[target.name] = _Recorder(signals, ratios)
            parts[target.name] = Parts(
                layout=divide(target.module, 0, 0),
                policy=_Recording(signals),
                predictor=Reuse(),
                signal=self._signal(target, use_ret_steps) if signals else None,
                recorder=recorder,
            )
        self._patch = put_on_blocks(self.targets, "recording", parts)

    def _signal(self, target: Target, use_ret_steps: bool | None) -> Signal:
        self.retained[target.name] = retains = uses_ret_steps(target.module, use_ret_steps)
        signal = family_of(target.module).signal_for(retains)
        check_signal(target.module, signal)
        return signal

    @staticmethod
    def has_blocks(targets: Sequence[Target]) -> bool:
        """Whether the models have blocks whose residual can be recorded."""
        try:
            for target in targets:
                divide(target.module, 0, 0)
        except UnsupportedModelError:
            return False
        return True

    @classmethod
    def has_signals(cls, targets: Sequence[Target]) -> bool:
        """Whether the models have blocks and a signal for TeaCache."""
        try:
            for target in targets:
                check_signal(target.module, family_of(target.module).signal)
        except UnsupportedModelError:
            return False
        return cls.has_blocks(targets)

    def __enter__(self) -> BlockRecording:
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.remove()

    def run(self, call: Mapping[str, Any]) -> None:
        """Runs one call, uncached.

        Raises:
            ConfigError: The call took the recording off.
            UnsupportedModelError: The pipeline ran without a loop that is known.
        """
        patch, started = self._patch, self._patch.stats.started
        self._pipe(**call)
        if not patch.active:
            raise ConfigError("the call took the recording off, by removing it or by applying another cache.")
        if patch.stats.started == started:
            raise UnsupportedModelError(
                f"{type(self._pipe).__name__} ran without a denoising loop that is known: nothing was recorded."
            )
        # From the end: the statistics keep the last runs alone, and go on counting.
        runs = patch.stats.runs[started - patch.stats.started :]
        for number, run in enumerate(runs, patch.stats.started - len(runs) + 1):
            for name, recorder in self._recorders.items():
                self.traces[name] += _traces(run, number, name, recorder) if recorder.signals else []
            ratios = {name: each.magnitudes for name, each in self._recorders.items() if each.magnitudes is not None}
            found = ratios_of(run, number, ratios)
            self.magnitudes += [] if found is None else [found]
        self.forget()

    def forget(self) -> None:
        """Drops what runs have left that were not recorded by `run`."""
        for recorder in self._recorders.values():
            recorder.clear()


def _traces(run: RunStats, number: int, component: str, recorder: _Recorder) -> list[tuple[int, Trace]]:
    """(steps of the run, trace) of each branch of a run."""
    found = []
    for branch, records in run.branches.items():
        moved = recorder.changes.get((number, branch), {})
        trace = [
            (record.step, record.change, moved[record.step])
            for record in records.records
            if record.component == component and record.change is not None and record.step in moved
        ]
        # The first step of a run has an infinite change: nothing comes before it.
        trace = [point for point in trace if math.isfinite(point[1]) and math.isfinite(point[2])]
        if trace:
            found.append((run.steps, trace))
    return found
