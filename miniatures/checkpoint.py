"""Checkpoints on disk: weights in safetensors, of 16 or 8 bits, and facts beside them in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file

from .specs import spec_of

FOLDER = Path(__file__).resolve().parent / "checkpoints"
"""Where the repository's checkpoints lie."""

CURVE_POINTS = 200
"""Most points of a loss curve kept in the JSON."""

Fact = str | int | float
_LEVELS = 127
_SCALE = ".scale"


def export(
    name: str, weights: Mapping[str, torch.Tensor], facts: Mapping[str, Fact], losses: Sequence[float], folder: Path
) -> None:
    """Writes `<name>.safetensors` (float16) and `<name>.json`, each replaced in one move.

    Args:
        name: which miniature.
        weights: `transformer.…` and `words.weight`.
        facts: how they were trained.
        losses: loss of each step; thinned to means of neighbours.
        folder: where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec = spec_of(name)
    path = folder / f"{name}.safetensors"
    partial = path.with_suffix(".partial")
    half = {key: value.to(torch.float16).contiguous() for key, value in weights.items()}
    save_file(half, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(path)
    width = max(1, -(-len(losses) // CURVE_POINTS))
    curve = [[first + width, _mean(losses[first : first + width])] for first in range(0, len(losses), width)]
    write_card(
        name,
        {
            "name": name,
            "pipeline": spec.pipeline,
            "transformer": spec.transformer,
            "config": dict(spec.config),
            "scheduler": dict(spec.scheduler),
            "guidance": spec.guidance,
            "words": [list(slot) for slot in spec.drawn.slots],
            "frames": spec.world.frames,
            "training": {**facts, "torch": torch.__version__, "diffusers": diffusers.__version__},
            "loss_curve": curve,
        },
        folder,
    )


def in_eight_bits(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices as whole numbers from -127 to 127 with a float32 scale for each row, beside them as `….scale`.

    All else is float16.
    """
    found: dict[str, torch.Tensor] = {}
    for key, value in weights.items():
        if value.dim() < 2:
            found[key] = value.to(torch.float16).contiguous()
            continue
        scale = value.float().flatten(1).abs().amax(1).clamp_min(1e-12) / _LEVELS
        shaped = scale.view(-1, *[1] * (value.dim() - 1))
        found[key] = (value.float() / shaped).round().clamp(-_LEVELS, _LEVELS).to(torch.int8).contiguous()
        found[key + _SCALE] = scale
    return found


def read_weights(name: str, folder: Path = FOLDER) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint: `transformer.…` and `words.weight`.

    Returns:
        float16, or float32 where the file holds eight bits a weight: a row of whole numbers from -127 to 127 is
        multiplied by its scale, `[rows]`, which lies beside it as `….scale`.
    """
    spec_of(name)
    stored = load_file(folder / f"{name}.safetensors")
    scales = {key.removesuffix(_SCALE): stored.pop(key) for key in list(stored) if key.endswith(_SCALE)}
    whole = {key: stored[key].float() * scale.float()[:, None] for key, scale in scales.items()}
    return stored | whole


def read_card(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """The facts of a checkpoint."""
    spec_of(name)
    card: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return card


def write_card(name: str, card: Mapping[str, Any], folder: Path = FOLDER) -> None:
    """Writes the facts of a checkpoint."""
    path = folder / f"{name}.json"
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(card, indent=1) + "\n")
    partial.replace(path)


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 5)
