"""What a profile was asked for, checked when it is made."""

from __future__ import annotations

import numbers
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError
from sgl_diffusion_accel.profiling.recording.nvtx import refuse_without_cuda
from sgl_diffusion_accel.profiling.recording.torch_trace import default_directory

_SWITCHES = ("all_stages", "nvtx", "trace", "record_shapes", "with_stack", "profile_memory")
_ALL = -1


@dataclass(frozen=True)
class ProfileSettings:
    """What `profile` takes.

    Attributes:
        steps: Denoising steps that are traced after one of warm-up, or -1 for all.
        all_stages: Whether whole pipeline calls are traced.
        output_dir: Folder of the traces; None for the environment's.
        nvtx: Whether NVTX ranges are emitted.
        trace: Whether the torch profiler runs; None for "unless there are NVTX ranges".
        record_shapes: Whether it records shapes.
        with_stack: Whether it records lines of code.
        profile_memory: Whether it records memory.
    """

    steps: int = 5
    all_stages: bool = False
    output_dir: str | Path | None = None
    nvtx: bool = False
    trace: bool | None = None
    record_shapes: bool = False
    with_stack: bool = False
    profile_memory: bool = False

    def __post_init__(self) -> None:
        self._set("steps", _steps(self.steps))
        if self.trace is None:
            self._set("trace", self.nvtx is not True)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ConfigTypeError(f"{name}={getattr(self, name)!r}; allowed: True and False.")
        for name in ("record_shapes", "with_stack"):
            if getattr(self, name) and not self.trace:
                raise ConfigError(f"{name}=True is recorded by the torch profiler alone. Type: trace=True.")
        if self.nvtx:
            refuse_without_cuda()
        if self.trace:
            self._set("output_dir", _folder(self.output_dir))

    @property
    def folder(self) -> Path:
        """Folder of the traces."""
        return Path(self.output_dir or "logs")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _steps(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ConfigTypeError(
            f"steps={value!r} is a {type(value).__name__}; allowed: a whole number from 1, or -1 for all steps."
        )
    if int(value) < 1 and int(value) != _ALL:
        raise ConfigError(
            f"steps={value}; allowed: a whole number from 1, or -1 for all steps. For timings without a trace type: "
            "trace=False."
        )
    return int(value)


def _folder(given: object) -> Path:
    """The folder that traces go into; it is made when the first one is written."""
    if given is not None and not isinstance(given, (str, os.PathLike)):
        raise ConfigTypeError(f"output_dir={given!r} is a {type(given).__name__}; allowed: the path of a folder.")
    folder = default_directory() if given is None else Path(given).expanduser()
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not nearest.is_dir():
        raise ConfigError(f"output_dir={str(folder)!r}: {nearest} is a file. Name a folder; it is made if needed.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir={str(folder)!r}: {nearest} is not writable. Name another folder.")
    return folder
