"""The verdict on a class, and the file that all of them are kept in."""

from __future__ import annotations

import json
import re
from pathlib import Path

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
    """
    model = row.make()
    given = arguments(row, model)
    unpatched = run(row, model, given)
    again = run(row, model, given)
    checks._assert_equal(again, unpatched, "the same run again")
    said = {
        "never skipping": checks.never_skipping(row, model, given, unpatched),
        "whole calls": checks.whole_calls(row, model),
        "blocks": checks.blocks(row, model, given),
        "lossless": checks.lossless(row, model, given),
        "attention": checks.attention(row, model, given),
    }
    is_whole = said["blocks"] == checks.YES
    return {"verdict": "works" if is_whole else "works as whole calls only"} | {k: _plain(v) for k, v in said.items()}


def _plain(text: str) -> str:
    """A reason without what changes from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def kept() -> dict[str, Verdict]:
    """The verdicts of the file."""
    read: dict[str, Verdict] = json.loads(FILE.read_text(encoding="utf-8"))
    return read
