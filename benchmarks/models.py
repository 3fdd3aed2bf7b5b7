"""The tables of `docs/models.md`: made from what came out when every class was run.

Transformers: `tests/classes/verdicts.json`; pipelines: `tests/pipelines/verdicts.json`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .markers import insert

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
VERDICTS = ROOT / "tests" / "classes" / "verdicts.json"
PIPELINES = ROOT / "tests" / "pipelines" / "verdicts.json"

_VERDICTS = {
    "works": "work with caches of whole calls and of blocks",
    "works as whole calls only": "with caches of whole calls alone",
    "computed in full": "are computed in full",
}
_IN_FULL = (r"each call with (.*?)=? is computed in full: .*", r"no: calls with `\1` are computed in full")

_SHORT = {
    "whole calls": (_IN_FULL, (r"yes, but for (.*)", r"yes, but for `\1`")),
    "blocks": (
        (r"yes; in full also: nothing to reuse", "yes; in full also where what is given changes in kind"),
        (r"yes; in full also: arguments forbid skipping", "yes; in full also with skipped layers"),
        (r"\w+ cannot be cached: (.*?)\.", r"no: \1"),
        _IN_FULL,
    ),
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
    """The page with its tables as the files have it."""
    read = json.loads(VERDICTS.read_text(encoding="utf-8"))
    text = insert(text, f"{in_short(read)}\n\n{table(read['classes'])}", "classes")
    read = json.loads(PIPELINES.read_text(encoding="utf-8"))
    return insert(text, f"{pipelines_in_short(read)}\n\n{table_of_pipelines(read)}", "pipelines")


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


def pipelines_in_short(read: Mapping[str, Mapping[str, Any]]) -> str:
    """How many pipeline classes there are, and how many of them were run."""
    run, left_out = {key.partition(", ")[0] for key in read["pipelines"]}, read["not run"]
    return (
        f"diffusers {read['versions']['diffusers']} has {len(run) + len(left_out)} pipeline classes with a diffusion "
        f"transformer: {len(run)} were run, in {len(read['pipelines'])} ways; {len(left_out)} were not, for reasons "
        "that are told below. Modular pipelines are not among them."
    )


def table_of_pipelines(read: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a pipeline, those that were not run at the end."""
    lines = ["| pipeline | its loop | branches | whole calls | blocks |", "|---|---|---|---|---|"]
    lines += [_line_of_pipeline(key, each) for key, each in read["pipelines"].items()]
    lines += ["", "Not run:", "", "| pipeline | why |", "|---|---|"]
    return "\n".join(lines + [f"| `{name}` | {why} |" for name, why in read["not run"].items()])


def _line_of_pipeline(key: str, verdict: Mapping[str, Any]) -> str:
    name, _, label = key.partition(", ")
    is_placed = verdict["loop"].startswith("yes")
    branches = ", ".join(f"`{each}`" for each in verdict["branches"])
    cells = [f"`{name}`{f', {label}' if label else ''}"]
    cells += [verdict["run"], branches] if is_placed else [f"{verdict['run']}; no step is that of all frames", "–"]
    calls = [_shortened(kind, verdict[kind]) for kind in ("whole calls", "blocks")]
    return f"| {' | '.join([*cells, *calls] if is_placed else [*cells, 'no', 'no'])} |"
