"""Records uncached runs for the fit of TeaCache: how much the signal changes, and how much the output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from sgl_diffusion_accel.caching.blocks import divide
from sgl_diffusion_accel.caching.cache_patch import apply_cache
from sgl_diffusion_accel.caching.cached_model import Parts
from sgl_diffusion_accel.caching.policies import Change, Decision, Policy, Position, Tally
from sgl_diffusion_accel.caching.predictors import Reuse
from sgl_diffusion_accel.caching.signals import relative_l1
from sgl_diffusion_accel.caching.stats import RunStats
from sgl_diffusion_accel.caching.teacache import check_signal, uses_ret_steps
from sgl_diffusion_accel.caching.teacache_models import family_of
from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError, UnsupportedModelError
from sgl_diffusion_accel.targets import find_transformers, unwrap


@final
@dataclass(frozen=True)
class _Recording(Policy):
    """Computes every step and measures every change."""

    @property
    def needs_signal(self) -> bool:
        return True

    def decide(self, position: Position, tally: Tally, change: Change) -> Decision:  # noqa: ARG002
        return Decision(True, "recording", change())


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


class TeaCacheRecording:
    """Records the changes of signal and output of a pipeline's runs, for a fit; a context manager.

    Args:
        pipe: The pipeline, with no cache on it.
        use_ret_steps: See `fit_teacache`.

    Attributes:
        transformers: Component name to transformer.
        traces: Component name to (steps of the run, trace) of each branch of each run so far.
        retained: Component name to whether the signal is the one with retention steps.
    """

    def __init__(self, pipe: Any, use_ret_steps: bool | None = None) -> None:
        self._pipe = pipe
        self.transformers = find_transformers(pipe)
        self._recorders = {name: _Recorder() for name in self.transformers}
        self.traces: dict[str, list[tuple[int, Trace]]] = {name: [] for name in self.transformers}
        self.retained: dict[str, bool] = {}
        parts = {}
        for name, module in self.transformers.items():
            family = family_of(unwrap(module))
            self.retained[name] = retains = uses_ret_steps(unwrap(module), use_ret_steps)
            signal = family.retained if retains and family.retained is not None else family.signal
            check_signal(unwrap(module), signal)
            layout = divide(unwrap(module), 0, 0)
            parts[name] = Parts(layout, _Recording(), Reuse(), signal, observe=self._recorders[name])
        self._patch = apply_cache("TeaCache, recording", self.transformers, parts)

    @staticmethod
    def is_possible(transformers: Mapping[str, nn.Module]) -> bool:
        """Whether the models have blocks and a signal."""
        try:
            for module in transformers.values():
                divide(unwrap(module), 0, 0)
                check_signal(unwrap(module), family_of(unwrap(module)).signal)
        except UnsupportedModelError:
            return False
        return True

    def __enter__(self) -> TeaCacheRecording:
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
        for name, recorder in self._recorders.items():
            runs = patch.stats.runs[started - patch.stats.started :]
            for number, run in enumerate(runs, patch.stats.started - len(runs) + 1):
                self.traces[name] += _traces(run, number, name, recorder)
            recorder.outputs.clear()
            recorder.changes.clear()


def check_calls(pipe: Any, calls: Iterable[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """The calls as a list.

    Args:
        pipe: A pipeline that can be called.
        calls: Keyword arguments of `pipe(...)`, one dict for each run.
        name: Of the function that was given them.

    Raises:
        ConfigError: There are none.
        ConfigTypeError: Something has a wrong type.
    """
    if not callable(pipe) or not isinstance(getattr(pipe, "components", None), dict):
        raise ConfigTypeError(
            f"{name} needs a pipeline that it can call, and got {type(pipe).__name__}. Type: {name}(pipe, "
            "calls=[dict(prompt=..., num_inference_steps=50), ...])"
        )
    if isinstance(calls, (Mapping, str)) or not isinstance(calls, Iterable):
        raise ConfigTypeError(
            f"calls is a {type(calls).__name__}; allowed: a list of dicts, each the keyword arguments of pipe(...)."
        )
    calls = list(calls)
    for call in calls:
        if not isinstance(call, Mapping):
            raise ConfigTypeError(
                f"calls holds a {type(call).__name__}; allowed: dicts, each the keyword arguments of pipe(...)."
            )
    if not calls:
        raise ConfigError("calls is empty: give the keyword arguments of at least one pipe(...) call, as a dict.")
    return calls


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
