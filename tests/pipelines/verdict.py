"""The verdict on a pipeline class, and the file that all of them are kept in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch

from . import checks
from .base import Case
from .trace import recording

FILE = Path(__file__).parent / "verdicts.json"

Verdict = dict[str, Any]


def verdict_of(case: Case) -> Verdict:
    """Runs a pipeline with each kind of patch.

    Raises:
        AssertionError: A patch does something wrong.
    """
    pipe = case.make()
    with recording(pipe) as trace:
        unpatched = case.run(pipe)
    assert unpatched.numel()
    assert torch.isfinite(unpatched).all()
    found = checks.never_skipping(case, pipe, trace, unpatched)
    return {
        "run": trace.shape(),
        **found,
        "said beforehand": checks.beforehand(pipe, found),
        "weights": checks.weights(case, pipe, trace) if found["branches"] else "none",
        "whole calls": checks.whole_calls(case, pipe, trace, unpatched),
        "blocks": checks.blocks(case, pipe, trace, unpatched),
        "lossless": checks.lossless(case, pipe, unpatched),
    }


def kept() -> dict[str, Verdict]:
    """The verdicts of the file."""
    read: dict[str, Verdict] = json.loads(FILE.read_text(encoding="utf-8"))["pipelines"]
    return read


def keep(verdicts: dict[str, Verdict], not_run: dict[str, str]) -> None:
    """Writes the file."""
    found: dict[str, Any] = {
        "versions": {"diffusers": diffusers.__version__, "torch": torch.__version__.partition("+")[0]},
        "pipelines": dict(sorted(verdicts.items())),
        "not run": dict(sorted(not_run.items())),
    }
    FILE.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
