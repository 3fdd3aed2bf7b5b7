"""Shows what `apply_auto` has chosen: what acts, what does not, and why."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from textwrap import indent
from typing import Protocol

from sgl_diffusion_accel.auto.auto_config import AutoConfig
from sgl_diffusion_accel.patch import Patch

KINDS = ("lossless", "cache", "attention")
"""Kinds of the parts, in the order in which they are applied."""


class Composed(Protocol):
    """A patch of several parts."""

    config: AutoConfig
    left_out: dict[str, str]

    @property
    def parts(self) -> Mapping[str, Patch]:
        """Its parts by kind."""

    @property
    def notice(self) -> str:
        """What keeps it from acting; empty where nothing does."""

    def standing(self, kind: str) -> list[Patch]:
        """The patches of a kind on its transformers that are none of its parts."""


def line(patch: Composed) -> str:
    """What it is, in a line."""
    acts = [kind for kind in KINDS if not _state(patch, kind)]
    return f"auto, quality {patch.config.quality!r}: {', '.join(acts) or 'nothing acts'}; see print(patch)"


def text(patch: Composed) -> str:
    """The summary that `print(patch)` shows."""
    lines = [_head(patch)]
    for kind in KINDS:
        state = _state(patch, kind)
        lines.append(indent(f"{kind}: {state}" if state else str(patch.parts[kind]), "  "))
    return "\n".join(lines)


def html(patch: Composed) -> str:
    """What a notebook shows."""
    drawn = [f"<div><b>{escape(_head(patch))}</b></div>"]
    for kind in KINDS:
        state = _state(patch, kind)
        draw = getattr(patch.parts.get(kind), "_repr_html_", None)
        drawn.append(draw() if draw is not None and not state else f"<div>{escape(f'{kind}: {state}')}</div>")
    return "".join(drawn)


def _head(patch: Composed) -> str:
    return f"auto, quality {patch.config.quality!r}{f' [{patch.notice}]' if patch.notice else ''}"


def _state(patch: Composed, kind: str) -> str:
    """Why the part of a kind does not act; empty where it does, or the whole patch does not."""
    standing = patch.standing(kind)
    if kind not in patch.parts:
        beside = "; another one is on it, which was applied by itself" if standing else ""
        return f"left out: {patch.left_out.get(kind, 'not asked for')}{beside}"
    if patch.parts[kind].is_in_place or patch.notice:
        return ""
    return f"replaced by {standing[0]!r}, which was applied after it" if standing else "removed since"
