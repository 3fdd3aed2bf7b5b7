"""The look of all figures: colours, fonts, sizes. matplotlib is imported when the first one is drawn."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_diffusion_accel.errors import MissingPackageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every kind of colour vision.
BLUE, SKY, GREEN, YELLOW = "#0072B2", "#56B4E9", "#009E73", "#F0E442"
ORANGE, VERMILION, PURPLE = "#E69F00", "#D55E00", "#CC79A7"
VIOLET, GREY = "#7A5195", "#B8C1CA"
INK, FAINT, GRID = "#1F2933", "#61707D", "#DDDDDD"
COMPUTED, SKIPPED = BLUE, "#DCE2E7"
"""Of denoising steps: dark and pale, told apart without colours too."""


def new_figure(width: float, height: float, dpi: int = 150) -> Figure:
    """A figure of so many inches that belongs to no window and no notebook.

    Raises:
        MissingPackageError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("pictures need matplotlib. Type: pip install 'sgl-diffusion-accel[plots]'") from error
    return Figure(figsize=(width, height), dpi=dpi, facecolor="white")


def style(**more: Any) -> AbstractContextManager[None]:
    """The look of all figures, for the time of drawing.

    Args:
        **more: Settings of matplotlib that differ, with `_` for `.` between their first two words.
    """
    import matplotlib as mpl

    look: Any = {
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "text.parse_math": False,  # names and prompts are shown as they are, dollars too
    }
    context: AbstractContextManager[None] = mpl.rc_context(look | {k.replace("_", ".", 1): v for k, v in more.items()})
    return context


def save(figure: Figure, path: str | Path | None) -> None:
    """Writes a figure, unless there is no path; its folder is made if needed."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def shortened(text: str, most: int = 40) -> str:
    """The text on one line, cut to so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
