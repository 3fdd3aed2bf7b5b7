"""Records uncached runs for fits: how much TeaCache's signal, the output and the blocks' residual change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from sgl_diffusion_accel.caching.blocks.cached_model import Parts
from sgl_diffusion_accel.caching.blocks.layout import divide
from sgl_diffusion_accel.caching.blocks.parallel import signal_reduction
from sgl_diffusion_accel.caching.cache_patch import apply_cache
from sgl_diffusion_accel.caching.magcache.magnitudes import MagnitudeRatios
from sgl_diffusion_accel.caching.parts.policies import Change, Decision, Policy, Position, Tally
from sgl_diffusion_accel.caching.parts.predictors import Reuse
from sgl_diffusion_accel.caching.parts.signals import Signal, TimeEmbedding, relative_l1
from sgl_diffusion_accel.caching.parts.stats import RunStats
from sgl_diffusion_accel.caching.teacache.apply_teacache import check_signal, uses_ret_steps
from sgl_diffusion_accel.caching.teacache.teacache_models import family_of
from sgl_diffusion_accel.calibration.magnitude_record import MagnitudeRecorder, ratios_of
from sgl_diffusion_accel.errors import ConfigError, UnsupportedModelError
from sgl_diffusion_accel.targets import find_transformers, unwrap


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
class _Recorder:
    """Collects the changes of the outputs of one transformer, by run and branch."""

    outputs: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    changes: dict[tuple[int, str], dict[int, float]] = field(default_factory=dict)

    def __call__(self, run: int, branch: str, step: int, output: Any) -> None:
        """Sees what the transformer has returned."""
        now = _first_tensor(output).detach()
        key = (run, branch)
        before = self.outputs.get(key)
        if before is not None and before.shape == now.shape:
            self.changes.setdefault(key, {})[step] = relative_l1(now, before)
        self.outputs = {each: kept for each, kept in self.outputs.items() if each[0] >= run - 1}
        self.outputs[key] = now.clone()

    def clear(self) -> None:
        """Forgets all runs."""
        self.outputs.clear()
        self.changes.clear()


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
        transformers: Component name to transformer.
        traces: Component name to (steps of the run, trace) of each branch of each run so far.
        magnitudes: Ratios of each run so far.
        retained: Component name to whether the signal is the one with retention steps.
    """

    def __init__(
        self, pipe: Any, use_ret_steps: bool | None = None, *, signals: bool = True, magnitudes: bool = False
    ) -> None:
        self._pipe = pipe
        self.transformers = find_transformers(pipe)
        self.traces: dict[str, list[tuple[int, Trace]]] = {name: [] for name in self.transformers}
        self.magnitudes: list[MagnitudeRatios] = []
        self.retained: dict[str, bool] = {}
        self._recorders: dict[str, _Recorder] = {}
        self._magnitude_recorders: dict[str, MagnitudeRecorder] = {}
        parts = {}
        for name, wrapped in self.transformers.items():
            module = unwrap(wrapped)
            if signals:
                self._recorders[name] = _Recorder()
            if magnitudes:
                self._magnitude_recorders[name] = MagnitudeRecorder(partial(signal_reduction, module))
            parts[name] = Parts(
                layout=divide(module, 0, 0),
                policy=_Recording(signals),
                predictor=Reuse(),
                signal=self._signal(name, module, use_ret_steps) if signals else None,
                observe=self._recorders.get(name),
                observe_residuals=self._magnitude_recorders.get(name),
            )
        self._patch = apply_cache("recording", self.transformers, parts, pipe)

    def _signal(self, name: str, module: nn.Module, use_ret_steps: bool | None) -> Signal | TimeEmbedding:
        family = family_of(module)
        self.retained[name] = retains = uses_ret_steps(module, use_ret_steps)
        signal = family.retained if retains and family.retained is not None else family.signal
        check_signal(module, signal)
        return signal

    @staticmethod
    def has_blocks(transformers: Mapping[str, nn.Module]) -> bool:
        """Whether the models have blocks whose residual can be recorded."""
        try:
            for module in transformers.values():
                divide(unwrap(module), 0, 0)
        except UnsupportedModelError:
            return False
        return True

    @staticmethod
    def has_signals(transformers: Mapping[str, nn.Module]) -> bool:
        """Whether the models have blocks and a signal for TeaCache."""
        try:
            for module in transformers.values():
                divide(unwrap(module), 0, 0)
                check_signal(unwrap(module), family_of(unwrap(module)).signal)
        except UnsupportedModelError:
            return False
        return True

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
        runs = patch.stats.runs[started - patch.stats.started :]
        for number, run in enumerate(runs, patch.stats.started - len(runs) + 1):
            for name, recorder in self._recorders.items():
                self.traces[name] += _traces(run, number, name, recorder)
            found = ratios_of(run, number, self._magnitude_recorders)
            self.magnitudes += [] if found is None else [found]
        for recorders in (self._recorders, self._magnitude_recorders):
            for each in recorders.values():
                each.clear()


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
        trace = [point for point in trace if math.isfinite(point[1]) and math.isfinite(point[2])]
        if trace:
            found.append((run.steps, trace))
    return found
