"""The table of docs/models.md: what was tested together, and what was not, and why."""

from __future__ import annotations

from .cases import COMPILED, EAGER, FACTORS, FORBIDDEN, QUANTISED_CASES
from .covering import Pair
from .quantised import QUANTISED

START, END = "<!-- together:start -->", "<!-- together:end -->"

_WORDS = {
    "adaptive": "`apply_adaptive_cache`",
    "plan": "`apply_cache_plan`",
    "dbcache": "`apply_cache_dit`",
    "teacache": "`apply_teacache`",
    "lossless": "`apply_lossless`",
    "auto": "`apply_auto`",
    "math": '`set_attention_backend(pipe, "math")`',
    "efficient": '`"efficient"`',
    "regional": "`compile_repeated_blocks(fullgraph=True)`",
    "whole": "`transformer.compile()`",
    "wrapper": "`torch.compile(transformer)`",
    "group, blocks": "by group of blocks",
    "group, leaves": "by group of leaves",
    "latents": "changes the latents",
    "prompt": "changes the prompt",
    "interrupt": "interrupts the run",
}


def text() -> str:
    """The table and what does not go together, as Markdown."""
    kinds = {**FACTORS, "dtype": [*FACTORS["dtype"], *QUANTISED]}
    number = len(EAGER) + len(COMPILED) + len(QUANTISED_CASES)
    rows = [f"| {factor} | {'; '.join(_word(value) for value in values)} |" for factor, values in kinds.items()]
    lines = [f"- {_beside([two for two in FORBIDDEN if FORBIDDEN[two] == why])}: {why}." for why in _reasons()]
    return "\n".join(
        [
            f"{number} cases cover every pair of these values, of two different rows, at least once:",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
            "These do not work without any patch either, and are left out:",
            "",
            *lines,
        ]
    )


def _reasons() -> list[str]:
    return list(dict.fromkeys(FORBIDDEN.values()))


def _beside(pairs: list[Pair]) -> str:
    """Pairs of one reason: each value of one factor is forbidden with each of the other one."""
    values: dict[str, list[str]] = {}
    for factor, value in (each for two in pairs for each in sorted(two)):
        values.setdefault(factor, []).append(_word(value))
    return " with ".join(f"{factor} {' or '.join(dict.fromkeys(words))}" for factor, words in values.items())


def _word(value: str) -> str:
    return _WORDS.get(value, value)


def between_marks(page: str) -> str:
    """What a page holds between the marks."""
    return page.split(START)[1].split(END, maxsplit=1)[0].strip()
