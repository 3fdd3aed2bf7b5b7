"""Transformer calls that no cache may skip, by their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FULL_CALL_ARGUMENTS = ("kv_cache", "kv_caches", "past_key_values", "kv_cache_flag", "skip_layers")
"""Transformer arguments with which a call is computed in full: its blocks read or write a key/value cache, or the call
leaves out blocks of its own choice (skip-layer guidance)."""


def full_call_argument(kwargs: Mapping[str, Any]) -> str | None:
    """The argument with which a call has to be computed in full, None if there is none."""
    return next((name for name in FULL_CALL_ARGUMENTS if kwargs.get(name) is not None), None)


def full_call_remark(argument: str) -> str:
    """What the user is told of such calls."""
    why = (
        "it leaves out blocks of its own choice"
        if argument == "skip_layers"
        else "its blocks read or write a key/value cache, which a skipped call would leave as it is"
    )
    return f"each call with {argument}= is computed in full: {why}."
