"""The table of `docs/models.md`: made from what came out when every class was run (`tests/classes/verdicts.json`)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from .markers import insert

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
VERDICTS = ROOT / "tests" / "classes" / "verdicts.json"

_VERDICTS = {
    "works": "work with caches of whole calls and of blocks",
    "works as whole calls only": "with caches of whole calls alone",
    "computed in full": "are computed in full",
}
_IN_FULL = (r"each call with (.*?)=? is computed in full: .*", r"no: calls with `\1` are computed in full")

_SHORT = {
    "whole calls": (_IN_FULL,),
    "blocks": ((r"\w+ cannot be cached: (.*?)\.", r"no: \1"), _IN_FULL),
    "lossless": (
        (r"(.*?;? ?)takes no mask: .*", r"\1takes no mask"),
        (r"(yes.*|one timestep .*)", r"\1"),
        (r".*", "[left alone](lossless.md)"),
    ),
    "attention": (
        (r"(\d+) of \1 attention layers .*? another backend: (.*?)\. .*", r"no: \2"),
        (r"(\d+) of (\d+) attention layers .*? another backend: (.*?)\. .*", r"not in \1 of \2 layers: \3"),
        (r"the attention backend .*? cannot take a call of .*?: (.*?)\. Usable .*", r"no: \1 (flex attention)"),
    ),
}
"""Patterns of the library's own reasons to what the table says of them."""


def renewed(text: str) -> str:
    """The page with its table as the file has it."""
    read = json.loads(VERDICTS.read_text(encoding="utf-8"))
    return insert(text, f"{in_short(read)}\n\n{table(read['classes'])}", "classes")


def in_short(read: Mapping[str, Mapping[str, Mapping[str, str]]]) -> str:
    """How many classes there are, and how many of each verdict."""
    versions, classes = read["versions"], read["classes"]
    verdicts = {key: each["verdict"] for key, each in classes.items() if ", " not in key}
    counts = [f"{count} {_VERDICTS[verdict]}" for verdict, count in Counter(verdicts.values()).most_common()]
    return (
        f"diffusers {versions['diffusers']} has {len(verdicts)} classes of transformers that denoise, and each of them "
        f"was run: {', '.join(counts)}. None was left out, and of none it is unknown."
    )


def table(classes: Mapping[str, Mapping[str, str]]) -> str:
    """One line a class."""
    lines = ["| transformer | whole calls | blocks | padding is cut | another attention |", "|---|---|---|---|---|"]
    return "\n".join(lines + [_line(key, each) for key, each in classes.items()])


def _line(key: str, verdict: Mapping[str, str]) -> str:
    name, _, label = key.partition(", ")
    cells = [f"`{name}`{f', {label}' if label else ''}"]
    cells += [_shortened(kind, verdict[kind]) for kind in ("whole calls", "blocks", "lossless", "attention")]
    return f"| {' | '.join(cells)} |"


def _shortened(kind: str, reason: str) -> str:
    for pattern, short in _SHORT.get(kind, ()):
        match = re.fullmatch(pattern, reason, re.DOTALL)
        if match and reason != "yes":
            return match.expand(short)
    return reason
