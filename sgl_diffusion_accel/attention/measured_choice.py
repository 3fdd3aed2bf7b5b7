"""`"auto"`: times the usable backends on the attention calls that really come, and remembers the fastest."""

from __future__ import annotations

import json
import logging
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion_accel.attention.backends.backend_table import Backend
from sgl_diffusion_accel.attention.backends.registry import all_backends, find_backend, fingerprint
from sgl_diffusion_accel.attention.backends.requirements import AttentionFacts
from sgl_diffusion_accel.attention.verify import relative_error, tolerance
from sgl_diffusion_accel.clocks import clock_for
from sgl_diffusion_accel.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

_ROUNDS = 5
_ENOUGH_S = 0.5  # spent on one backend for one kind of call

_MOST_SCORES = 1 << 29

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Timing:
    """One backend on one kind of call.

    Attributes:
        backend: Its name.
        milliseconds: Median time of a call; None if it failed.
        error: Relative L2 error against float32; None if it failed.
        note: Why it is out of the running, or empty.
    """

    backend: str
    milliseconds: float | None
    error: float | None
    note: str = ""


class MeasuredChoice:
    """Picks the fastest backend for each kind of call, by timing them when such a call comes for the first time.

    Args:
        allow_quantised: Whether backends that compute in fewer bits may be picked.
        store: Where choices are remembered; None to remember them in this process alone.

    Attributes:
        timings: Kind of call to what was measured.
        picks: Kind of call to the backend picked.
        was_compiled: Whether a call came in compiled code for which nothing had been measured.
    """

    def __init__(self, allow_quantised: bool, store: Path | None) -> None:
        self._allow_quantised = allow_quantised
        self._store = store
        self._picked: dict[Key, Backend] = {}
        self.timings: dict[str, list[Timing]] = {}
        self.picks: dict[str, str] = {}
        self.was_compiled = False
        self._measuring = threading.Lock()

    def pick(self, facts: AttentionFacts, sides: tuple[Tensor, Tensor, Tensor], more: dict[str, Any]) -> Backend:
        """See `redirect.Choice`. In compiled code nothing can be timed: there it is PyTorch's own."""
        # Plain values: the compiler of torch 2.8 cannot look up an object. The shapes tell the other facts.
        kind = (facts.device, facts.capability, facts.dtype, facts.mask, facts.is_causal)
        key = (*kind, *sides[0].shape, *sides[1].shape)
        picked = self._picked.get(key)
        if picked is None:
            if torch.compiler.is_compiling():
                self.was_compiled = True
                return find_backend("sdpa")
            with self._measuring:  # other threads wait for what the first one finds, and do not disturb its clock
                picked = self._picked.get(key) or self._find(facts, sides, more)
                self._picked[key] = picked
        return picked

    def _find(self, facts: AttentionFacts, sides: tuple[Tensor, Tensor, Tensor], more: dict[str, Any]) -> Backend:
        label = _label(facts, sides)
        usable = [each for each in all_backends().values() if self._may_run(each, facts)]
        scores = sides[0].shape[0] * sides[0].shape[1] * sides[0].shape[2] * sides[1].shape[2]
        if scores > _MOST_SCORES:  # the plain products would take gigabytes, and cannot win
            usable = [each for each in usable if each.name != "math"]
        identity = _identity(label, sides[0], usable)
        known = _read(self._store).get(identity)
        remembered = next((each for each in usable if each.name == known), None)
        # Looked at again: a backend of one's own may have been registered anew under its name.
        if remembered is not None and self._is_right(remembered, sides, more):
            self.picks[label] = remembered.name
            return remembered
        timings = [self._time(each, sides, more) for each in usable]
        self.timings[label] = timings
        running = [each for each in timings if each.milliseconds is not None and not each.note]
        if not running:
            raise UnsupportedModelError(f"no attention backend works for {label}: {timings}")
        best = min(running, key=lambda each: each.milliseconds or 0.0)
        self.picks[label] = best.backend
        logger.info("attention backend for %s: %s, %.3g ms", label, best.backend, best.milliseconds)
        _write(self._store, identity, best.backend)
        return find_backend(best.backend)

    def _may_run(self, backend: Backend, facts: AttentionFacts) -> bool:
        if not (backend.is_exact or self._allow_quantised):
            return False
        # Kernels of the Hub are fetched only when they are set by name.
        return backend.hub is None and not (backend.lacks() or backend.requirements.refuses(facts))

    def _is_right(self, backend: Backend, sides: tuple[Tensor, Tensor, Tensor], more: dict[str, Any]) -> bool:
        """Whether a remembered choice still computes what it should."""
        try:
            return relative_error(backend.load()(*sides, **more), sides, more) <= tolerance(backend, sides[0].dtype)
        except Exception:  # it has stopped working since: all are timed again
            return False

    def _time(self, backend: Backend, sides: tuple[Tensor, Tensor, Tensor], more: dict[str, Any]) -> Timing:
        try:
            kernel = backend.load()
            output = kernel(*sides, **more)
            error = relative_error(output, sides, more)
            # `not <=`, so that NaN is out as well.
            if not error <= tolerance(backend, sides[0].dtype):
                return Timing(backend.name, None, error, f"error {error:.2g}")
            del output
            return Timing(backend.name, median_ms(lambda: kernel(*sides, **more), sides[0].device), error)
        except Exception as failure:  # a kernel that cannot run here is out, whatever it raises
            logger.debug("attention backend %s failed", backend.name, exc_info=True)
            return Timing(backend.name, None, None, f"{type(failure).__name__}: {str(failure)[:80]}")


def median_ms(run: Callable[[], Tensor], device: torch.device) -> float:
    """Median time of a call in milliseconds, measured on the device where it runs; after one call to warm up."""
    run()
    clock, taken = clock_for(device), list[float]()
    begun = time.perf_counter()
    while len(taken) < _ROUNDS or (len(taken) < 50 and time.perf_counter() - begun < _ENOUGH_S / 5):
        start = clock.now()
        run()
        end = clock.now()
        clock.settle()
        taken.append(clock.milliseconds(start, end))
        if time.perf_counter() - begun > _ENOUGH_S and len(taken) > 1:
            break
    return statistics.median(taken)


def _label(facts: AttentionFacts, sides: tuple[Tensor, Tensor, Tensor]) -> str:
    query, key, _ = sides
    words = [f"B{query.shape[0]} H{query.shape[1]} Q{query.shape[2]} K{key.shape[2]} D{query.shape[3]}"]
    if key.shape[1] != query.shape[1]:
        words.append(f"Hkv{key.shape[1]}")
    words.append(str(query.dtype).removeprefix("torch."))
    words += [f"{facts.mask} mask"] if facts.mask else []
    words += ["causal"] if facts.is_causal else []
    return " ".join(words)


def _identity(label: str, query: Tensor, usable: list[Backend]) -> str:
    """What a remembered choice holds for: the call, the device, and the versions of everything that was compared."""
    device = torch.cuda.get_device_name(query.device) if query.device.type == "cuda" else platform.processor() or "cpu"
    threads = "" if query.device.type == "cuda" else f" {torch.get_num_threads()} threads"
    versions = [f"{each.name} {fingerprint(each)}".strip() for each in usable]
    return f"{label} | {device}{threads} | torch {torch.__version__} | {', '.join(versions)}"


def default_store() -> Path:
    """The file of remembered choices, in the user's cache directory."""
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "sgl-diffusion-accel" / "attention.json"


def _read(store: Path | None) -> dict[str, Any]:
    try:
        found = {} if store is None else json.loads(store.read_text())
    except (OSError, ValueError):  # none yet, or damaged: it is only a memory
        return {}
    return found if isinstance(found, dict) else {}


def _write(store: Path | None, identity: str, name: str) -> None:
    if store is None:
        return
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        # Beside it and then moved: another process never reads half a file.
        with tempfile.NamedTemporaryFile("w", dir=store.parent, delete=False) as file:
            json.dump(_read(store) | {identity: name}, file, indent=1)
        Path(file.name).replace(store)
    except OSError as error:
        logger.warning("the choice of attention backend cannot be remembered: %s", error)


def as_rows(timings: dict[str, list[Timing]]) -> list[dict[str, Any]]:
    """The timings as plain rows, for JSON."""
    return [{"call": label, **asdict(each)} for label, found in timings.items() for each in found]
