"""Transformer calls that no cache may skip, by their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FULL_CALL_ARGUMENTS = ("kv_cache_mode", "kv_cache", "kv_caches", "past_key_values", "kv_cache_flag", "skip_layers")
"""Transformer arguments with which a call is computed in full: its blocks may write a key/value cache, or the call
leaves out blocks of its own choice (skip-layer guidance)."""

_MODE = "kv_cache_mode"
_READS = "cached"  # Qwen-Image 2.1, FLUX.2 Klein, Wan-Animate 2; "extract" writes
_MODES_THAT_READ = {"read", "skip", None}  # of the layers of what GLM-Image is given as `kv_caches`; "write" writes


def full_call_argument(kwargs: Mapping[str, Any]) -> str | None:
    """The argument with which a call has to be computed in full, as it is given; None if there is none.

    A call that says that it only reads its key/value cache is like any other: skipped, it leaves the cache as it would
    have left it.
    """
    given = [name for name in FULL_CALL_ARGUMENTS if kwargs.get(name) is not None]
    found = next((name for name in given if not _only_reads(name, kwargs)), None)
    return f"{_MODE}={kwargs[_MODE]!r}" if found == _MODE else found and f"{found}="


def _only_reads(argument: str, kwargs: Mapping[str, Any]) -> bool:
    if argument in (_MODE, "kv_cache"):
        return kwargs.get(_MODE) == _READS
    layers = getattr(kwargs[argument], "caches", ()) if argument == "kv_caches" else ()
    return bool(layers) and {getattr(layer, "mode", "unknown") for layer in layers} <= _MODES_THAT_READ


def full_call_remark(argument: str) -> str:
    """What the user is told of such calls."""
    why = (
        "it leaves out blocks of its own choice"
        if argument == "skip_layers="
        else "its blocks may write a key/value cache, which a skipped call would leave as it is"
    )
    return f"each call with {argument} is computed in full: {why}."
