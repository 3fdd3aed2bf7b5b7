"""Timings as JSON, with the fields of SGLang-Diffusion's `--perf-dump-path`, written and read."""

from __future__ import annotations

import datetime
import json
import math
import os
import subprocess
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.profiling.recording.stages import sglang_name
from sgl_diffusion_accel.profiling.results.timings import CallReport, ProfileData, StepTiming

_SECONDS = 5


@dataclass(frozen=True)
class Perf:
    """What such a file says.

    Attributes:
        total_ms: The whole call.
        stages: Stage to milliseconds; a stage that ran several times is summed up.
        denoise_steps_ms: Every denoising step.
        memory: Checkpoint to what it counts, in MiB.
        about: The other fields.
    """

    total_ms: float
    stages: dict[str, float]
    denoise_steps_ms: tuple[float, ...]
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def peak(self, name: str) -> float | None:
        """The highest of a count over all checkpoints, None where no checkpoint has it."""
        return max((counts[name] for counts in self.memory.values() if name in counts), default=None)


def write_perf(report: ProfileData, call: CallReport, path: Path, tag: str) -> Path:
    """Writes one call of a report.

    Args:
        report: Tells the versions.
        call: The call.
        path: The file; its folder is made if needed.
        tag: A word to know the file by.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(perf_fields(report, call, tag), indent=2) + "\n", encoding="utf-8")
    return path


def perf_fields(report: ProfileData, call: CallReport, tag: str) -> dict[str, Any]:
    """The fields of the file. What belongs to no stage is the stage "Other", so that the stages sum up to the total."""
    stages = [(sglang_name(stage.name), stage.duration_ms) for stage in call.stages]
    stages.append(("Other", call.other_ms))
    memory = {each.name: {key: round(value, 2) for key, value in _counts(each)} for each in call.memory}
    return {
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "request_id": uuid.uuid4().hex,
        "commit_hash": _commit(),
        "tag": tag,
        "total_duration_ms": call.total_ms,
        "steps": [{"name": name, "duration_ms": duration} for name, duration in stages],
        "denoise_steps_ms": [
            {"step": index, "duration_ms": duration} for index, duration in enumerate(call.denoise_steps_ms)
        ],
        "memory_checkpoints": memory,
        "meta": {
            "pipeline": call.pipeline,
            "device": call.device,
            "clock": call.clock,
            "is_complete": call.is_complete,
            "profiler_ms": call.profiler_ms,
            "versions": dict(report.versions),
            "remarks": [*report.remarks, *call.remarks],
            "denoise_steps": [_step(step) for step in call.steps],
        },
    }


def _counts(checkpoint: Any) -> list[tuple[str, float]]:
    return [(key, value) for key, value in asdict(checkpoint).items() if key != "name"]


def _step(step: StepTiming) -> dict[str, Any]:
    branches = [
        {key: value for key, value in asdict(branch).items() if value is not None and key != "begin_ms"}
        for branch in step.branches
    ]
    return {
        "step": step.index,
        "timestep": step.timestep,
        "traced": step.traced,
        "scheduler_ms": step.scheduler_ms,
        "branches": [_plain(branch) for branch in branches],
    }


def _plain(branch: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity, which is the change where there was nothing to compare with."""
    return {key: value for key, value in branch.items() if not isinstance(value, float) or math.isfinite(value)}


def _commit() -> str:
    """The commit of the repository that the process runs in, as SGLang-Diffusion tells it."""
    given = os.environ.get("SGLANG_GIT_COMMIT")
    if given:
        return given
    try:
        told = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "N/A"
    return told.stdout.strip() or "N/A"


def read_perf(path: str | Path) -> Perf:
    """Reads such a file, of this library or of SGLang-Diffusion.

    Args:
        path: The file.

    Raises:
        ConfigError: It cannot be read, or lacks what makes it such a file.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}; expected an object with total_duration_ms and steps.")
    try:
        stages: dict[str, float] = {}
        for each in data["steps"]:
            stages[str(each["name"])] = stages.get(str(each["name"]), 0.0) + _finite(each["duration_ms"])
        return Perf(
            total_ms=_finite(data["total_duration_ms"]),
            stages=stages,
            denoise_steps_ms=tuple(_finite(each["duration_ms"]) for each in data.get("denoise_steps_ms") or ()),
            memory=_memory(data.get("memory_checkpoints") or {}),
            about={key: data.get(key) for key in ("timestamp", "request_id", "commit_hash", "tag", "meta")},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no file of timings: {type(error).__name__}: {error}. Expected the fields total_duration_ms, "
            "steps and denoise_steps_ms, as prof.save_perf() and SGLang-Diffusion's --perf-dump-path write them."
        ) from error


def _finite(value: Any) -> float:
    """A number; Python reads NaN and infinity, which JSON does not have."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is no duration")
    return number


def _memory(checkpoints: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        str(name): {str(key): _finite(value) for key, value in counts.items()} for name, counts in checkpoints.items()
    }
