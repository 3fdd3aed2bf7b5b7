"""What a bug report needs: versions, devices, usable attention backends, settings in the environment."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from sgl_diffusion_accel.attention.backends.backend_table import Backend
from sgl_diffusion_accel.attention.backends.packages import flash4_beside_xformers
from sgl_diffusion_accel.attention.backends.registry import all_backends
from sgl_diffusion_accel.attention.backends.requirements import AttentionFacts, capability
from sgl_diffusion_accel.environment import PACKAGES, cpu_name, package_versions
from sgl_diffusion_accel.reporting.tables import Table

_OPTIONAL = ("triton", "matplotlib", "rich")
_PREFIXES = ("SGLANG_", "CUDA_", "HIP_", "ROCR_", "PYTORCH_", "TORCH", "DIFFUSERS_", "HF_HUB_OFFLINE", "NCCL_")
_NAMES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "WORLD_SIZE", "RANK", "LOCAL_RANK")
_IMPORT_S = 180
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")


def describe() -> str:
    """Everything, as Markdown to be pasted into a bug report."""
    versions = package_versions((*PACKAGES, *_OPTIONAL, *_backend_packages()))
    chapters = [
        ("Versions", _table(("package", "version"), versions.items())),
        ("Problems", "\n".join(f"- {each}" for each in _problems())),
        ("Machine", _table(("what", "value"), _machine())),
        ("Attention backends", _backends()),
        ("Environment", _table(("variable", "value"), _environment(os.environ)) or "Nothing that matters is set."),
    ]
    return "\n\n".join(f"### {title}\n\n{body}" for title, body in chapters if body)


def _problems() -> Iterator[str]:
    """What keeps the packages from working together; nothing is imported for it in this process."""
    clash = flash4_beside_xformers()
    if clash is not None:
        yield clash
    failure = _failure_of_diffusers()
    if failure is not None:
        yield f"`import diffusers` fails: {failure}"


def _failure_of_diffusers() -> str | None:
    """The last line of the error at importing diffusers, None if there is none. It is tried in another process."""
    if "diffusers.pipelines.pipeline_utils" in sys.modules:
        return None
    command = [sys.executable, "-c", "from diffusers import DiffusionPipeline"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return None if done.returncode == 0 else lines[-1]


def _backend_packages() -> tuple[str, ...]:
    return tuple(dict.fromkeys(each.package for each in all_backends().values() if each.package is not None))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """All of it words."""
    found = list(rows)
    return Table(head, found, words=range(len(head))).to_markdown() if found else ""


def _machine() -> Iterator[tuple[str, str]]:
    yield "Python", platform.python_version()
    yield "system", platform.platform()
    yield "processor", f"{cpu_name()}, {os.cpu_count()} cores"
    yield "threads of PyTorch", str(torch.get_num_threads())
    yield "CUDA of PyTorch", str(torch.version.cuda or torch.version.hip or "none")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        size, version = found.total_memory / 2**30, f"{found.major}.{found.minor}"
        yield f"cuda:{index}", f"{found.name}, {size:.1f} GiB, compute capability {version}"
    if torch.backends.mps.is_available():
        yield "mps", "available"
    if torch.xpu.is_available():
        for index in range(torch.xpu.device_count()):
            yield f"xpu:{index}", str(torch.xpu.get_device_name(index))


def _backends() -> str:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    facts = AttentionFacts(
        device=kind,
        capability=capability(torch.device(kind, 0)) if kind == "cuda" else None,
        is_hip=torch.version.hip is not None,
    )
    reasons = {backend.name: _why_not(backend, facts) for backend in all_backends().values()}
    rows = [(name, "yes" if reason is None else "no", reason or "") for name, reason in reasons.items()]
    return (
        f"On {kind}; what only a model tells (dtype, head size, masks) is checked when a backend is set.\n\n"
        + _table(("backend", "usable", "why not"), rows)
    )


def _why_not(backend: Backend, facts: AttentionFacts) -> str | None:
    return backend.lacks() or backend.requirements.refuses(facts) or backend.would_fetch()


def _environment(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name in sorted(environ):
        if name in _NAMES or name.startswith(_PREFIXES):
            yield name, "(hidden)" if any(word in name for word in _SECRET) else environ[name]
