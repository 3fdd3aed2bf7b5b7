"""The best that each method offers at a cost, beside simply fewer steps and the best peer that was found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from miniatures.specs import spec_of

RATIOS = (2.0, 2.4, 2.8, 3.3, 3.8, 5.0)
"""Compute ratios of the columns."""

_NEAR = 0.97
"""A setting counts for a ratio if it computes as little, or at most this much more."""

FEWER = "simply fewer steps"
PEERS = "peers"
"""Kind of all rows that are somebody else's caches, beside the kind of each."""

METHODS: Mapping[str, Sequence[str]] = {
    FEWER: ("fewer steps",),
    "best peer setting found": (PEERS,),
    "DBCache, SGLang's defaults (reuse)": ("DBCache, SGLang's defaults",),
    "DBCache and step masks, best setting": ("DBCache, SGLang's defaults", "DBCache", "late masks"),
    "DBCache with `tolerance=` (gap control)": ("gap control",),
    "MagCache, calibrated, with prediction": ("MagCache",),
    "TeaCache, fitted, with prediction": ("TeaCache",),
    "adaptive cache": ("adaptive",),
    "calibrated plan": ("plan",),
    "tuned plan": ("tuned plan",),
    "plan from one caption, 50 Euler steps, 16×16": ("carried plan",),
}
"""By the name that tables have for a method: the kinds of rows that belong to it."""

_OURS = "sgl-diffusion-accel"
_NOT_PEERS = (_OURS, "unpatched", "fewer steps")
_HEADLINES = tuple(name for name in METHODS if "gap control" not in name and "one caption" not in name)
SCHEDULERS = {"euler": "Euler", "unipc": "UniPC", "dpm": "DPM-Solver++"}
_MODELS = {"emoji": "emoji (rough)", "wan": "Wan", "qwen": "Qwen-Image", "flux": "FLUX"}
_USUAL = ("euler", 50)
_SHORT = ("euler", 20)
_HEADLINE_COLUMNS = ((_USUAL, 2.4, ""), (_USUAL, 3.3, ""), (_SHORT, 2.0, "¹"))


def kind_of(row: Mapping[str, Any]) -> str:
    """The method of a row, or the family where it is not this library's."""
    family, name = str(row["family"]), str(row["name"])
    if family != _OURS:
        return family
    if name.startswith("tuned plan"):
        return "tuned plan"
    if name.startswith("plan"):
        if name.startswith("plan of one caption"):
            return "carried plan"
        return "plan of 50 Euler steps" if name.startswith("plan of") else "plan"
    for kind in ("adaptive", "gap control"):
        if name.startswith(kind):
            return kind
    for kind in ("TeaCache", "MagCache"):
        if kind in name:
            return kind if ", TS" in name else f"{kind}, reuse"
    if "late-" in name:
        return "late masks"
    return "DBCache, SGLang's defaults" if name == "F1 W4 MC3 R.24, reuse" else "DBCache"


def is_peer(row: Mapping[str, Any]) -> bool:
    """Whether a row is somebody else's cache."""
    return row["family"] not in _NOT_PEERS


def is_of(row: Mapping[str, Any], kinds: Sequence[str]) -> bool:
    """Whether a row belongs to one of the kinds."""
    return kind_of(row) in kinds or (PEERS in kinds and is_peer(row))


def best(result: Mapping[str, Any], kinds: Sequence[str], ratio: float) -> float | None:
    """The highest PSNR that the methods reach at a compute ratio or beyond; None if they do not reach it."""
    reached = [
        row["psnr"]
        for row in result["rows"]
        if row["psnr"] is not None and is_of(row, kinds) and row["compute_ratio"] >= _NEAR * ratio
    ]
    return max(reached, default=None)


def cell(result: Mapping[str, Any], method: str, ratio: float) -> str:
    """PSNR of a method at a cost, in italics where fewer steps are better, a dash where it does not get there."""
    found, plain = best(result, METHODS[method], ratio), best(result, METHODS[FEWER], ratio)
    if found is None:
        return "–"
    return f"*{found:.1f}*" if plain is not None and found < plain else f"{found:.1f}"


def headline(results: Sequence[Mapping[str, Any]]) -> str:
    """The README's table: one line a method, for each miniature two costs at 50 steps and one at 20.

    Args:
        results: JSON files of `benchmarks.cache`.
    """
    by_setting = {(one["model"], setting_of(one)): one for one in results if not _suffix(one)}
    columns = [
        (f"{'' if place else title} {ratio:g}×{note}".strip(), by_setting[model, setting], ratio)
        for model, title in _MODELS.items()
        for place, (setting, ratio, note) in enumerate(_HEADLINE_COLUMNS)
        if (model, setting) in by_setting
    ]
    lines = [f"| PSNR in dB at | {' | '.join(title for title, _, _ in columns)} |", "|---|" + "--:|" * len(columns)]
    lines += [
        f"| {method} | {' | '.join(cell(result, method, ratio) for _, result, ratio in columns)} |"
        for method in _HEADLINES
    ]
    return "\n".join(lines)


def at_costs(result: Mapping[str, Any]) -> str:
    """One result: a line for each method, a column for each compute ratio."""
    lines = [f"| PSNR (dB) at a compute ratio of | {' | '.join(f'{ratio:g}×' for ratio in RATIOS)} |"]
    lines.append("|---|" + "--:|" * len(RATIOS))
    for method in METHODS:
        cells = [cell(result, method, ratio) for ratio in RATIOS]
        if set(cells) != {"–"}:
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def at_some_costs(results: Sequence[Mapping[str, Any]], ratios: Sequence[float]) -> str:
    """Several results: a line for each, a column for each method, a number for each compute ratio.

    Results are left out where no run with fewer steps is as cheap: there is nothing to compare with.
    """
    lines = [f"| {_several(f'{ratio:g}×' for ratio in ratios)} | {' | '.join(_COLUMNS.values())} |"]
    lines.append("|---|" + "--:|" * len(_COLUMNS))
    for one in results:
        if any(best(one, METHODS[FEWER], ratio) is not None for ratio in ratios):
            cells = [_several(cell(one, method, ratio) for ratio in ratios) for method in _COLUMNS]
            lines.append(f"| [{short_title(one)}](results/pareto_{name_of(one)}.png) | {' | '.join(cells)} |")
    return "\n".join(lines)


def _several(cells: Iterable[str]) -> str:
    found = list(cells)
    return "–" if set(found) == {"–"} else " / ".join(found)


_SHORTER = (
    "fewer steps", "best peer", "SGLang's defaults", "DBCache", "gap control", "MagCache", "TeaCache", "adaptive",
    "plan", "tuned plan", "carried plan",
)  # fmt: skip
_COLUMNS = dict(zip(METHODS, _SHORTER, strict=True))


def order(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """Sorts results: by model, the usual setting of each first."""
    scheduler, steps = setting_of(result)
    return list(_MODELS).index(result["model"]), scheduler, -steps, _suffix(result)


def setting_of(result: Mapping[str, Any]) -> tuple[str, int]:
    """Scheduler and steps."""
    return str(result.get("scheduler", "euler")), int(result["steps"])


def name_of(result: Mapping[str, Any]) -> str:
    """The name under which a result is kept: the model's, with what is not as usual, such as `emoji_guidance_7`."""
    scheduler, steps = setting_of(result)
    name = str(result["model"]) if (scheduler, steps) == _USUAL else f"{result['model']}_{scheduler}_{steps}"
    return name + _suffix(result)


def is_usual(result: Mapping[str, Any]) -> bool:
    """Whether a result is of 50 Euler steps at the guidance and size that are the miniature's own."""
    return name_of(result) == str(result["model"])


def title(result: Mapping[str, Any]) -> str:
    """What was run: pipeline, steps, scheduler, and guidance and size where they are not the usual ones."""
    rough = " (emoji)" if result["model"] == "emoji" else ""
    return f"{result['pipeline']}{rough}, {_how(result)}"


def short_title(result: Mapping[str, Any]) -> str:
    """The same for a line of a table, with the number of captions."""
    count = len(result["captions"])
    return f"{_MODELS[result['model']]}, {_how(result)}; {count} caption{'' if count == 1 else 's'}"


def _how(result: Mapping[str, Any]) -> str:
    scheduler, steps = setting_of(result)
    guidance, size, batch = _unusual(result)
    more = f", guidance {guidance}" if guidance else ""
    more += f" at {size.replace('x', '×')}" if size else ""
    return f"{steps} {SCHEDULERS[scheduler]} steps{more}" + (f", batches of {batch}" if batch else "")


def _suffix(result: Mapping[str, Any]) -> str:
    """What the name of a result has behind it where guidance or size are not the miniature's own, or in batches."""
    guidance, size, batch = _unusual(result)
    return (f"_guidance_{guidance}" if guidance else "") + (f"_{size}" if size else "") + (batch and f"_batch_{batch}")


def _unusual(result: Mapping[str, Any]) -> tuple[str, str, str]:
    """Guidance, size and batch as text, each empty where it is the miniature's own, or 1."""
    spec = spec_of(result["model"])
    guidance, (height, width) = result["guidance"], result.get("size", [spec.world.side] * 2)
    return (
        "" if guidance == spec.guidance else f"{guidance:g}",
        "" if [height, width] == [spec.world.side] * 2 else f"{height}x{width}",
        str(result["batch"]) if "batch" in result else "",
    )
