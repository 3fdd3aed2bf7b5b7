"""The verdict on a class, and the file that all of them are kept in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch

from . import checks
from .base import Row
from .loop import arguments, run

FILE = Path(__file__).parent / "verdicts.json"

Verdict = dict[str, str]
"""`verdict`, and what each kind of patch does: "yes", or why not."""


def verdict_of(row: Row) -> Verdict:
    """Runs a class with each kind of patch.

    Raises:
        AssertionError: A patch does something wrong.
        AccelError: Not even whole calls can be cached: then there is no verdict.
    """
    model = row.make()
    given = arguments(row, model)
    unpatched = run(row, model, given)
    checks.assert_equal(run(row, model, given), unpatched, "the same run again, unpatched")
    said = {
        "never skipping": checks.never_skipping(row, model, given, unpatched),
        "whole calls": checks.whole_calls(row, model, unpatched),
        "blocks": checks.blocks(row, model, given, unpatched),
        "lossless": checks.lossless(row, model, given),
        "attention": checks.attention(row, model, given),
    }
    return {"verdict": _in_words(said), **said}


def _in_words(said: Verdict) -> str:
    if said["whole calls"] != checks.YES:
        return "computed in full"
    return "works" if said["blocks"] == checks.YES else "works as whole calls only"


def kept() -> dict[str, Verdict]:
    """The verdicts of the file."""
    read: dict[str, Verdict] = json.loads(FILE.read_text(encoding="utf-8"))["classes"]
    return read


def keep(verdicts: dict[str, Verdict]) -> None:
    """Writes the file."""
    found: dict[str, Any] = {
        "versions": {"diffusers": diffusers.__version__, "torch": torch.__version__.partition("+")[0]},
        "classes": dict(sorted(verdicts.items())),
    }
    FILE.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
