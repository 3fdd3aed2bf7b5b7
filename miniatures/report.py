"""Draws the pictures and writes the table of the README from the checkpoints: `python -m miniatures.report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from sgl_diffusion_accel.reporting.tables import Table

from .check import sample
from .checkpoint import FOLDER, read_card, read_weights
from .pipelines import captions, load_miniature
from .specs import DRAWN

HERE = Path(__file__).resolve().parent
_OPEN, _CLOSE = "<!-- table -->", "<!-- end of table -->"
_GALLERY_SEED, _GALLERY_COLUMNS, _GALLERY_STEPS = 3, 6, 50


def draw_curves(path: Path = HERE / "loss_curves.png") -> None:
    """Draws the loss curves that the checkpoints' JSON files hold."""
    figure, axes = _pyplot().subplots(figsize=(6, 3.2), dpi=110)
    for name in DRAWN:
        steps, losses = zip(*read_card(name)["loss_curve"], strict=True)
        axes.plot(steps, losses, label=name, linewidth=1)
    axes.set(xlabel="training step", ylabel="flow-matching loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def draw_gallery(path: Path = HERE / "gallery.png") -> None:
    """Draws a few samples of each miniature, the frames of a clip beside one another."""
    figure, grid = _pyplot().subplots(len(DRAWN), _GALLERY_COLUMNS, figsize=(13, 6.2), dpi=80)
    for row, name in zip(grid, DRAWN, strict=True):
        wanted = captions(name, _GALLERY_COLUMNS, _GALLERY_SEED)
        frames = sample(load_miniature(name), name, wanted, steps=_GALLERY_STEPS, seed=_GALLERY_SEED)
        for axes, caption, clip in zip(row, wanted, frames, strict=True):
            gap = np.ones((clip.shape[1], 1, 3), dtype=np.float32)
            parts = [part for frame in clip for part in (frame, gap)][:-1]
            axes.imshow(np.concatenate(parts, axis=1), interpolation="nearest")
            axes.set_title(caption, fontsize=8)
            axes.axis("off")
        row[0].text(-0.12, 0.5, name, transform=row[0].transAxes, rotation=90, va="center", ha="right")
    figure.tight_layout()
    figure.savefig(path)


def table() -> str:
    """The README's table, in Markdown."""
    columns = [_column(name) for name in DRAWN]
    rows = [(label, *(column[label] for column in columns)) for label in columns[0]]
    return Table(("", *DRAWN), rows, words=range(len(DRAWN) + 1)).to_markdown()


def write_table(path: Path = HERE / "README.md") -> None:
    """Puts the table between its two marks in the README."""
    text = path.read_text()
    before, after = text.split(_OPEN)[0], text.split(_CLOSE)[1]
    path.write_text(f"{before}{_OPEN}\n{table()}\n{_CLOSE}{after}")


def _column(name: str) -> dict[str, str]:
    card: dict[str, Any] = read_card(name)
    training, check = card["training"], card["check"]
    shows = {("place or motion" if word in ("place", "motion") else word): v for word, v in check["shows"].items()}
    config = card["config"]
    blocks = " + ".join(str(config[key]) for key in ("num_layers", "num_single_layers") if key in config)
    parameters = sum(value.numel() for value in read_weights(name).values())
    sides = f"{card['frames']} frames of 16 x 16" if card["frames"] > 1 else "16 x 16"
    return {
        "transformer": f"`{card['transformer']}`",
        "pipeline": f"`{card['pipeline']}`",
        "blocks": blocks,
        "width": str(config["num_attention_heads"] * config["attention_head_dim"]),
        "parameters": f"{parameters / 1e6:.2f} M",
        "file": f"{(FOLDER / f'{name}.safetensors').stat().st_size / 2**20:.1f} MiB",
        "sample": sides,
        "training steps": f"{training['steps_done']:,}",
        "training samples": f"{training['samples_seen']:,}",
        "minutes": f"{training['minutes']:.2g} on {training.get('device', 'one shared core')}",
        "last loss": f"{card['loss_curve'][-1][1]:.4f}",
        "sampled with": f"{check['steps']} steps, guidance {check['guidance']:g}",
        "samples checked": str(check["samples"]),
        **{f"shows its {word}" if word != "all" else "shows all four": f"{v:.1%}" for word, v in shows.items()},
    }


def _pyplot() -> Any:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


if __name__ == "__main__":
    torch.set_num_threads(1)
    draw_curves()
    draw_gallery()
    write_table()
